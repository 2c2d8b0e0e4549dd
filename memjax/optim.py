"""The optimiser: AdamW (Loshchilov and Hutter, arXiv 1711.05101) with warm-up and cosine decay."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from memjax.errors import UserError, did_you_mean

DECAYED = ("kernel", "embedding")
_FIELDS = ("lr", "warmup", "final", "weight_decay", "clip", "b1", "b2")


def make(
    config: Mapping[str, Any], steps: int
) -> tuple[optax.GradientTransformation, Callable[[Any], jax.Array]]:
    """AdamW after clipping by the global norm.

    Args:
      config: `config.optim`:
        lr: the peak learning rate, > 0.
        warmup: steps of linear warm-up, 0 to `steps`.
        final: the last step's learning rate as a fraction of `lr`, 0 to 1.
        weight_decay: >= 0, on the leaves that `decay_mask` names.
        clip: the largest global norm of the gradient; 0 or None: not clipped.
        b1, b2: decay of the two moments, in [0, 1).
      steps: length of the run, >= 1.

    Returns:
      (transformation, schedule); `schedule(n)` is the learning rate of the step after n steps.

    Raises:
      UserError: a field is missing, unknown or outside of its range.
    """
    _check(config, steps)
    learning_rate = schedule(config["lr"], config["warmup"], config["final"], steps)
    adamw = optax.adamw(
        learning_rate,
        b1=config["b1"],
        b2=config["b2"],
        weight_decay=config["weight_decay"],
        mask=decay_mask,
    )
    clip = config["clip"]
    return (optax.chain(optax.clip_by_global_norm(clip), adamw) if clip else adamw), learning_rate


def schedule(lr: float, warmup: int, final: float, steps: int) -> Callable[[Any], jax.Array]:
    """Linear from lr/warmup at the first step to lr, then half a cosine to lr*final at the last."""

    def learning_rate(done):
        step = jnp.asarray(done, jnp.float32) + 1  # the step that is being made, from 1
        rise = step / max(warmup, 1)
        along = jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
        fall = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * along))
        return lr * jnp.where(step <= warmup, rise, fall)

    return learning_rate


def decay_mask(params: Any) -> Any:
    """True for the leaves that decay: those whose last name is 'kernel' or 'embedding'.

    All else (norm scales, biases, A_log, dt_bias, initial states) does not. The rule reads names,
    not shapes, because scanned layers add an axis to every leaf.
    """

    def decays(path, _):
        names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        return bool(names) and names[-1] in DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def _check(config: Mapping[str, Any], steps: int) -> None:
    unknown = [k for k in config if k not in _FIELDS]
    missing = [k for k in _FIELDS if k not in config]
    if unknown:
        raise UserError(
            f"config.optim.{unknown[0]}: no such field; fields: {', '.join(_FIELDS)}."
            f"{did_you_mean(unknown[0], _FIELDS)}"
        )
    if missing:
        raise UserError(f"config.optim lacks {', '.join(missing)}; fields: {', '.join(_FIELDS)}.")
    if steps < 1:
        raise UserError(f"config.steps={steps}: must be at least 1.")
    clip = config["clip"] or 0
    for name, good, allowed in (
        ("lr", config["lr"] > 0, "above 0"),
        ("warmup", 0 <= config["warmup"] <= steps, f"0 to config.steps ({steps})"),
        ("final", 0 <= config["final"] <= 1, "0 to 1 (a fraction of lr)"),
        ("weight_decay", config["weight_decay"] >= 0, "0 or more"),
        ("clip", clip >= 0, "above 0, or 0 for no clipping"),
        ("b1", 0 <= config["b1"] < 1, "at least 0 and below 1"),
        ("b2", 0 <= config["b2"] < 1, "at least 0 and below 1"),
    ):
        if not good:
            raise UserError(f"config.optim.{name}={config[name]}: must be {allowed}.")
