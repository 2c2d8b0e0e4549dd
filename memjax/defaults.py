"""The settings that all configs share, as a ConfigDict to change and return."""

import itertools
import typing
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict, config_dict

from memjax.errors import UserError
from memjax.nn.lm import LanguageModel, ModelConfig, blank
from memjax.nn.stack import mixer_names, mixer_options


def config(
    data: dict[str, Any], layers: tuple, mixers: dict[str, dict[str, Any]] | None = None, **model
) -> ConfigDict:
    """A complete config for `data` and a model of `layers`.

    data: `name` of a source and its settings (see `memjax.data.make`). layers: see
    `memjax.nn.lm.ModelConfig`. mixers: options by mixer name that differ from the defaults.
    model: further fields of ModelConfig. Every option of every mixer is in the result, so that
    each can be set from the command line, e.g. --config.model.mixers.delta_net.beta_max=2.
    """
    settings = ConfigDict()
    settings.seed = 0
    settings.steps = 1000
    settings.batch = 16  # rows a step, over all devices
    settings.accumulate = 1  # pieces that a batch is handled in
    settings.init_from = ""  # folder of a run whose last parameters a new one starts with
    settings.data = ConfigDict(data)
    settings.model = ConfigDict(
        {
            "vocab": 259,
            "dim": 256,
            "layers": layers,
            "channel": "swiglu",
            "mlp": 8 / 3,
            "norm": "rms",
            "tie": True,
            "std": 0.02,
            "dtype": "float32",
            "features": 0,
            "remat": "none",
            **model,
        }
    )
    settings.model.mixers = default_mixers(layers, mixers or {})
    settings.optim = ConfigDict(
        {
            "lr": 1e-3,
            "warmup": 100,
            "final": 0.1,  # of lr, at the last step
            "weight_decay": 0.1,
            "clip": 1.0,
            "b1": 0.9,
            "b2": 0.95,
        }
    )
    # every 0: at the end only; sample: tokens of text that are drawn then, 0 for none
    settings.eval = ConfigDict({"every": 0, "batches": 8, "sample": 300})
    settings.checkpoint = ConfigDict({"every": 1000, "keep": 2})
    settings.log = ConfigDict({"every": 20, "tensorboard": False, "wandb": False})
    # devices by axis, -1 for all the rest (see `memjax.sharding`)
    settings.mesh = ConfigDict({"replica": 1, "data": 1, "fsdp": -1, "context": 1, "tensor": 1})
    settings.next_steps = ""  # printed at the end of a finished run
    return settings


TEXT = {"glob": "", "dataset": "", "field": "text", "bpe": 0, "layers": 6, "dim": 256}
TEXT |= {"length": 512, "steps": 5000, "seed": 0}  # the arguments of configs on text


def language_model(
    arg: ConfigDict, layers: tuple, mixers: dict[str, dict[str, Any]] | None = None, **model
) -> ConfigDict:
    """A config for a model of `layers` on the text that an argument with the names of TEXT says.

    mixers, model: as in `config`.
    """
    if arg.dataset:
        source = {"name": "tfds", "dataset": arg.dataset, "folder": ""}  # '' for its usual place
        source |= {"train": "train", "heldout": "test"}  # splits
    else:
        source = {"name": "text", "glob": arg.glob, "holdout": 0.05}  # of the files
    settings = config(
        data={
            **source,
            "field": arg.field,  # of JSON lines, parquet columns or features
            "bpe": arg.bpe,  # tokens of a byte-pair encoding, 0 for bytes
            "length": arg.length,
            "shuffle": 1024,  # rows of a window within which rows are shuffled
            "workers": 0,
        },
        layers=layers,
        mixers=mixers,
        dim=arg.dim,
        vocab=arg.bpe or 259,
        **model,
    )
    settings.seed, settings.steps = arg.seed, arg.steps
    settings.eval.every = settings.checkpoint.every = 500
    return settings


