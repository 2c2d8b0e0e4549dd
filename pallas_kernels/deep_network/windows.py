"""What the steps of a window do, as numbers that a kernel multiplies arrays by.

A window is at most C = `frozen_chunk` tokens of a sequence, so that it crosses one border of the
running document's frozen chunks at most, and documents that begin in it learn from the start. With
the errors of its pairs at up to three bases (`Rule.bases`), the one that runs on, the weights at
the border and the start, all that a window makes of the weights W and the momentum Z in front of it
and of the start S is linear in them and in the gradients N_i of the pairs i at a base:

    W_t = alpha_t W + f_t Z + phi_t S - sum_i P[t, i] N_i       Z_t = mu_t Z - sum_i H[t, i] N_i

Its rows are alpha, f, phi and P of each token, then of the window's end, mu and H of the end, and
alpha, f and P of the border. With A[t, j] the decays from token j to token t that tokens of the
window have, B those of the momentum and R[t, i] = r_t[age of the pair], up to the border

    P = A B R   H = B R   alpha_t, mu_t: all decays in front of t   f = A mu

and behind it the same from the border on, where W and Z are put in with their own rows. All decays
are those of written tokens, each exponent the sum of just its terms.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.decays import LOWEST
from pallas_kernels.deep_memory.reference import dot

TILE = 16  # rows of bfloat16
EXTRA = 8  # rows behind those of tokens: END, MOMENTUM, BORDER, FLAGS and zeros
END, MOMENTUM, BORDER, FLAGS = range(4)


class Rule(NamedTuple):
    """What is learned. momentum: whether steps have it. context: c. loss: "l2" or "dot". residual:
    whether the network adds its input. bases: that the pairs of a window can have, 1 where each
    window is a frozen chunk of one document, 2 where others open in it, 3 where documents begin in
    it too."""

    momentum: bool
    context: int
    loss: str
    residual: bool
    bases: int

    @property
    def states(self) -> int:
        """Of W, Z and W_b, those that are there."""
        return 3 if self.momentum else 2

    @property
    def sources(self) -> int:
        """Of W, Z and the start, those that are there."""
        return self.states - 1 + (self.bases == 3)

    @property
    def front(self) -> int:
        """F, rows of the c - 1 pairs in front of a window, in whole tiles."""
        return self.context - 1 + (1 - self.context) % TILE

    def columns(self, rows: int) -> int:
        """Of `coefficients`; rows: of a window's tokens."""
        return self.bases * (rows + self.front) + self.sources


class Tokens(NamedTuple):
    """Of a window of S rows, as [..., S]; place, number: [...], in front of it.

    g, m: log decays, m None without momentum. rates: [..., S, c]. written, first: bool, whether a
    token is written, and whether a document begins with it. place: written tokens of the frozen
    chunk that runs on; number: pairs of its document, at most c - 1.
    """

    g: jax.Array
    m: jax.Array | None
    rates: jax.Array
    written: jax.Array
    first: jax.Array
    place: jax.Array
    number: jax.Array


def coefficients(tokens: Tokens, rule: Rule, frozen_chunk: int):
    """[B, H, N, S + EXTRA + F, n] of windows [B, H, N]: columns of the pairs' rows for each base,
    then of the sources. FLAGS has `Flags` instead; the last F rows choose the pairs in front of the
    next window."""
    one = partial(_of_window, rule=rule, frozen_chunk=frozen_chunk)
    return jax.vmap(jax.vmap(jax.vmap(one)))(tokens)


def decays(g, use, visible):
    """exp(g_{j+1} + .. + g_t) [S, S] where visible, and exp of all that t sees [S]; of the tokens
    of `use`."""
    g = jnp.where(use, jnp.maximum(g, LOWEST), 0)
    lower = jnp.tril(jnp.ones((len(g), len(g)), bool))
    after = jnp.where(lower, 0, g)  # [j, l], l > j
    through = jnp.where(visible, dot("jl,tl->tj", after, lower), -jnp.inf)
    return jnp.exp(through), jnp.exp(dot("tj,j->t", visible, g))


class _Pairs(NamedTuple):
    """The pairs of a window, [tokens | in front, oldest first | none], [n]. rank: how many of their
    document are in front of each, counted from the window's start. document: 0 for the one that
    runs on, then counted. there: whether a pair is one to learn from."""

    rank: jax.Array
    document: jax.Array
    there: jax.Array

    def age(self, rank, document):
        """How many pairs behind each of its document a token of this rank [m] is; -1: none."""
        seen = self.there & (document[:, None] == self.document)
        return jnp.where(seen, rank[:, None] - self.rank, -1)


def _pairs(x: Tokens, rank, document, rule: Rule) -> _Pairs:
    older, more = rule.context - 1, rule.front - rule.context + 1
    ahead = jnp.arange(-older, more)  # ranks of those in front
    there = (ahead >= -x.number) & (ahead < 0)
    running = jnp.zeros_like(ahead, document.dtype)
    of_all = (rank, ahead), (document, running), (x.written, there)
    return _Pairs(*(jnp.concatenate(two) for two in of_all))


