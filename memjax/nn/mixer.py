"""Token mixers: a memory cell between two halves, `inputs` and `outputs`."""

from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memjax.axes import constrain
from memjax.cell import MemoryCell, run
from memjax.nn.layers import Context, Dense, LowRank, Norm, ShortConvolution, l2_normalise
from memjax.typing import Array, DTypeLike, Float, PRNGKeyArray, PyTree, Shaped

GATES = {"none": None, "silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


class Mixer(nn.Module):
    """A layer that mixes tokens through a memory: (x, state, ctx) -> (y, state, ctx).

    A subclass defines `make_cell` and the two halves, which are public so that wrappers and
    blocks can stand between them. The state is a dict: what `inputs` carries (a convolution's
    tail) and "memory", the cell's own. None is the initial state.

    dim: width D of the model. std: standard deviation of the weights; that of the output
    projection is std * out_scale. dtype: of the computation; parameters are float32.
    implementation: the form of the cell, as in `memjax.run`.
    """

    dim: int
    # Whether `publish` adds to ctx.losses, what the trainer adds to its loss.
    reports_loss: ClassVar[bool] = False
    # Parameters of what `inputs` keeps for `outputs`, where that is more than the layer's input.
    beside: ClassVar[tuple[str, ...]] = ()
    # The name of what `offer` gives.
    offers: ClassVar[str] = "memory"

    std: float = 0.02
    out_scale: float = 1.0
    dtype: DTypeLike = jnp.float32
    implementation: str | tuple[str, ...] | None = None

    def make_cell(self) -> MemoryCell:
        """The memory between the two halves."""
        raise NotImplementedError(f"{type(self).__name__} must define make_cell")

    def setup(self):
        """Makes the cell and its weights; a subclass calls it before it makes its own layers."""
        self.cell = self.make_cell()
        weights = jax.eval_shape(lambda: self.cell.init_params(jax.random.key(0), self.memories))
        self.memory = {}
        if jax.tree.leaves(weights):
            self.memory = self.param("memory", self._init_memory)

    def _init_memory(self, key: PRNGKeyArray) -> PyTree:
        def name_axes(leaf):
            return nn.LogicallyPartitioned(leaf, ("heads", *(None,) * (leaf.ndim - 1)))

        return jax.tree.map(name_axes, self.cell.init_params(key, self.memories))

    @property
    def memories(self) -> int:
        """H, the number of memories."""
        raise NotImplementedError(f"{type(self).__name__} must define memories")

    def inputs(
        self, x: Float[Array, "B T D"], state: dict, ctx: Context
    ) -> tuple[PyTree, PyTree, dict]:
        """The cell's inputs, leaves [B, T, h, ...]; what `outputs` needs of them; the new state."""
        raise NotImplementedError(f"{type(self).__name__} must define inputs")

    def outputs(self, y: Array, kept: PyTree) -> Float[Array, "B T D"]:
        """What the layer gives, from the memory's answers y [B, T, H, ...] and what was kept."""
        raise NotImplementedError(f"{type(self).__name__} must define outputs")

    def weights(self, kept: PyTree) -> PyTree:
        """The cell's own weights, leaves [H, ...]."""
        del kept
        return self.memory

    def readout(self, y: Array, kept: PyTree) -> Array:
        """The memory's answers in front of the layer's norm, gate and projection."""
        del kept
        return y

    def offer(self, xs: PyTree, y: Array, kept: PyTree, carried: PyTree | None) -> PyTree:
        """What the block `published` hands to later layers. carried: the memory's state in front
        of these tokens."""
        del xs, carried
        return self.readout(y, kept)

    def published(self, batch: int, length: int, carried: bool) -> dict[str, PyTree]:
        """Name -> shapes and dtypes of what this layer has for later ones, for `length` tokens of
        `batch` sequences; see `publish`. carried: whether the layer is given a state."""
        del batch, length, carried
        return {}

    def publish(self, kept: PyTree, ctx: Context) -> Context:
        """The context for later layers."""
        del kept
        return ctx

    def __call__(
        self, x: Float[Array, "B T D"], state: dict | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], dict, Context]:
        _, y, kept, new = self.answers(x, {} if state is None else state, ctx)
        return self.outputs(y, kept), new, self.publish(kept, ctx)

    def consult(self, x: Float[Array, "B T D"], state: dict, ctx: Context) -> Float[Array, "B T D"]:
        """What the layer gives for tokens that only read, as if none were written in this call; it
        costs no more than reading."""
        silent = ctx.replace(write=jnp.zeros(x.shape[:2], bool))
        xs, kept, _ = self.inputs(x, state, silent)
        y, _ = self.cell.ask(self.weights(kept), state["memory"], xs, ctx.reset, None)
        return self.outputs(y, kept)

    def answers(
        self, x: Float[Array, "B T D"], state: dict, ctx: Context
    ) -> tuple[PyTree, Array, PyTree, dict]:
        """The cell's inputs, its answers, what `outputs` needs besides, and the new state."""
        xs, kept, new = self.inputs(x, state, ctx)
        xs = jax.tree.map(by_head, xs)
        y, memory = run(
            self.cell,
            self.weights(kept),
            xs,
            state=state.get("memory"),
            reset=ctx.reset,
            write=ctx.write,
            implementation=self.implementation,
            differentiate=ctx.differentiate,
        )
        return xs, y, kept, {**new, "memory": memory}