def default_mixers(layers: tuple, changes: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
    """Every option of every mixer that `layers` names, with `changes` by name.

    An option that is None and may be something else keeps its type, so that a flag can set it.
    """
    used = {n for pattern, _ in layers for text in pattern for n in mixer_names(text)}
    found: dict[str, dict] = {}
    for name in sorted(used):
        found[name] = {}
        for option, field in mixer_options(name).items():
            value = field.default
            if value is None:
                kind = typing.get_args(field.type)[0]
                value = config_dict.placeholder(typing.get_origin(kind) or kind)
            found[name][option] = value
        found[name] |= changes.get(name, {})
    return ConfigDict(found)


def mlp(model: ConfigDict, parameters: int) -> float:
    """The width of SwiGLU or GeGLU, as a multiple of that of the model, with which a model (a
    config's `model`) has so many parameters, to the nearest multiple of 8 channels.

    Raises UserError for fewer parameters than the rest of the model has."""
    sizes = ModelConfig(**{**model.to_dict(), "mlp": 1.0})
    net = LanguageModel(sizes)
    shapes = jax.eval_shape(net.init, jax.random.key(0), blank(sizes, 1, 2))["params"]
    of_channel = 3 * sizes.dim * sizes.depth  # its numbers in the three matrices of all layers
    rest = sum(leaf.size for leaf in jax.tree.leaves(shapes)) - of_channel * sizes.dim
    hidden = 8 * round((parameters - rest) / of_channel / 8)
    if hidden < 8:
        least = rest + 8 * of_channel
        raise UserError(f"parameters={parameters}: this model has at least {least}")
    return hidden / sizes.dim


def tiny_recall(data: dict[str, Any], *layers: str, vocab: int = 0, dim: int = 64) -> ConfigDict:
    """A config for a recall task on a CPU: [BaseConv, a mixer or several], one head as wide as the
    model, no MLP, no positions, LayerNorm, fresh examples at every step (the small setting of
    Zoology, Arora et al. 2023, arXiv 2312.04927). Attention and its window differ from the memories
    in the mixer only. vocab: that of the data, where it is no setting of the data.

    Weights start with the spread 1 / sqrt(dim): with 0.02, a large model's, the same runs stay at
    chance for several hundred steps."""
    plain = {"heads": 1, "rotary_base": 0.0, "convolution": 0, "norm": "layer", "gate": "none"}
    plain |= {"frozen_chunk": 4, "segment": 16}  # 16 tokens bind the pairs
    # A window of a quarter of the sequence, matrices of dim x dim; memories that learn keep a
    # momentum and frozen weights of that size too, and RWKV keeps its token shift. Atlas has two
    # heads of dim/4 x dim/2, a quarter of that: at each token its Newton-Schulz iterations make
    # products of whole matrices, so that two of dim/2 x dim/2 train three times as long.
    sizes = {"sliding_window": {"window": 16}, "gla": {"key_dim": dim}}
    sizes |= {"omega_net": {"key_dim": dim, "degree": 1}}
    sizes |= {"atlas": {"heads": 2, "key_dim": dim // 4, "degree": 1}}
    sizes |= {"mamba2": {"expand": 1, "state_dim": dim}}
    mixers = {}
    for name in itertools.chain.from_iterable(map(mixer_names, layers)):
        known = mixer_options(name)
        mixers[name] = {k: v for k, v in plain.items() if k in known} | sizes.get(name, {})
    settings = config(
        data,
        layers=((("base_conv", *layers), 1),),
        mixers=mixers,
        vocab=vocab or data["vocab"],
        dim=dim,
        mlp=0.0,
        norm="layer",
        std=dim**-0.5,
    )
    settings.batch = 32
    settings.optim.update(final=0.0, b2=0.999)
    settings.eval.update(every=500, batches=8)
    settings.checkpoint.every = 500
    return settings
