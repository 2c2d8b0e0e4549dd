"""A window of one memory: what its pairs teach, the states behind it, the answers to its queries.

With the rows of windows.py and, for each layer l and base, h_i that enters the layer at pair i and
the error d_i behind it, the gradient of pair i is N_i = h_i d_i^T, and

    x W_t = alpha_t x W + f_t x Z + phi_t x S - sum_i P[t, i] (x . h_i) d_i

for layer after layer of the answers. It is plain JAX that a kernel can hold: products are of
matrices, and `jax.vjp` of it in a kernel is the backward pass.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.deep_network import windows
from pallas_kernels.deep_network.windows import BORDER, END, FLAGS, MOMENTUM, Flags, Rule
from pallas_kernels.products import dot_in_parts, parts

Layers = tuple[jax.Array, ...]


class Factor(NamedTuple):
    """How a float32 factor of a product is held. like: the op's dtype; exact: whether that holds
    it, or in bfloat16 two parts do."""

    like: jnp.dtype
    exact: bool = False

    def of(self, x):
        """Its parts."""
        return (x.astype(self.like),) if self.exact else parts(x, self.like)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def product(a, b, of_a, of_b, how_a, how_b):
    """`products.dot` of float32 matrices. Its gradients are products of the same kind, where those
    of `lax.dot_general` have transposed results."""
    return dot_in_parts(how_a.of(a), how_b.of(b), of_a, of_b)


def _product_forward(a, b, *how):
    return product(a, b, *how), (a, b)


def _product_backward(of_a, of_b, how_a, how_b, saved, d):
    (a, b), how = saved, Factor(how_a.like)
    a, b, d = how_a.of(a), how_b.of(b), how.of(d)
    da = dot_in_parts(d, b, 1, 1 - of_b) if of_a else dot_in_parts(b, d, 1 - of_b, 1)
    db = dot_in_parts(d, a, 0, 1 - of_a) if of_b else dot_in_parts(a, d, 1 - of_a, 0)
    return da, db


product.defvjp(_product_forward, _product_backward)


def gelu(x):
    """By tanh, and its slope."""
    root = (2 / jnp.pi) ** 0.5
    square = x * x
    t = jnp.tanh(root * (x + 0.044715 * square * x))
    slope = root * (1 + 3 * 0.044715 * square) * (1 - t * t)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * slope


class Place(NamedTuple):
    """What W or Z is at a place of the window: a column [n, 1] of pairs, [1, 1] of each source."""

    pairs: jax.Array
    sources: list


class Memory(NamedTuple):
    """The layers of W, Z (None without momentum) and W_b in front of a window, and k and v of the
    pairs there, [F, ...] (None for c = 1)."""

    weights: Layers
    momentum: Layers | None
    base: Layers
    pairs: Layers | None


class Learnt(NamedTuple):
    """Of the pairs of all bases, one after the other: h and d of each layer, [n, ...]. sources: the
    layers of W, Z and the start, those that are there."""

    entering: list
    errors: list
    sources: list


class Window:
    """One memory in a window. k: [S, K], v: [S, V], float32; coefficients [S + EXTRA + F, n];
    start: layers, None where no document begins. like: the op's dtype, which holds k, v and q."""

    def __init__(self, memory: Memory, k, v, coefficients, start, rule: Rule, like):
        self.memory, self.k, self.v, self.start, self.rule = memory, k, v, start, rule
        if memory.pairs is not None:
            self.k, self.v = map(jnp.concatenate, zip((k, v), memory.pairs, strict=True))
        self.rough, self.held = Factor(like), Factor(like, exact=True)
        self.count = coefficients.shape[1] - rule.sources
        behind = len(k) + windows.EXTRA
        self.tokens, self.extra = coefficients[: len(k)], coefficients[len(k) : behind]
        self.chosen = coefficients[behind:, : len(self.k)] if rule.front else None
        self.columns = jnp.swapaxes(self.extra, 0, 1)

    def place(self, row: int, upto: int) -> Place:
        """Of one of the rows behind those of the tokens."""
        return Place(self.columns[:upto, row : row + 1], self.scales(self.extra[row : row + 1]))

    def scales(self, rows) -> list:
        """Columns of the sources."""
        return [rows[:, n : n + 1] for n in range(self.count, rows.shape[1])]

    def flag(self, name: str):
        """One of `Flags`, [1, 1], as a mask."""
        n = Flags._fields.index(name)
        return self.extra[FLAGS : FLAGS + 1, n : n + 1] > 0

    def learn(self, weights: Layers) -> tuple[list, list]:
        """h and d of each layer at these weights."""
        entering, slopes = [self.k], []
        for n, layer in enumerate(weights[:-1]):
            hidden, slope = gelu(self.times(entering[-1], layer, n))
            entering.append(hidden)
            slopes.append(slope)
        error = -self.v
        if self.rule.loss == "l2":
            y = self.times(entering[-1], weights[-1], 1)
            error = 2 * ((self.k + y if self.rule.residual else y) - self.v)
        errors = [error]
        for layer, slope in zip(weights[:0:-1], slopes[::-1], strict=True):
            errors.append(slope * product(errors[-1], layer, 1, 1, self.rough, self.rough))
        return entering, errors[::-1]

    def times(self, x, layer, depth: int):
        """x W, where x enters the layer at a depth."""
        return product(x, layer, 1, 0, self.rough if depth else self.held, self.rough)

    def stepped(self, sources, learnt, depth: int, *places: Place) -> list:
        """A layer at places."""
        h, d = learnt.entering[depth], learnt.errors[depth]
        beside = jnp.concatenate([place.pairs * d for place in places], axis=1)
        how = self.rough if depth else self.held
        steps = jnp.split(product(h, beside, 0, 0, how, self.rough), len(places), axis=1)
        pairs = zip(places, steps, strict=True)
        layers = [source[depth] for source in sources]
        return [mixed(place.sources, layers) - step for place, step in pairs]

    def learnt(self) -> tuple[Learnt, Memory]:
        """(What the pairs teach, the memory behind the window)."""
        weights, momentum, base, _ = self.memory
        known = [weights, *([momentum] if self.rule.momentum else [])]
        if self.rule.bases > 1:
            base = select(self.flag("opens"), weights, base)
        bases = [weights if self.rule.bases == 1 else base]
        found = [self.learn(bases[0])]
        if self.rule.bases > 1:
            place = self.place(BORDER, len(self.k))
            border = place._replace(sources=place.sources[: len(known)])
            (h, d), depths = found[0], range(len(weights))
            one = Learnt(h, d, [])
            crossed = tuple(self.stepped(known, one, n, border)[0] for n in depths)
            bases.append(crossed)
            found.append(self.learn(crossed))
        if self.rule.bases > 2:
            known.append(self.start)
            bases.append(self.start)
            found.append(self.learn(self.start))
        h, d = (
            [jnp.concatenate(layers) for layers in zip(*arrays, strict=True)]
            for arrays in zip(*found, strict=True)
        )
        x = Learnt(h, d, known)
        return x, self.behind(x, bases)

    def behind(self, x: Learnt, bases: list) -> Memory:
        """The memory behind the window."""
        rows = (END, MOMENTUM)[: self.rule.states - 1]
        places = [self.place(row, self.count) for row in rows]
        layers = [self.stepped(x.sources, x, n, *places) for n in range(len(bases[0]))]
        new = list(zip(*layers, strict=True))
        base = self.memory.base
        for name, weights in zip(("opened", "crossed", "begun"), bases, strict=False):
            base = select(self.flag(name), weights, base)
        pairs = None if self.memory.pairs is None else (self.kept(self.k), self.kept(self.v))
        return Memory(new[0], new[1] if self.rule.momentum else None, base, pairs)

    def kept(self, x):
        """Of pairs, those in front of the next window."""
        return product(self.chosen, x, 1, 0, self.held, self.held)

    def answers(self, x: Learnt, q):
        """[S, V] to the queries q [S, K], float32."""
        hidden, scales = q, self.scales(self.tokens)
        for n, (h, d) in enumerate(zip(x.entering, x.errors, strict=True)):
            how = self.rough if n else self.held
            near = self.tokens[:, : self.count] * product(hidden, h, 1, 1, how, how)
            read = [self.times(hidden, source[n], n) for source in x.sources]
            y = mixed(scales, read) - product(near, d, 1, 0, self.rough, self.rough)
            hidden = y if n == len(x.errors) - 1 else gelu(y)[0]
        return q + hidden if self.rule.residual else hidden


