"""A decoder language model over any stack of memories."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memjax import registry
from memjax.axes import constrain
from memjax.nn.layers import Context, Norm, Published, normal, unpublished
from memjax.nn.stack import REMAT, Stack, make_mixer, mixer_names, mixer_texts
from memjax.recurrence import positions
from memjax.typing import Array, Bool, Float, Int, PyTree

DTYPES = ("float32", "bfloat16")
NORMS = ("rms", "layer")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The sizes of a model.

    vocab: number of token ids. features: numbers that an input holds in place of a token id, read
    by a linear layer, and vocab is then the number of answers; 0 for tokens. dim: width D.
    layers: pairs (pattern, repeats), a pattern being a tuple of mixers by name, e.g.
    ((("delta_net", "sliding_window"), 3),). channel: the channel mixer of all layers, "swiglu",
    "geglu", "rwkv4_channel" or "rwkv7_channel". mlp: its hidden width as a multiple of dim
    (RWKV: 4), 0 for no channel mixer, whatever channel says. norm: "rms" or "layer". tie: use the
    embedding as output projection. std: standard deviation of all weights; output projections get
    std / sqrt(2 layers). dtype: of the computation, "float32" or "bfloat16" (parameters and the
    loss are float32). remat: "none" or "full". mixers: options by mixer name.
    """

    vocab: int
    dim: int
    layers: tuple[tuple[tuple[str, ...], int], ...]
    channel: str = "swiglu"
    mlp: float = 8 / 3
    norm: str = "rms"
    tie: bool = True
    std: float = 0.02
    dtype: str = "float32"
    remat: str = "none"
    features: int = 0
    mixers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name, allowed in (("norm", NORMS), ("dtype", DTYPES), ("remat", REMAT)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"model.{name} {getattr(self, name)!r}: allowed are {', '.join(allowed)}"
                )
        registry.channel(self.channel)
        for name in ("vocab", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1; given {getattr(self, name)}")
        if self.features < 0 or (self.features and self.tie):
            raise ValueError(
                f"model.features must be 0, or above 0 with model.tie=False, as there is no "
                f"embedding to share; given {self.features} with tie={self.tie}"
            )
        if self.mlp < 0 or self.std <= 0:
            given = f"{self.mlp}, {self.std}"
            raise ValueError(f"model.mlp must be >= 0 and model.std > 0; given {given}")
        self._check_layers()

    def _check_layers(self):
        form = 'model.layers: expected pairs (pattern, repeats) such as ((("delta_net",), 2),)'
        try:
            groups = [(tuple(pattern), int(repeats)) for pattern, repeats in self.layers]
        except (TypeError, ValueError):
            raise ValueError(f"{form}; given {self.layers!r}") from None
        named = [name for pattern, _ in groups for name in pattern]
        if not named or min(n for _, n in groups) < 1 or any(type(n) is not str for n in named):
            raise ValueError(f"{form}; given {self.layers!r}")
        used = {name for text in named for name in mixer_names(text)}
        for name in self.mixers:
            if name not in used:
                raise ValueError(registry.unknown("mixer in model.mixers", name, sorted(used)))
        known: dict[str, Any] = {}
        for text in named:
            make_mixer(text, self.mixers)
            self._check_published(text, known)

    def _check_published(self, layer: str, known: dict[str, Any]):
        """ValueError when a layer reads what no layer in front of it, in `known`, publishes, or has
        other positions; adds to `known` what this one does, with its rotary base."""
        mixers = [
            make_mixer(text, self.mixers, dim=self.dim)(parent=None) for text in mixer_texts(layer)
        ]
        for mixer in mixers:
            reads = getattr(mixer, "reads", None)
            if reads and reads not in known:
                raise ValueError(f"layer {layer!r}: {unpublished(reads)}")
            own = getattr(mixer, "rotary_base", None)
            if reads and own not in (None, known[reads]):
                raise ValueError(
                    f"layer {layer!r}: rotary_base {own} is not that of the attention which it "
                    f"reads, {known[reads]}; set both alike"
                )
        for mixer in mixers:
            if hasattr(mixer, "publishes"):
                inner = mixer.inner[0](parent=None)
                known[mixer.publishes] = getattr(inner, "rotary_base", None)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return sum(len(pattern) * repeats for pattern, repeats in self.layers)


def mixers_of(config: ModelConfig) -> list[str]:
    """The names of all mixers in the layers, sorted."""
    texts = (text for pattern, _ in config.layers for text in pattern)
    return sorted({name for text in texts for name in mixer_names(text)})


def reports_loss(config: ModelConfig) -> bool:
    """Whether a layer adds to the training loss; the sum is then sown as "losses"."""
    return any(
        getattr(registry.get(name).mixer, "reports_loss", False) for name in mixers_of(config)
    )


def capacity(config: ModelConfig) -> int | None:
    """The longest context that every layer can hold; None when it is unbounded."""
    limits = []
    for name in mixers_of(config):
        mixer = make_mixer(name, config.mixers, dim=config.dim)()
        limits.append(getattr(mixer, "capacity", None))
    return min((limit for limit in limits if limit is not None), default=None)


class LanguageModel(nn.Module):
    """Tokens to logits, with a state: (tokens, state) -> (logits, state).

    The state is {"position": [B], "layers": ...}; pass the one returned to continue a sequence,
    or None to begin. It has a fixed size however long the sequence is.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"] | Float[Array, "B T features"],
        state: PyTree | None = None,
        reset: Bool[Array, "B T"] | None = None,
        write: Bool[Array, "B T"] | None = None,
        select: Int[Array, "B S"] | None = None,
        differentiate: bool = True,
    ) -> tuple[Float[Array, "B S vocab"], PyTree]:
        """tokens: ids, or vectors where the config has features. reset: first token of a document.
        write: False for padding, which changes no state. select: the positions whose logits are
        wanted; None for all T. differentiate: False when no gradient will be taken; guides the
        choice of forms. Logits are float32."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        state = state or {"position": jnp.zeros(tokens.shape[0], jnp.int32), "layers": None}
        position, end = positions(reset, write, state["position"], tokens.shape[1])
        carried = state["layers"] is not None
        published = self._published(tokens.shape[:2], dtype, carried)
        first, none = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.promote_types(dtype, jnp.float32))
        ctx = Context(reset, write, position, first, config.depth, published, none, differentiate)
        init = nn.with_logical_partitioning(normal(config.std), ("vocab", "embed"))
        embedding = self.param(
            "embedding", init, (config.features or config.vocab, config.dim), jnp.float32
        ).astype(dtype)
        if config.features:
            x = tokens.astype(dtype) @ embedding
        else:
            x = jnp.take(embedding, tokens, axis=0)  # NaN for a token out of range
        x = constrain(x, "batch", "seq", None)
        x, layers, ctx = self._stack(dtype)(x, state["layers"], ctx)
        if reports_loss(config):
            self.sow("losses", "layers", ctx.losses)
        if select is not None:
            x = jnp.take_along_axis(x, select[..., None], axis=1)
        x = Norm(config.norm, name="norm")(x)
        head = embedding.T
        if jax.__version_info__ < (0, 12):  # 0.7.2's CPU multiplies no bfloat16 with a transpose
            head = jax.lax.optimization_barrier(head)
        if not config.tie:
            init = nn.with_logical_partitioning(normal(config.std), ("embed", "vocab"))
            head = self.param("head", init, (config.dim, config.vocab), jnp.float32)
        # accumulated and kept in float32: rounded logits would cost the loss three digits
        wide = jnp.promote_types(dtype, jnp.float32)
        logits = jnp.matmul(x, head.astype(dtype), preferred_element_type=wide)
        logits = constrain(logits, "batch", "seq", "vocab")
        return logits, {"position": end, "layers": layers}

    def _published(self, size: tuple[int, ...], dtype, carried: bool) -> dict[str, Published]:
        """What layers publish for tokens [B, T], not set yet; a scan over layers needs to know it
        beforehand."""
        layers, shared = self.config.layers, self._shared(dtype)
        found: dict[str, PyTree] = {}
        texts = {t for pattern, _ in layers for text in pattern for t in mixer_texts(text)}
        for text in sorted(texts):
            mixer = make_mixer(text, self.config.mixers, **shared)(parent=None)
            if not hasattr(mixer, "published"):
                continue
            for name, shapes in mixer.published(*size, carried).items():
                if found.setdefault(name, shapes) != shapes:
                    raise ValueError(
                        f"layers publish different shapes of {name}: {shapes}, {found[name]}; a "
                        "model has room for one"
                    )
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), found)
        return {name: (jnp.zeros((), bool), value) for name, value in zeros.items()}

    def _shared(self, dtype) -> dict[str, Any]:
        out_scale = (2 * self.config.depth) ** -0.5
        return dict(dim=self.config.dim, std=self.config.std, out_scale=out_scale, dtype=dtype)

    def _stack(self, dtype) -> Stack:
        config, shared = self.config, self._shared(dtype)
        groups = tuple(
            (tuple(make_mixer(text, config.mixers, **shared) for text in pattern), repeats)
            for pattern, repeats in config.layers
        )
        channel = None
        if config.mlp:
            hidden = 8 * round(config.mlp * config.dim / 8)  # a multiple of 8 for the hardware
            channel = functools.partial(
                registry.channel(config.channel).mixer, hidden=hidden, **shared
            )
        return Stack(groups, channel, config.norm, config.remat, name="stack")


def blank(config: ModelConfig, batch: int, length: int) -> Array:
    """Inputs of zeros in the shape that a model takes."""
    if config.features:
        return jnp.zeros((batch, length, config.features))
    return jnp.zeros((batch, length), jnp.int32)


def initial_state(model: LanguageModel, params: PyTree, batch: int) -> PyTree:
    """The model's state before the first token: what one token that is not written leaves."""
    none = jnp.zeros((batch, 1), bool)
    return model.apply({"params": params}, blank(model.config, batch, 1), write=none)[1]