def _kept(pairs: _Pairs, rank, document, written, rule: Rule, columns: int):
    """Rows [F, columns] with a one where a pair is among the last c - 1, in the order of those in
    front."""
    age = pairs.age(rank[-1:] + written[-1:], document[-1:])  # of the token that comes next
    place = jnp.arange(rule.front)[:, None]
    rows = ((age == rule.context - 1 - place) & (age > 0)).astype(jnp.float32)
    return jnp.pad(rows, ((0, 0), (0, columns - rows.shape[1])))


class _Pass(NamedTuple):
    """Rows [S, ..] of what tokens learn in one pass; f, mu and H None without momentum."""

    alpha: Any
    paths: Any
    f: Any
    mu: Any
    h: Any


def _passed(x: Tokens, rates, use, visible) -> _Pass:
    """Of the tokens of `use`."""
    fading, alpha = decays(x.g, use, visible)
    fading = fading * use  # others add no momentum to the weights
    h = jnp.where(use[:, None], rates, 0)
    if x.m is None:
        return _Pass(alpha, dot("tj,ji->ti", fading, h), None, None, None)
    pushing, mu = decays(x.m, use, visible)
    h = dot("tj,ji->ti", pushing, h)
    return _Pass(alpha, dot("tj,ji->ti", fading, h), dot("tj,j->t", fading, mu), mu, h)


def _rows(rule: Rule, of_bases, of_sources):
    """[S, n] from [S, pairs] of each base and [S] of W, Z and the start; None is zero."""
    zero = jax.tree.map(jnp.zeros_like, (next(a for a in of_bases if a is not None), of_sources[0]))
    there = (True, rule.momentum, rule.bases == 3)
    of_bases = [zero[0] if a is None else a for a in of_bases[: rule.bases]]
    of_sources = [a for a, is_there in zip(of_sources, there, strict=True) if is_there]
    columns = [zero[1] if a is None else a for a in of_sources]
    return jnp.concatenate([*of_bases, *(a[:, None] for a in columns)], axis=1)


def _last(rows):
    return jax.tree.map(lambda a: a[-1:], rows)


def _of_window(x: Tokens, rule: Rule, frozen_chunk: int):
    """`coefficients` of one."""
    one = x.written.astype(jnp.int32)
    rank, document = jnp.cumsum(one) - one, jnp.cumsum(x.first)
    live = document == 0
    before = live & (x.place + rank < frozen_chunk)
    first, second = x.written & before, x.written & ~before
    pairs = _pairs(x, rank, document, rule)
    age, of_running = pairs.age(rank, document), pairs.document == 0
    rates = sum(jnp.where(age == n, x.rates[:, n : n + 1], 0) for n in range(rule.context))
    lower = jnp.tril(jnp.ones((len(rank), len(rank)), bool))
    a = _passed(x, rates, first, lower)
    rows, end = _rows(rule, (a.paths, None, None), (a.alpha, a.f, None)), _last(a)
    border = at_end = rows[-1:]
    momentum = None
    if rule.momentum:
        zero = jnp.zeros_like(end.mu)
        momentum = _rows(rule, (end.h, None, None), (zero, end.mu, None))
    if rule.bases > 1:
        b = _passed(x, rates, second, lower & (document[:, None] == document))

        def learnt(paths, fresh):
            """What is not learnt at the base that runs on."""
            own, later = (jnp.where(which, paths, 0) for which in (of_running, ~of_running))
            return _rows(rule, (None, own, later), (jnp.zeros_like(fresh), None, fresh))

        behind = (b.alpha * live)[:, None] * border + learnt(b.paths, jnp.where(live, 0, b.alpha))
        if rule.momentum:
            behind = behind + (b.f * live)[:, None] * momentum
            mu = b.mu[-1:, None] * live[-1]
            momentum = mu * momentum + learnt(b.h[-1:], jnp.zeros_like(b.mu[-1:]))
        rows, at_end = jnp.where(before[:, None], rows, behind), behind[-1:]
    extra = [at_end, jnp.zeros_like(border) if momentum is None else momentum, border]
    extra.append(_flags(x, live, first, second, border))
    extra.append(jnp.zeros((EXTRA - len(extra), rows.shape[1]), rows.dtype))
    if rule.front:
        extra.append(_kept(pairs, rank, document, one, rule, rows.shape[1]))
    return jnp.concatenate([rows, *extra])


class Flags(NamedTuple):
    """Numbers 0 or 1. opens: whether the base that runs on is W. The base behind the window, unless
    it is the one in front: that of its first tokens, the border's weights, the start."""

    opens: jax.Array
    opened: jax.Array
    crossed: jax.Array
    begun: jax.Array


def _flags(x: Tokens, live, first, second, like):
    """The row of `Flags`."""
    crossed = jnp.any(second & live)
    opened = jnp.any(first) & ~crossed
    runs = live[-1]
    flags = Flags(x.place == 0, runs & opened, runs & crossed, ~runs)
    row = jnp.stack(flags).astype(like.dtype)[None]
    return jnp.pad(row, ((0, 0), (0, like.shape[1] - len(flags))))
