"""Whole layers of memories that learn at test time, as float64 loops over tokens in numpy.

Everything is written down a second time from the papers: projections, convolution, gates, feature
map, the memory token by token, norm and gate. The layers run in their chunked forms.
"""

import itertools
import math

import jax
import numpy as np
import pytest
from contract import distance
from test_mixers import B, T, build, silu, softplus

pytestmark = pytest.mark.usefixtures("exact_products")
HEADS, KEY, VALUE, CHUNK = 2, 3, 5, 4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def unit(x):
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def gate(w, name, x):
    return x @ w[name]["gate"]["kernel"] + w[name]["bias"]


def projected(w, x):
    """q and k of unit norm, v; behind the convolution and a SiLU."""
    parts = [np.einsum("btd,dhn->bthn", x, w[n]["kernel"]) for n in ("query", "key", "value")]
    flat = np.concatenate([part.reshape(B, T, -1) for part in parts], axis=-1)
    kernel = w["short_convolution"]["kernel"]
    padded = np.concatenate([np.zeros((B, 3, flat.shape[-1])), flat], axis=1)
    flat = silu(sum(padded[:, 3 - i : 3 - i + T] * kernel[i] for i in range(4)))
    borders = np.cumsum([HEADS * KEY, HEADS * KEY])
    q, k, v = (a.reshape(B, T, HEADS, -1) for a in np.split(flat, borders, axis=-1))
    return unit(q), unit(k), v


def output(w, answers, x):
    normed = answers / np.sqrt(np.mean(answers**2, axis=-1, keepdims=True) + 1e-5)
    normed = normed * w["output_norm"]["scale"]
    gates = silu(np.einsum("btd,dhn->bthn", x, w["output_gate"]["kernel"]))
    return np.einsum("bthn,hnd->btd", normed * gates, w["output"]["kernel"])


def titans(w, x, q, k, v):
    alpha, eta = sigmoid(-gate(w, "forget", x)), sigmoid(gate(w, "momentum", x))
    theta = sigmoid(gate(w, "rate", x)) * (1 - eta) / (2 * CHUNK)
    (start,) = jax.tree.leaves(w["memory"])
    answers = np.zeros((B, T, HEADS, VALUE))
    for b, h in np.ndindex(B, HEADS):
        memory, momentum = start[h], 0
        for t in range(T):
            if t % CHUNK == 0:
                frozen = memory
            surprise = 2 * np.outer(k[b, t, h], k[b, t, h] @ frozen - v[b, t, h])
            momentum = eta[b, t, h] * momentum - theta[b, t, h] * surprise
            memory = alpha[b, t, h] * memory + momentum
            answers[b, t, h] = q[b, t, h] @ memory
    return answers


def features(x, coefficients):
    """All monomials of degree 0 to 2, weighted so that phi(x) . phi(y) = sum_i c_i (x . y)^i."""
    made = []
    for degree in range(3):
        for which in itertools.product(range(x.shape[-1]), repeat=degree):
            made.append(np.sqrt(coefficients[degree]) * math.prod(x[..., i] for i in which))
    made = [np.broadcast_to(a, x.shape[:-1]) for a in made]
    return np.stack(made, axis=-1) / np.sqrt(np.sum(coefficients))


def newton_schulz(x, steps=5):
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def atlas(w, x, q, k, v):
    """With features of ordered monomials, of which each unordered one is there several times; the
    memory starts in their span, so that it answers as the layer's does."""
    context = w["weigh"]["bias"].shape[-1]
    alpha, theta = sigmoid(gate(w, "keep", x)), sigmoid(gate(w, "momentum", x))
    eta = sigmoid(gate(w, "step", x)) / (context * CHUNK)
    gamma = sigmoid(np.einsum("btd,dhc->bthc", x, w["weigh"]["kernel"]) + w["weigh"]["bias"])
    coefficients = softplus(w["coefficients"])
    (start,) = jax.tree.leaves(w["memory"])
    spread = spreading(KEY)
    q, k = features(q, coefficients), features(k, coefficients)
    answers = np.zeros((B, T, HEADS, VALUE))
    for b, h in np.ndindex(B, HEADS):
        memory, momentum = spread.astype(start.dtype) @ start[h], 0
        for t in range(T):
            if t % CHUNK == 0:
                frozen = memory
            surprise = 0
            for i in range(max(0, t - context + 1), t + 1):
                error = k[b, i, h] @ frozen - v[b, i, h]
                surprise = surprise + gamma[b, t, h, t - i] * 2 * np.outer(k[b, i, h], error)
            momentum = theta[b, t, h] * momentum + surprise
            memory = alpha[b, t, h] * memory - eta[b, t, h] * newton_schulz(momentum)
            answers[b, t, h] = q[b, t, h] @ memory
    return answers


def spreading(size):
    """[ordered, unordered] monomials: an isometry from the second to the first."""
    unordered = [
        c for d in range(3) for c in itertools.combinations_with_replacement(range(size), d)
    ]
    ordered = [c for d in range(3) for c in itertools.product(range(size), repeat=d)]
    found = np.array([[tuple(sorted(o)) == u for u in unordered] for o in ordered], float)
    return found / np.sqrt(found.sum(axis=0))


def lattice(w, x, q, k, v):
    beta, gamma = sigmoid(gate(w, "keep", x)), sigmoid(gate(w, "step", x)) / 2
    v = v / np.maximum(1, np.linalg.norm(v, axis=-1, keepdims=True))
    (start,) = jax.tree.leaves(w["memory"])
    answers = np.zeros((B, T, HEADS, VALUE))

    def normed(slots):
        return slots / np.linalg.norm(slots, axis=-1, keepdims=True)

    for b, h in np.ndindex(B, HEADS):
        slots = normed(start[h])
        for t in range(T):
            if t % CHUNK == 0:
                frozen = slots
            error = v[b, t, h] - k[b, t, h] @ frozen
            step = gamma[b, t, h] * k[b, t, h]
            kept = beta[b, t, h] - step * (frozen @ error)  # our choice of the frozen terms
            slots = kept[:, None] * slots + np.outer(step, error)
            if t % CHUNK == CHUNK - 1:
                slots = normed(slots)
            answers[b, t, h] = q[b, t, h] @ normed(slots)
    return answers


@pytest.mark.parametrize(
    ("name", "loop", "options"),
    [
        ("titans", titans, {}),
        ("atlas", atlas, {"context": 3}),
        ("lattice", lattice, {"gate": "silu"}),
    ],
    ids=["titans", "atlas", "lattice"],
)
def test_layers_are_their_papers(name, loop, options):
    sizes = {"heads": HEADS, "key_dim": KEY, "value_dim": VALUE, "frozen_chunk": CHUNK}
    module, params, x, ctx = build(name, **sizes, **options)
    y = jax.jit(lambda p: module.apply({"params": p}, x, None, ctx)[0])(params)
    w, x = jax.tree.map(np.float64, params), np.float64(x)
    exact = projected(w, x)
    expected = output(w, loop(w, x, *exact), x)
    # Newton-Schulz magnifies what rounding leaves where the momentum has no rank
    single = jax.tree.map(np.float32, (w, x, *exact))
    own = distance(output(w, loop(*single), x), expected)
    assert distance(y, expected) < max(1e-5, 3 * own)
