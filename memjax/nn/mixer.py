"""Token mixers: a memory cell between two halves, `inputs` and `outputs`."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from memjax.cell import MemoryCell, run
from memjax.nn.layers import Context, Dense, Norm, ShortConvolution
from memjax.typing import Array, DTypeLike, Float, PRNGKeyArray, PyTree

GATES = {"none": None, "silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


class Mixer(nn.Module):
    """A layer that mixes tokens through a memory: (x, state, ctx) -> (y, state, ctx).

    A subclass defines `make_cell` and the two halves, which are public so that wrappers and
    blocks can stand between them. The state is a dict: what `inputs` carries (a convolution's
    tail) and "memory", the cell's own. None is the initial state.

    dim: width D of the model. heads: number of heads. std: standard deviation of the weights;
    that of the output projection is std * out_scale. dtype: of the computation; parameters are
    float32. implementation: the form of the cell, as in `memjax.run`.
    """

    dim: int
    heads: int = 4
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
        weights = jax.eval_shape(lambda: self.cell.init_params(jax.random.key(0), self.heads))
        self.memory = {}
        if jax.tree.leaves(weights):
            self.memory = self.param("memory", self._init_memory)

    def _init_memory(self, key: PRNGKeyArray) -> PyTree:
        def name_axes(leaf):
            return nn.LogicallyPartitioned(leaf, ("heads", *(None,) * (leaf.ndim - 1)))

        return jax.tree.map(name_axes, self.cell.init_params(key, self.heads))

    def inputs(self, x: Float[Array, "B T D"], state: dict, ctx: Context) -> tuple[PyTree, dict]:
        """The cell's inputs, leaves [B, T, h, ...], and this half's new state."""
        raise NotImplementedError(f"{type(self).__name__} must define inputs")

    def outputs(self, y: Array, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the layer gives, from the memory's answers y [B, T, H, ...] and its own input."""
        raise NotImplementedError(f"{type(self).__name__} must define outputs")

    def __call__(
        self, x: Float[Array, "B T D"], state: dict | None, ctx: Context
    ) -> tuple[Float[Array, "B T D"], dict, Context]:
        state = {} if state is None else state
        xs, new = self.inputs(x, state, ctx)
        y, memory = run(
            self.cell,
            self.memory,
            xs,
            state=state.get("memory"),
            reset=ctx.reset,
            write=ctx.write,
            implementation=self.implementation,
            differentiate=ctx.differentiate,
        )
        return self.outputs(y, x), {**new, "memory": memory}, ctx


class ProjectionMixer(Mixer):
    """The mixer of the linear and delta family: projections, short convolution, norm and gate.

    q, k, v = SiLU(convolution(W x)), bias-free; the answers are normalised per head, gated by
    gate(W_g x) and projected back (Yang et al. 2024, arXiv 2406.06484, Sec. 3.4).

    key_dim, value_dim: per head; None for dim / heads. convolution: width of the short
    convolution, 0 for none. norm: "rms", "layer" or "none", over V. gate: "silu", "sigmoid" or
    "none".
    """

    key_dim: int | None = None
    value_dim: int | None = None
    convolution: int = 4
    norm: str = "rms"
    gate: str = "none"

    def sizes(self) -> tuple[int, int]:
        """K and V of one head; ValueError when dim does not divide into heads."""
        if None in (self.key_dim, self.value_dim) and self.dim % self.heads:
            raise ValueError(
                f"{type(self).__name__}: dim {self.dim} does not divide into {self.heads} heads; "
                "change heads, or set key_dim and value_dim"
            )
        each = self.dim // self.heads
        return self.key_dim or each, self.value_dim or each

    def setup(self):
        super().setup()
        if self.gate not in GATES:
            raise ValueError(f"gate {self.gate!r}: allowed are {', '.join(GATES)}")
        key, value = self.sizes()
        axes, sizes = ("heads", "head_dim"), dict(std=self.std, dtype=self.dtype)
        self.query = Dense((self.heads, key), axes, **sizes)
        self.key = Dense((self.heads, key), axes, **sizes)
        self.value = Dense((self.heads, value), axes, **sizes)
        if self.convolution:
            self.short_convolution = ShortConvolution(self.convolution, dtype=self.dtype)
        if self.norm != "none":
            self.output_norm = Norm(self.norm, ("head_dim",))
        if self.gate != "none":
            self.output_gate = Dense((self.heads, value), axes, **sizes)
        self.output = Dense(
            (self.dim,), ("embed",), axes, std=self.std * self.out_scale, dtype=self.dtype
        )

    def project(self, x: Float[Array, "B T D"], state: dict, ctx: Context):
        """q, k [B, T, H, K] and v [B, T, H, V] behind the convolution, and its new state."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        if not self.convolution:
            return q, k, v, {}
        flat = [a.reshape(*a.shape[:2], -1) for a in (q, k, v)]
        joined, tail = self.short_convolution(
            jnp.concatenate(flat, axis=-1), state.get("convolution"), ctx
        )
        splits = [flat[0].shape[-1], flat[0].shape[-1] + flat[1].shape[-1]]
        parts = jnp.split(joined, splits, axis=-1)
        q, k, v = (part.reshape(a.shape) for part, a in zip(parts, (q, k, v), strict=True))
        return q, k, v, {"convolution": tail}

    def outputs(self, y: Float[Array, "B T H V"], x: Float[Array, "B T D"]):
        """W_o (norm(y) * gate(W_g x))."""
        if self.norm != "none":
            y = self.output_norm(y)
        activation = GATES[self.gate]
        if activation is not None:
            y = y * activation(self.output_gate(x))
        return self.output(y)