def mixed(scales, arrays):
    """The sum of arrays times scales."""
    return sum(scale * x for scale, x in zip(scales, arrays, strict=True))


def select(mask, on_true: Layers, on_false: Layers) -> Layers:
    """`where` over layers."""
    return tuple(jnp.where(mask, a, b) for a, b in zip(on_true, on_false, strict=True))


def memory_of(layers, rule: Rule) -> Memory:
    """From the layers of W, Z and W_b, and pairs, in a row."""
    pairs = 2 if rule.front else 0
    depth = (len(layers) - pairs) // rule.states
    found = [tuple(layers[n * depth : (n + 1) * depth]) for n in range(rule.states)]
    momentum = found[1] if rule.momentum else None
    return Memory(found[0], momentum, found[-1], tuple(layers[-2:]) if pairs else None)


def flat(memory: Memory) -> list:
    """The inverse of `memory_of`."""
    return [layer for layers in memory if layers is not None for layer in layers]


def answered(layers, q, k, v, coefficients, start: Layers | None, rule: Rule, like):
    """(answers, layers behind a window) of all heads."""

    def one(layers, q, k, v, coefficients, start):
        window = Window(memory_of(layers, rule), k, v, coefficients, start, rule, like)
        learnt, behind = window.learnt()
        return window.answers(learnt, q), flat(behind)

    return jax.vmap(one)(list(layers), q, k, v, coefficients, start)


def advanced(layers, k, v, coefficients, start: Layers | None, rule: Rule, like) -> list:
    """The layers behind a window alone."""

    def one(layers, k, v, coefficients, start):
        window = Window(memory_of(layers, rule), k, v, coefficients, start, rule, like)
        return flat(window.learnt()[1])

    return jax.vmap(one)(list(layers), k, v, coefficients, start)
