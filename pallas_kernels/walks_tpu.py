"""Recurrences without products on TPU: one walk over tokens, the state in registers.

A block is C tokens of W channels, as they lie in [B, T, D]. A row of 1024 channels is one whole
register, loaded by strides from 8 tiles, so that a token costs no more than any other 1024 numbers.
Rows of bfloat16 cannot be loaded alone: `ROWS` of them are widened at a time.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import MIB

ROWS = 32  # tokens of a trip, side by side in the compiler's schedule
TOKENS, CHANNELS = 256, 1024  # of a block, at most
ROOM = 12 * MIB  # of VMEM for the blocks of the backward kernel: a v4 has 16


def block(rule, arrays, channels: int) -> tuple[int, int]:
    """Tokens and channels of a block, the largest that fit."""
    width = max(n for n in range(128, CHANNELS + 1, 128) if channels % n == 0)
    y = arrays[0].dtype.itemsize
    buffered = 2 * sum(a.dtype.itemsize for a in arrays) + y  # tokens, their gradients, dy
    number = width * (2 * buffered + 4 * len(rule.fresh))  # bytes of a token
    chunk = min(TOKENS, arrays[0].shape[1] + -arrays[0].shape[1] % ROWS)
    while chunk > ROWS and chunk * number > ROOM:
        chunk = chunk // 2 + -(chunk // 2) % ROWS
    return chunk, width


class Rows:
    """The rows of a block [C, W], `ROWS` at a time, as float32. wide: float32 [ROWS, W] in VMEM for
    what is narrower, None for float32."""

    def __init__(self, ref, wide=None):
        self.ref, self.wide = ref, wide

    def at(self, n):
        """Goes to the n-th ones."""
        self.start = pl.multiple_of(n * ROWS, ROWS)

    def fetch(self):
        if self.wide is not None:
            self.wide[...] = self.ref[pl.ds(self.start, ROWS), :].astype(jnp.float32)

    def store(self):
        if self.wide is not None:
            self.ref[pl.ds(self.start, ROWS), :] = self.wide[...].astype(self.ref.dtype)

    def row(self, t):
        """A view of one of them, [1, W]."""
        ref, start = (self.ref, self.start) if self.wide is None else (self.wide, 0)
        return ref.at[pl.ds(start + t, 1)]


def walk(step, state, given, made, *, backward=False, unroll):
    """The state behind a block; step(state, rows of given) -> (state, rows of made)."""
    groups = given[0].ref.shape[0] // ROWS

    def group(n, state):
        for rows in (*given, *made):
            rows.at(groups - 1 - n if backward else n)
        for rows in given:
            rows.fetch()

        def token(n, state):
            t = ROWS - 1 - n if backward else n
            state, new = step(state, load(rows.row(t) for rows in given))
            store((rows.row(t) for rows in made), new)
            return state

        state = lax.fori_loop(0, ROWS, token, state, unroll=unroll)
        for rows in made:
            rows.store()
        return state

    return lax.fori_loop(0, groups, group, state)


def load(refs):
    return tuple(ref[...] for ref in refs)


def store(refs, values):
    for ref, x in zip(refs, values, strict=True):
        ref[...] = x


def begin(carried, given):
    """The blocks of what leaves at the end carry the state from block to block."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        store(carried, load(given))


def forward_kernel(tokens, initial, y, final, bounds, *, rule, unroll):
    """Lists of `Rows` of tokens and y, and of refs [1, W] of states."""
    begin(final, initial)
    state = load(final)
    if bounds:
        store(bounds, state)

    def step(state, token):
        state, y = rule.step(state, token)
        return state, (y,)

    store(final, walk(step, state, tokens, y, unroll=unroll))


def backward_kernel(tokens, dy, bounds, dfinal, dtokens, dinitial, states, *, rule, unroll):
    """The same for gradients. states: `Rows` of those in front of the tokens, made again."""
    begin(dinitial, dfinal)

    def again(state, token):
        return rule.step(state, token)[0], state

    def back(slopes, given):
        token, (dy, *state) = given[: len(tokens)], given[len(tokens) :]
        return rule.back(slopes, tuple(state), token, dy)

    walk(again, load(bounds), tokens, states, unroll=unroll)
    given = [*tokens, *dy, *states]
    slopes = walk(back, load(dinitial), given, dtokens, backward=True, unroll=unroll)
    store(dinitial, slopes)


