"""The hybrid block: sliding-window attention and a recurrent long-term memory in one mixer.

gate         y = s * attention(x) + (1 - s) * memory(x),   s = sigmoid(W_s x + b) per channel
parallel     y = attention(x) + memory(x)
sequential   h = memory(x);  y = h + attention(norm(x + h))
window_exit  y = attention(x) + memory(x, delayed): token t writes what the memory keeps of token
             t - W, which leaves the window, and asks with its own query

The window holds the last tokens exactly, the memory holds the rest in a state of fixed size (De et
al. 2024, arXiv 2402.19427; Ren et al. 2024, arXiv 2406.07522; parallel with a gate: Behrouz et
al. 2025, arXiv 2501.00663, Sec. 4.2). The gate, a convex sum per channel that starts at one half,
is our choice. Any two mixers may stand in: `hybrid(sliding_window, gated_delta_net)`.

window_exit is the Artificial Hippocampus Network (2025, arXiv 2510.07318): window, sinks and memory
cover every position once, and the memory's output projection starts at zero, so that the layer
starts as the window alone. W is without the sinks, the paper's with them. The memory has
projections of its own, our choice; there it takes the window's queries, keys and values. What a
mixer adds beside its memory's answers (`Mixer.beside`) is of the present token. The state has W
times what the memory is given of a token, besides the window's own; decoding moves it at every
token.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from memjax.cell import run
from memjax.cells.sliding_window import SlidingWindowMixer
from memjax.nn.layers import Context, Dense, Norm
from memjax.nn.mixer import Mixer
from memjax.recurrence import lags
from memjax.registry import BlockSpec, is_cell, register
from memjax.typing import Array, DTypeLike, Float, PyTree, fields

COMBINE = ("gate", "parallel", "sequential", "window_exit")


class Hybrid(nn.Module):
    """(x, state, ctx) -> (y, state, ctx); the state is {"attention": ..., "memory": ...}, and with
    window_exit also {"window": what the memory will be given of the window's tokens}.

    inner: makers of the attention mixer and of the memory mixer, called with `name`.
    combine: "gate", "parallel", "sequential" or "window_exit". norm: "rms" or "layer", in front of
    the second mixer of "sequential".
    """

    dim: int
    inner: tuple[Callable[..., nn.Module], ...] = ()
    std: float = 0.02
    out_scale: float = 1.0
    combine: str = "gate"
    norm: str = "rms"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x, state, ctx):
        if self.combine not in COMBINE:
            raise ValueError(f"combine {self.combine!r}: allowed are {', '.join(COMBINE)}")
        make_attention, make_memory = self.inner
        attention = make_attention(name="attention")
        state = {"attention": None, "memory": None} if state is None else state
        if self.combine == "window_exit":
            memory = make_memory(name="memory", out_scale=0.0)
            check_exit(attention, memory)
            near, new, ctx = attention(x, state["attention"], ctx)
            held, kept, ctx = behind_window(memory, attention, x, state, ctx)
            return near + held, {"attention": new, **kept}, ctx
        memory = make_memory(name="memory")
        held, kept, ctx = memory(x, state["memory"], ctx)
        seen = x
        if self.combine == "sequential":
            seen = Norm(self.norm, name="norm")(x + held)
        near, new, ctx = attention(seen, state["attention"], ctx)
        if self.combine == "gate":
            options = dict(std=self.std, bias=True, dtype=self.dtype)
            share = jax.nn.sigmoid(Dense((self.dim,), ("mlp",), **options, name="gate")(x))
            near, held = share * near, (1 - share) * held
        return near + held, {"attention": new, "memory": kept}, ctx


def check_exit(attention: nn.Module, memory: nn.Module) -> None:
    """ValueError where nothing leaves the attention, or the memory cannot be opened."""
    if not isinstance(attention, SlidingWindowMixer):
        given = type(attention).__name__
        raise ValueError(
            "combine 'window_exit' needs sliding_window in front, whose tokens leave; given "
            f"{given}"
        )
    if not is_cell(memory):
        raise ValueError(
            "combine 'window_exit' needs a memory cell behind the window; given "
            f"{type(memory).__name__}, a block. Use combine 'gate', 'parallel' or 'sequential'"
        )
    if memory.make_cell().routes:
        raise ValueError(
            f"combine 'window_exit': {type(memory).__name__} chooses what a token writes together "
            "with its query, which is another token's here. Use another memory or combine"
        )


def behind_window(
    memory: Mixer, attention: SlidingWindowMixer, x: Array, state: PyTree, ctx: Context
) -> tuple[Array, PyTree, Context]:
    """The memory's part of the layer: it is written with the tokens that leave the window and are
    no sinks."""
    xs, kept, new = memory.inputs(x, state["memory"] or {}, ctx)
    written = {
        name: getattr(xs, name)
        for name, field in fields(memory.cell.inputs).items()
        if not field.asks
    }
    window = state.get("window") or {
        name: jnp.zeros((x.shape[0], attention.window, *leaf.shape[2:]), leaf.dtype)
        for name, leaf in written.items()
    }
    pairs = {name: delayed(leaf, window[name], ctx) for name, leaf in written.items()}
    write = ctx.position >= attention.window + attention.sinks
    y, held = run(
        memory.cell,
        memory.weights(kept),
        xs._replace(**{name: leaving for name, (leaving, _) in pairs.items()}),
        state=(state["memory"] or {}).get("memory"),
        reset=ctx.reset,
        write=write if ctx.write is None else write & ctx.write,
        implementation=memory.implementation,
        differentiate=ctx.differentiate,
    )
    window = {name: tail for name, (_, tail) in pairs.items()}
    new = {"memory": {**new, "memory": held}, "window": window}
    return memory.outputs(y, kept), new, memory.publish(kept, ctx)


def delayed(
    leaf: Float[Array, "B T ..."], tail: Float[Array, "B n ..."], ctx: Context
) -> tuple[Float[Array, "B T ..."], Float[Array, "B n ..."]]:
    """What was written n tokens before each token, zero where the document is shorter, and the new
    tail."""
    flat, before = (a.reshape(*a.shape[:2], -1) for a in (leaf, tail))
    (past,), after = lags(flat, before, ctx.reset, ctx.write, [tail.shape[1]])
    return past.reshape(leaf.shape), after.reshape(tail.shape)


register(
    BlockSpec(
        name="hybrid",
        mixer=Hybrid,
        arguments=(2,),
        defaults=("sliding_window", "gated_delta_net"),
        paper="De et al. 2024, arXiv 2402.19427; Behrouz et al. 2025, arXiv 2501.00663",
    )
)