def by_head(leaf: Shaped[Array, "B T h *rest"]) -> Shaped[Array, "B T h *rest"]:
    """An input of a cell, split over devices by rows and heads."""
    return constrain(leaf, "batch", "seq", "heads", *(None,) * (leaf.ndim - 3))


def convolve(
    convolution: ShortConvolution,
    parts: Sequence[Float[Array, "B T ..."]],
    state: dict,
    ctx: Context,
) -> tuple[tuple[Float[Array, "B T ..."], ...], dict]:
    """One short convolution over the channels of all parts, and its entry of the new state."""
    flat = [part.reshape(*part.shape[:2], -1) for part in parts]
    joined, tail = convolution(jnp.concatenate(flat, axis=-1), state.get("convolution"), ctx)
    borders = np.cumsum([part.shape[-1] for part in flat])[:-1]
    split = jnp.split(joined, borders, axis=-1)
    shaped = (a.reshape(part.shape) for a, part in zip(split, parts, strict=True))
    return tuple(shaped), {"convolution": tail}


class ProjectionMixer(Mixer):
    """The mixer of the linear and delta family: projections, short convolution, norm and gate.

    q, k, v = SiLU(convolution(W x)), bias-free; the answers are normalised per head, gated by
    gate(W_g x) and projected back (Yang et al. 2024, arXiv 2406.06484, Sec. 3.4).

    value_heads: H, a multiple of `heads`, which counts queries and keys: the heads of a group
    share them and have values, gates and memories of their own; None for as many.
    key_dim, value_dim: per head; None for dim / heads and dim / H, where several papers' large
    models have wider values (RetNet, Gated DeltaNet: twice). convolution: width of the
    short convolution, 0 for none. norm: "rms", "layer" or "none", over V. gate: "silu",
    "sigmoid" or "none". gate_rank: "full", or "value" for W_g = W_2 W_1 + b of rank V.
    """

    heads: int = 4
    value_heads: int | None = None
    key_dim: int | None = None
    value_dim: int | None = None
    convolution: int = 4
    norm: str = "rms"
    gate: str = "none"
    gate_rank: str = "full"

    @property
    def memories(self) -> int:
        return self.value_heads or self.heads

    def sizes(self) -> tuple[int, int]:
        """K and V of one head; ValueError when dim does not divide into heads."""
        if self.memories % self.heads:
            raise ValueError(
                f"{type(self).__name__}: value_heads {self.value_heads} must be a multiple of "
                f"heads {self.heads}"
            )
        if None in (self.key_dim, self.value_dim) and self.dim % self.memories:
            raise ValueError(
                f"{type(self).__name__}: dim {self.dim} does not divide into {self.memories} "
                "heads; change heads, or set key_dim and value_dim"
            )
        return self.key_dim or self.dim // self.heads, self.value_dim or self.dim // self.memories

    def projections(self) -> tuple[tuple[int, ...], ...]:
        """The axes of q, k and v of one token."""
        key, value = self.sizes()
        return (self.heads, key), (self.heads, key), (self.memories, value)

    def setup(self):
        super().setup()
        for name, allowed in (("gate", tuple(GATES)), ("gate_rank", ("full", "value"))):
            if getattr(self, name) not in allowed:
                given = getattr(self, name)
                raise ValueError(f"{name} {given!r}: allowed are {', '.join(allowed)}")
        axes, sizes = ("heads", "head_dim"), dict(std=self.std, dtype=self.dtype)

        def dense(shape):
            return Dense(shape, ("heads", *(None,) * (len(shape) - 2), "head_dim"), **sizes)

        self.query, self.key, self.value = (dense(shape) for shape in self.projections())
        if self.convolution:
            self.short_convolution = ShortConvolution(self.convolution, dtype=self.dtype)
        if self.norm != "none":
            self.output_norm = Norm(self.norm, ("head_dim",))
        value = self.memories, self.sizes()[1]
        if self.gate != "none" and self.gate_rank == "value":
            self.output_gate = LowRank(value, axes, rank=value[1], bias=True, **sizes)
        elif self.gate != "none":
            self.output_gate = Dense(value, axes, **sizes)
        self.output = Dense(
            (self.dim,), ("embed",), axes, std=self.std * self.out_scale, dtype=self.dtype
        )

    def project(self, x: Float[Array, "B T D"], state: dict, ctx: Context):
        """q, k, v [B, T, ...] behind the convolution, and its new state."""
        new: dict = {}
        projected: tuple = self.query(x), self.key(x), self.value(x)
        if self.convolution:
            projected, new = convolve(self.short_convolution, projected, state, ctx)
        return *projected, new

    def project_unit(self, x: Float[Array, "B T D"], state: dict, ctx: Context):
        """The same with q and k of unit norm, behind a SiLU also where there is no convolution.

        Values pass without one there; our choice, some implementations apply it to them too.
        """
        q, k, v, state = self.project(x, state, ctx)
        if not self.convolution:
            q, k = jax.nn.silu(q), jax.nn.silu(k)
        return l2_normalise(q), l2_normalise(k), v, state

    def outputs(self, y: Float[Array, "B T H V"], kept: Float[Array, "B T D"]):
        """W_o (norm(y) * gate(W_g x)), x kept."""
        if self.norm != "none":
            y = self.output_norm(y)
        activation = GATES[self.gate]
        if activation is not None:
            y = y * activation(self.output_gate(kept))
        return self.output(y)
