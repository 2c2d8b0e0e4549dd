"""Where a model keeps an association: in its context, or computed at the last state.

A clean run answers a query. In a corrupted run one token is another one of its class: the value
that is asked for ("target"), or the key that it was bound to ("source"). Then the clean activation
is put back at one place, a component of one layer at one position, and the clean answer's
probability may come back. Back from the target's position in an early layer: the association is
stored in context. Back from the query's position only: it is computed at the last state.

After the interventions of "Mechanistic evaluation of Transformers and state space models" (2025,
arXiv 2505.15105).
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memjax.nn.block import Block
from memjax.nn.lm import LanguageModel
from memjax.probes.layers import unrolled
from memjax.typing import Array, Float, Int, PyTree

COMPONENTS = ("block input", "mixer input", "mixer output", "block output")  # as they come


class Query(NamedTuple):
    """One query of each row. tokens: [B, T]. answer: [B], the token that is right. positions [B] of
    the key's first token in the context (source), of its value (target) and of the query."""

    tokens: np.ndarray
    answer: np.ndarray
    source: np.ndarray
    target: np.ndarray
    query: np.ndarray


def first_queries(
    inputs: Int[np.ndarray, "B T"],
    targets: Int[np.ndarray, "B T"],
    mask: np.ndarray,
    distance: Int[np.ndarray, "B T"],
) -> Query:
    """The first scored position of each row whose answer stands in its context, as in associative
    recall: `distance` tokens in front of the query, right behind its key. Other rows are left out;
    ValueError when none is left, or where the inputs are vectors."""
    if inputs.ndim != 2:
        raise ValueError("the rows are vectors, and the intervention exchanges tokens")
    rows = np.arange(len(inputs))
    query = mask.argmax(axis=1)
    target = query - distance[rows, query]
    kept = mask.any(axis=1) & (distance[rows, query] > 0) & (target > 0)
    kept &= inputs[rows, target] == targets[rows, query]
    kept &= inputs[rows, target - 1] == inputs[rows, query]
    if not kept.any():
        raise ValueError(
            "no row has a query whose answer stands behind its key in the context; the "
            "intervention is for associative recall (mqar, forgetting_mqar)"
        )
    answer = targets[rows, query]
    return Query(*(a[kept] for a in (inputs, answer, target - 1, target, query)))


def corrupted(query: Query, which: str) -> Int[np.ndarray, "B T"]:
    """The tokens with the one at `which` ("source" or "target") exchanged for that of another row,
    which is of the same class and does not occur in this row; ValueError when there is none."""
    at = getattr(query, which)
    rows = np.arange(len(at))
    others, tokens = query.tokens[rows, at], query.tokens.copy()
    for row in rows:
        for shift in range(1, len(rows)):
            other = others[(row + shift) % len(rows)]
            if other not in query.tokens[row]:
                tokens[row, at[row]] = other
                break
        else:
            raise ValueError(f"row {row}: every other row's {which} occurs in it; give more rows")
    return tokens


def _site(module: nn.Module, method: str) -> tuple[int, str] | None:
    """(layer, "block" or "mixer") of a module whose call is a place to read and to restore."""
    if method != "__call__" or module.scope is None or module.path[:1] != ("stack",):
        return None
    if isinstance(module, Block):
        return int(module.path[1].removeprefix("group_")), "block"
    if module.path[3:] == ("mixer",):
        return int(module.path[1].removeprefix("group_")), "mixer"
    return None


def _run(model: LanguageModel, params: PyTree, tokens: Array, change) -> Array:
    """Logits [B, T, vocab]; change(layer, component, x) is what goes on in place of x."""

    def restore(call, args, kwargs, context):
        site = _site(context.module, context.method_name)
        if site is None:
            return call(*args, **kwargs)
        layer, part = site
        x, *rest = args
        y, *others = call(change(layer, f"{part} input", x), *rest, **kwargs)
        return change(layer, f"{part} output", y), *others

    with nn.intercept_methods(restore):
        return model.apply({"params": params}, tokens, differentiate=False)[0]


def _clean(model, params, tokens):
    """(logits, activations [layers, components, B, T, D])."""
    found = {}

    def keep(layer, component, x):
        found[layer, component] = x
        return x

    logits = _run(model, params, tokens, keep)
    layers = range(model.config.depth)
    return logits, jnp.stack(
        [jnp.stack([found[layer, name] for name in COMPONENTS]) for layer in layers]
    )


def _restored(model, params, tokens, kept, layer, component, position):
    """Logits with the clean activation at one place, component an index and position [B]; a layer
    of -1 restores nothing."""
    here = (jnp.arange(tokens.shape[1]) == position[:, None])[..., None]

    def change(at, name, x):
        index = COMPONENTS.index(name)
        wanted = here & (layer == at) & (component == index)
        return jnp.where(wanted, kept[at, index], x)

    return _run(model, params, tokens, change)


def restoration(
    model: LanguageModel, params: PyTree, query: Query, tokens: Int[np.ndarray, "B T"]
) -> dict[str, Any]:
    """What each place restores of the answers in a run on corrupted tokens, as means over rows.

    clean, corrupted: probability of the clean answer. rows: for each layer, component and position
    (source, target, query): probability: restored minus corrupted; logit: the same of the clean
    answer's logit minus that of the corrupted run's own; kl: KL(clean || restored) in nats.
    """
    config, params = unrolled(model.config, params)
    plain = LanguageModel(config)
    batch = np.arange(len(query.query))
    logits, kept = jax.jit(functools.partial(_clean, plain))(params, query.tokens)
    clean = _log_softmax(logits, batch, query.query)
    run = functools.partial(jax.jit(functools.partial(_restored, plain)), params, tokens, kept)
    before = _log_softmax(run(-1, 0, query.query), batch, query.query)
    other = before.argmax(axis=-1)
    other = np.where(other == query.answer, np.argsort(before, axis=-1)[:, -2], other)

    def figures(found):
        own = found[batch, query.answer]
        kl = np.sum(np.exp(clean) * (clean - found), axis=-1).mean()
        return np.exp(own).mean(), (own - found[batch, other]).mean(), kl

    start, rows = figures(before), []
    for layer in range(config.depth):
        for index, name in enumerate(COMPONENTS):
            for place in ("source", "target", "query"):
                given = run(layer, index, getattr(query, place))
                now = figures(_log_softmax(given, batch, query.query))
                row = {"layer": layer, "component": name, "position": place}
                row |= {"probability": float(now[0] - start[0])}
                rows.append(row | {"logit": float(now[1] - start[1]), "kl": float(now[2])})
    about = {"queries": len(batch), "clean": float(figures(clean)[0])}
    return {**about, "corrupted": float(start[0]), "corrupted_kl": float(start[2]), "rows": rows}


def _log_softmax(logits: Float[Array, "B T n"], batch, position) -> Float[np.ndarray, "B n"]:
    """Log probabilities at one position of each row, float64."""
    found = np.asarray(logits, np.float64)[batch, position]
    found = found - found.max(axis=-1, keepdims=True)
    return found - np.log(np.exp(found).sum(axis=-1, keepdims=True))