def forward(static, tokens, state, *, keep):
    """(y, final state, the states in front of the blocks [B, N, 1, D] where they are kept)."""
    shape, first = jax.ShapeDtypeStruct, tokens[0]
    batch, length, channels = first.shape
    kept = (batch, length // static.chunk, 1, channels)
    in_front = [a[:, None] for a in state]
    (y,), final, bounds = run(
        forward_kernel,
        static,
        given=[("tokens", tokens), ("state", in_front)],
        made=[
            ("tokens", [shape(first.shape, first.dtype)]),
            ("state", [shape(a.shape, a.dtype) for a in in_front]),
            ("bounds", [shape(kept, jnp.float32) for _ in state if keep]),
        ],
    )
    return y, tuple(a[:, 0] for a in final), bounds


def backward(static, tokens, bounds, dy, dfinal):
    """The gradients of the tokens and of the state in front of them."""
    behind = [a[:, None] for a in dfinal]
    like = lambda arrays: [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]  # noqa: E731
    dtokens, dinitial = run(
        backward_kernel,
        static,
        given=[("tokens", tokens), ("tokens", [dy]), ("bounds", bounds), ("state", behind)],
        made=[("tokens", like(tokens)), ("state", like(behind))],
        states=len(bounds),
    )
    return tuple(dtokens), tuple(a[:, 0] for a in dinitial)


def is_narrow(name, a) -> bool:
    """Whether an array has rows that have to be widened."""
    return name == "tokens" and a.dtype != jnp.float32


def by_group(groups, refs, wide):
    """Lists of the refs of groups of arrays, as `Rows` where they are of tokens."""
    refs, wide = iter(refs), iter(wide)
    lists = []
    for name, arrays in groups:
        taken = [(next(refs), next(wide) if is_narrow(name, a) else None) for a in arrays]
        lists.append([Rows(*pair) if name == "tokens" else pair[0] for pair in taken])
    return lists


def run(kernel, static, given, made, states=None):
    """Runs a kernel over a grid [batch, channels, blocks of tokens] and returns lists like `made`.

    given, made: lists of arrays, or their shapes, each with the name of its blocks. states: how
    many arrays [C, W] of states the kernel has in VMEM, for one that walks in reverse.
    """
    chunk, width = static.chunk, static.width
    (batch, length, channels), backward = given[0][1][0].shape, states is not None
    chunks = length // chunk
    at = (lambda n: chunks - 1 - n) if backward else lambda n: n
    spec = {
        "tokens": pl.BlockSpec((None, chunk, width), lambda b, d, n: (b, at(n), d)),
        "state": pl.BlockSpec((None, 1, width), lambda b, d, n: (b, 0, d)),
        "bounds": pl.BlockSpec((None, None, 1, width), lambda b, d, n: (b, at(n), 0, d)),
    }
    groups = [(name, list(arrays)) for name, arrays in (*given, *made)]
    narrow = sum(is_narrow(name, a) for name, arrays in groups for a in arrays)
    wide = pltpu.VMEM((ROWS, width), jnp.float32)
    again = pltpu.VMEM((chunk, width), jnp.float32)

    def body(*refs):
        lists = by_group(groups, refs, refs[len(refs) - narrow :])
        states_again = refs[len(refs) - narrow - (states or 0) : len(refs) - narrow]
        if backward:
            lists.append(list(map(Rows, states_again)))
        # Interpreted, unrolled loops would take minutes to compile.
        kernel(*lists, rule=static.rule, unroll=not static.interpret)

    def specs(groups):
        return [spec[name] for name, arrays in groups for _ in arrays]

    found = iter(
        pl.pallas_call(
            body,
            grid=(batch, channels // width, chunks),
            in_specs=specs(given),
            out_specs=specs(made),
            out_shape=[a for _, arrays in made for a in arrays],
            scratch_shapes=[again] * (states or 0) + [wide] * narrow,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            name=f"{static.rule.name}_{'backward' if backward else 'forward'}",
            interpret=static.interpret,
        )(*(a for _, arrays in given for a in arrays))
    )
    return [[next(found) for _ in arrays] for _, arrays in made]
