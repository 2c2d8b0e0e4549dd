"""The algebra that linear attention, its gated forms and the delta rules share.

State S [K, V], one matrix per head. What a token does (specification of the family: Yang et al.
2024, arXiv 2412.06464, Eq. 10; 2406.06484, Eq. 3; Kimi Team 2025, arXiv 2510.26692), with P the
state in front of it and an optional log decay g <= 0 for the head or for each key channel:

    S = exp(g) P + k v^T                            linear attention and its gated forms
    S = exp(g) P + beta k (v - P^T p)^T             delta rules; p = exp(g) k unless it is given
    S = exp(g) P + b (P^T a)^T + k v^T              diagonal plus low rank (DPLR)
    y = scale S^T q

Within a chunk of C tokens, with x.D.y the matrix sum_d x_i[d] exp(g_{j+1} + ... + g_i)[d] y_j[d]
for j <= i and x.E.y the same with the sum ending at g_{i-1} and j < i, f_i and e_i these decays
since the chunk's start, and t_j the decay to its end, all tokens are solved at once (the WY or UT
transform). The corrections R are the rows that the delta rule or DPLR adds:

    delta   R = (I + diag(beta) p.E.k)^-1 diag(beta) (v - e p S),       written with b = k
    DPLR    R = (I - a.E.b)^-1 (a.E.k v + e a S)
    y  = f q S + q.D.k v + q.D.b R          (the term in v: not for the delta rule)
    S' = f_C S + (t k)^T v + (t b)^T R      (the same)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.axes import mesh_platform, platform
from memjax.cell import MemoryCell
from memjax.recurrence import (
    accumulator_dtype,
    dot,
    from_chunks,
    memories,
    per_head,
    per_state,
    power_of_two_at_least,
    promote,
    select,
    to_chunks,
)
from memjax.typing import Array, Bool, Float, PyTree


class Terms(NamedTuple):
    """What each token does, in the letters of the module's docstring; None for what it has not.

    q, k, p, a, b: [..., K]; v: [..., V]; g: [...] for the head or [..., K] for each key channel;
    beta: [...].
    """

    q: Array
    k: Array
    v: Array
    g: Array | None = None
    beta: Array | None = None
    p: Array | None = None
    a: Array | None = None
    b: Array | None = None


@dataclasses.dataclass(frozen=True)
class MatrixMemory(MemoryCell):
    """A memory whose state is one matrix [K, V], zero at the start.

    A subclass defines `write`, and `terms` where its inputs are not the family's own letters.

    key_dim, value_dim: K and V of one head.
    scale: factor of the read-out; None for K ** -0.5.
    chunk: tokens in a chunk of the chunked form, a power of two; None for 32 on CPU and 64
    elsewhere. Changes speed only.
    """

    key_dim: int
    value_dim: int
    scale: float | None = None
    chunk: int | None = None

    def __post_init__(self):
        name = type(self).__name__
        if min(self.key_dim, self.value_dim) < 1:
            raise ValueError(f"{name}: key_dim and value_dim must be at least 1; given {self}")
        if self.chunk is not None and (self.chunk < 1 or self.chunk & (self.chunk - 1)):
            raise ValueError(f"{name}: chunk must be a power of two; given {self.chunk}")

    def init_state(self, params: PyTree) -> Float[Array, "K V"]:
        """Zero."""
        return jnp.zeros((self.key_dim, self.value_dim), jnp.float32)

    @property
    def linear(self) -> bool:
        """True: `answer` is a factor."""
        return True

    def terms(self, xs: PyTree) -> Terms:
        """Inputs, with any axes in front, in the family's letters."""
        return Terms(**xs._asdict())

    @property
    def factor(self) -> float:
        """The scale of the read-out."""
        return self.key_dim**-0.5 if self.scale is None else self.scale

    def answer(self, y: Float[Array, "... V"]) -> Float[Array, "... V"]:
        """What S^T q becomes: scale S^T q."""
        return self.factor * y

    def read(self, params: PyTree, state: Float[Array, "K V"], x: PyTree) -> Float[Array, " V"]:
        """The answer to S^T q."""
        return self.answer(dot("k,kv->v", self.terms(x).q, state))

    @per_head
    def chunked(self, params, state, xs, reset, write):
        """The chunk form of the module's docstring."""
        dtype = accumulator_dtype(state, xs)
        state = self.fresh(params, dtype) if state is None else state
        y, new = self.chunks(state, self.terms(promote(xs, dtype)), reset, write)
        return self.answer(y).astype(xs.q.dtype), new

    def pallas(self, params, state, xs, reset, write):
        """`kernel` for tokens that are all written, for all heads."""
        q, k, v, g, beta, p, a, b = self.terms(xs)
        if not self.linear or k.ndim != q.ndim or p is not None:
            return super().pallas(params, state, xs, reset, write)
        heads = memories(params, state, xs)

        def repeated(tree, count=heads):
            return jax.tree.map(lambda x: jnp.repeat(x, count // x.shape[2], axis=2), tree)

        v, g, beta = repeated((v, g, beta))
        if write is not None and write.ndim == 2:
            write = write[..., None]
        count = max(leaf.shape[2] for leaf in (q, k, a, b, write) if leaf is not None)
        q, *keys = repeated((q, k, a, b), count)
        if write is not None:  # a token of zeros changes nothing
            keys = select(repeated(write, count), keys, jax.tree.map(jnp.zeros_like, keys))
            zeros = jax.tree.map(jnp.zeros_like, (v, g, beta))
            v, g, beta = select(repeated(write), (v, g, beta), zeros)
        k, a, b = keys
        given = dict(initial_state=state, reset=reset, scale=self.factor, platform=mesh_platform())
        return self.kernel(Terms(q, k, v, g, beta, p, a, b), given)

    def kernel(self, terms: Terms, given: dict[str, Any]) -> tuple[Array, Array]:
        """That of `pallas_kernels` for linear attention, delta rules and their forms with decays.

        given: what its kernels take besides.
        """
        from pallas_kernels import chunk_delta, chunk_linear

        q, k, v, g, beta, *_ = terms
        if beta is None:
            return chunk_linear(q, k, v, g=g, **given)
        return chunk_delta(q, k, v, beta, g=g, **given)

    @per_state
    def fold(self, params, state, xs, reset, write):
        """See `fold_terms`."""
        dtype = accumulator_dtype(state, xs)
        state = self.fresh(params, dtype) if state is None else state
        return self.fold_terms(state, self.terms(promote(xs, dtype)), reset, write)

    def fold_terms(self, state, terms, reset, write):
        """A [K, K], or its diagonal [K, 1] where it is one, and the final state: the tokens without
        their values make A of the identity, or of ones."""
        (rows, columns), dtype = state.shape, state.dtype
        dense = terms.beta is not None or terms.a is not None
        one = jnp.eye(rows, dtype=dtype) if dense else jnp.ones((rows, 1), dtype)
        nothing = jnp.zeros((*terms.v.shape[:-1], one.shape[1]), dtype)
        terms = terms._replace(v=jnp.concatenate([terms.v, nothing], axis=-1))
        _, new = self.chunks(jnp.concatenate([state, one], axis=1), terms, reset, write)
        return new[:, columns:], new[:, :columns]

    def compose(self, later, earlier):
        """A2 A1 and A2 S1 + S2."""
        (through, state), (before, old) = later, earlier

        def act(rows):
            return through * rows if through.shape[1] == 1 else dot("ij,jk->ik", through, rows)

        return act(before), act(old) + state

    def chunks(self, state, terms, reset, write):
        """S^T q for the terms of every token [T, V], and the final state."""
        length = terms.q.shape[0]
        chunk = self.chunk or (32 if platform() == "cpu" else 64)
        size = min(chunk, power_of_two_at_least(length))
        y, state = scan_chunks(state, *to_chunks((terms, reset, write), size))
        return from_chunks(y, length), state


class Decay(NamedTuple):
    """Decays between the tokens of chunks, zero from one document to another.

    pairs: (x, y), both [N, C, K] -> x.D.y or x.E.y of the module's docstring, [N, C, C].
    since_start: f or e, [N, C, 1 or K].
    """

    pairs: Callable[[Array, Array], Array]
    since_start: Array


def scan_chunks(
    state: Float[Array, "K V"],
    terms: Terms,
    reset: Bool[Array, "N C"] | None,
    write: Bool[Array, "N C"] | None,
) -> tuple[Float[Array, "N C V"], Float[Array, "K V"]]:
    """S^T q of chunks of tokens, leaves [N, C, ...], and the state after the last.

    Only the state and its corrections R go through the loop over chunks; the rest is products of
    all chunks at once.
    """
    if write is not None:  # a token with all but its query zero changes nothing
        zeroed = select(write, terms, jax.tree.map(jnp.zeros_like, terms))
        terms = zeroed._replace(q=terms.q)
    q, k, v, g, *_ = terms
    if g is not None:
        g = jnp.maximum(g, -1e4)  # exp is zero there; -inf would meet 0 in a product
        g = g[..., None] if g.ndim == 2 else g
        terms = terms._replace(g=g)
    decay, ending = decays(g, reset, q), decay_to_end(g, reset, q)
    added = dot("nij,njv->niv", decay.pairs(q, k), v), dot("nik,niv->nkv", ending * k, v)
    corrections = None
    if terms.beta is not None:
        added = jax.tree.map(jnp.zeros_like, added)
        corrections = _delta_rule(terms, decay, reset)
    elif terms.a is not None:
        corrections = _low_rank(terms, reset)

    def chunk(state, inputs):
        through, added, corrections = inputs
        new = through[:, None] * state + added
        if corrections is None:
            return new, (state, None)
        solve, wanted, seen, written = corrections
        rows = dot("ij,jv->iv", solve, wanted - dot("ik,kv->iv", seen, state))
        return new + dot("ik,iv->kv", written, rows), (state, rows)

    if corrections is not None:
        *solved, b = corrections
        corrections = *solved, ending * b
    final, (starts, rows) = lax.scan(
        chunk, state, (decay.since_start[:, -1], added[1], corrections)
    )
    y = added[0] + dot("nik,nkv->niv", decay.since_start * q, starts)
    if corrections is not None:
        y = y + dot("nij,njv->niv", decay.pairs(q, b), rows)
    return y, final


def _delta_rule(terms, decay, reset):
    """M, U, W and b of the corrections R = M (U - W S): [N, C, C], [N, C, V], twice [N, C, K]."""
    _, k, v, g, beta, p, *_ = terms
    if p is None:
        p = k  # the error against the decayed state
    else:
        decay = decays(g, reset, p, before=True)
    solve = unit_lower_inverse(beta[..., None] * jnp.tril(decay.pairs(p, k), -1))
    return solve * beta[:, None, :], v, decay.since_start * p, k


def _low_rank(terms, reset):
    """The same for DPLR."""
    _, k, v, g, _, _, a, b = terms
    decay = decays(g, reset, a, before=True)
    solve = unit_lower_inverse(-decay.pairs(a, b))
    return solve, dot("nij,njv->niv", decay.pairs(a, k), v), -decay.since_start * a, b


def decays(
    g: Float[Array, "N C *K"] | None,
    reset: Bool[Array, "N C"] | None,
    like: Float[Array, "N C K"],
    before: bool = False,
) -> Decay:
    """D and f, or E and e with `before`.

    g: [N, C, 1] for the head, [N, C, K] for each channel, None for no decay. Every exponent is a
    sum of the terms between two tokens, not a difference of two long sums, so that a strong decay
    elsewhere in the chunk costs no precision; all are <= 0, and masks come before exp.
    """
    chunks, size = like.shape[:2]
    last = _tril(size, before)
    visible, first = last[None], jnp.ones((1, size, 1), bool)
    if reset is not None:
        document = jnp.cumsum(reset, axis=1)
        visible = visible & (document[:, :, None] == document[:, None, :])
        first = (document == 0)[..., None]
    if g is None:
        since_start = jnp.broadcast_to(first, (chunks, size, 1)).astype(like.dtype)
        return Decay(lambda x, y: dot("nik,njk->nij", x, y) * visible, since_start)
    since_start = _exp(first, dot("il,nlk->nik", last, g))
    if g.shape[-1] == 1:
        after = jnp.where(_tril(size, True)[None], g, 0)  # g_l where l > j
        between = _exp(visible, dot("il,nlj->nij", last, after))
        return Decay(lambda x, y: dot("nik,njk->nij", x, y) * between, since_start)
    return Decay(lambda x, y: _channel_pairs(x, y, g, before) * visible, since_start)


def decay_to_end(g, reset, like) -> Float[Array, "N C *K"]:
    """t: the decay from each token to the end of its chunk, [N, C, 1 or K]."""
    chunks, size = like.shape[:2]
    same = jnp.ones((chunks, size, 1), bool)
    if reset is not None:
        document = jnp.cumsum(reset, axis=1)
        same = (document == document[:, -1:])[..., None]
    if g is None:
        return same.astype(like.dtype)
    return _exp(same, dot("lj,nlk->njk", _tril(size, True), g))


def _channel_pairs(x, y, g, before: bool) -> Float[Array, "N C C"]:
    """x.D.y or x.E.y within chunks for decays per channel; not masked by documents.

    Two neighbouring blocks of tokens are joined by the decays from the first one's tokens to its
    end and from the second one's start to its tokens, neither above 1; blocks double from 1 to C.
    """
    chunks, size, width = x.shape
    pairs = jnp.sum(x * y, axis=-1)[..., None, None] * (not before)
    for length in (2**i for i in range(size.bit_length() - 1)):
        halves = (a.reshape(chunks, -1, 2, length, width) for a in (x, y, g))
        (_, x2), (y1, _), (g1, g2) = (jnp.moveaxis(a, 2, 0) for a in halves)
        y1 = y1 * jnp.exp(dot("lj,nblk->nbjk", _tril(length, True), g1))
        x2 = x2 * jnp.exp(dot("il,nblk->nbik", _tril(length, before), g2))
        upper, lower = pairs[:, 0::2], pairs[:, 1::2]
        rows = (upper, jnp.zeros_like(upper)), (dot("nbik,nbjk->nbij", x2, y1), lower)
        pairs = jnp.concatenate([jnp.concatenate(row, axis=-1) for row in rows], axis=-2)
    return pairs[:, 0]


def _tril(size: int, strict: bool) -> Bool[Array, "C C"]:
    return jnp.tril(jnp.ones((size, size), bool), -1 if strict else 0)


def _exp(mask, exponent):
    return jnp.exp(jnp.where(mask, exponent, -jnp.inf))


def unit_lower_inverse(lower: Float[Array, "*N C C"]) -> Float[Array, "*N C C"]:
    """(I + lower)^-1 for strictly lower triangular matrices, C a power of two.

    Inverts the two halves of the diagonal and joins them: with inverses X and Z of the diagonal
    blocks and L between them, the block below the diagonal is -Z L X. Exact for equal keys; no
    matrix powers, whose terms grow without bound, and no LAPACK call, which can deadlock two CPU
    threads in jax 0.10.
    """
    size = lower.shape[-1]
    if size & (size - 1):
        raise ValueError(f"unit_lower_inverse: C must be a power of two; given {size}")
    if size == 1:  # jax cannot batch the derivative below where the answer is a constant
        return jnp.ones_like(lower)
    return _inverse(lower)


@jax.custom_jvp
def _inverse(lower: Float[Array, "*N C C"]) -> Float[Array, "*N C C"]:
    size = lower.shape[-1]
    if size <= 16:
        return _small_inverse(lower)
    half = size // 2
    first, second = lower[..., :half, :half], lower[..., half:, half:]
    first, second = _inverse(jnp.stack([first, second]))
    join = -dot("...ij,...jk,...kl->...il", second, lower[..., half:, :half], first)
    above = jnp.zeros_like(join)
    return jnp.block([[first, above], [join, second]])


def _small_inverse(lower: Float[Array, "*N C C"]) -> Float[Array, "*N C C"]:
    """The same by masks: X <- X - X L X doubles the inverted blocks, L what joins two of them."""
    size = lower.shape[-1]
    row, column = jnp.arange(size)[:, None], jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    for bits in range(size.bit_length() - 1):
        pair = (row >> (bits + 1) == column >> (bits + 1)) & (row >> bits != column >> bits)
        join = jnp.where(pair, lower, 0)
        inverse = inverse - dot("...ij,...jk,...kl->...il", inverse, join, inverse)
    return inverse


@_inverse.defjvp
def _(primals, tangents):
    inverse = _inverse(*primals)
    change = jnp.tril(tangents[0], -1)
    return inverse, -dot("...ij,...jk,...kl->...il", inverse, change, inverse)
