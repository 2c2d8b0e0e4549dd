"""Pure training: loss, step, evaluation and initialisation, and `build`, which makes them from a
config. No files, no loop; a notebook needs nothing else."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh

from memjax import data, optim, sharding
from memjax.nn.lm import LanguageModel, ModelConfig, blank, reports_loss
from memjax.registry import unknown
from memjax.typing import Array, Bool, Float, Int, PRNGKeyArray, PyTree

# Keys of a batch that are not groups of scored positions.
_COMMON = ("inputs", "targets", "mask", "reset")

Batch = Mapping[str, Array]


class TrainState(NamedTuple):
    """step: int32[], finished steps. params, opt_state: nested dicts and optax's state."""

    step: PyTree
    params: PyTree
    opt_state: PyTree


class Scores(NamedTuple):
    """Per scored position [B, S]: nats, whether the most likely token is right, and the mask;
    what the layers add to the training loss, such as a router's load-balancing loss; and the
    model's state behind the batch."""

    nats: Float[Array, "B S"]
    correct: Bool[Array, "B S"]
    mask: Bool[Array, "B S"]
    auxiliary: Float[Array, ""]
    state: PyTree


def score(
    model: LanguageModel,
    params: PyTree,
    batch: Batch,
    queries: int | None,
    differentiate: bool = True,
    state: PyTree | None = None,
) -> Scores:
    """Runs the model on a batch from a state, None for the initial one.

    queries: at most this many positions of a row are scored; only their logits are computed.
    None: all positions.
    """
    select, targets, mask = None, batch["targets"], batch["mask"]
    if queries is not None:
        select = scored_positions(mask, queries)
        targets, mask = (jnp.take_along_axis(a, select, axis=1) for a in (targets, mask))
    (logits, after), sown = model.apply(
        {"params": params},
        batch["inputs"],
        state,
        reset=batch.get("reset"),
        select=select,
        differentiate=differentiate,
        mutable=["losses"],
    )
    auxiliary = sum(jax.tree.leaves(sown), jnp.zeros(()))
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    correct = (jnp.argmax(logits, -1) == targets) & mask
    return Scores(jnp.where(mask, nats, 0), correct, mask, auxiliary, after)


def scored_positions(mask: Bool[Array, "B T"], queries: int) -> Int[Array, "B S"]:
    """The first `queries` scored positions of each row, in order."""
    return jnp.argsort(~mask, axis=1, stable=True)[:, :queries]


def make_train_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    schedule: Callable,
    queries: int | None = None,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """(state, batch) -> (state, metrics): loss in nats per scored position, accuracy, grad_norm
    before clipping, lr and the number of scored positions; auxiliary, what layers add to the loss
    that is minimised, where a layer does.

    accumulate: the batch is handled in that many pieces; the gradient is that of the whole batch.
    """

    def step(state, batch):
        total = jnp.maximum(jnp.sum(batch["mask"]), 1)

        def loss(params, piece):
            scores = score(model, params, piece, queries)
            nats, auxiliary = jnp.sum(scores.nats) / total, scores.auxiliary / accumulate
            return nats + auxiliary, (nats, auxiliary, jnp.sum(scores.correct))

        def add(sums, piece):
            gradients, found = jax.grad(loss, has_aux=True)(state.params, piece)
            return jax.tree.map(jnp.add, sums, (*found, gradients)), None

        none = jax.tree.map(jnp.zeros_like, state.params)
        zeros = (jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32), none)
        if accumulate == 1:
            (nats, auxiliary, correct, gradients), _ = add(zeros, batch)
        else:
            # every accumulate-th row, so that each device's rows stay on it
            pieces = jax.tree.map(
                lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1), dict(batch)
            )
            (nats, auxiliary, correct, gradients), _ = jax.lax.scan(add, zeros, pieces)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        metrics = {
            "loss": nats,
            "accuracy": correct / total,
            "grad_norm": optax.global_norm(gradients),
            "lr": schedule(state.step),
            "scored": total,
        }
        if reports_loss(model.config):
            metrics["auxiliary"] = auxiliary
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def make_eval_step(
    model: LanguageModel, queries: int | None = None
) -> Callable[[PyTree, Batch], dict[str, Array]]:
    """(params, batch) -> sums over the batch, to be added up and given to `summarise`.

    nats, correct, scored: over positions; rows_correct, rows: rows whose scored positions are all
    right. Further boolean arrays [B, T] of a batch name groups of positions, counted apart as
    correct/<name> and scored/<name>, and those of the rest as correct/not_<name>.
    """

    def step(params, batch):
        scores = score(model, params, batch, queries, differentiate=False)
        scored_rows = jnp.any(scores.mask, axis=1)
        all_right = jnp.all(scores.correct | ~scores.mask, axis=1) & scored_rows
        sums = {
            "nats": jnp.sum(scores.nats),
            "correct": jnp.sum(scores.correct),
            "scored": jnp.sum(scores.mask),
            "rows_correct": jnp.sum(all_right),
            "rows": jnp.sum(scored_rows),
        }
        for name, group in batch.items():
            if name in _COMMON or group.dtype != bool:
                continue
            if queries is not None:
                select = scored_positions(batch["mask"], queries)
                group = jnp.take_along_axis(group, select, axis=1)
            for label, member in ((name, group), (f"not_{name}", ~group)):
                sums[f"correct/{label}"] = jnp.sum(scores.correct & member)
                sums[f"scored/{label}"] = jnp.sum(scores.mask & member)
        return sums

    return step


def summarise(
    sums: Mapping[str, float], bytes_per_token: float | None = None, chance: float | None = None
) -> dict[str, float]:
    """Means from the sums of `make_eval_step`: loss in nats per scored position, accuracy per
    position and per row, accuracy of each group, bits_per_byte for text; where a guess is right
    with probability `chance` also accuracy per position scaled so that a guess has 0."""
    out = {"loss": sums["nats"] / sums["scored"]}
    if bytes_per_token is not None:
        out["bits_per_byte"] = out["loss"] / np.log(2) / bytes_per_token
    out["accuracy"] = sums["correct"] / sums["scored"]
    if bytes_per_token is None:
        out["query_accuracy"] = out.pop("accuracy")
        out["sequence_accuracy"] = sums["rows_correct"] / sums["rows"]
    if chance is not None:
        out["scaled_accuracy"] = scaled(out["query_accuracy"], chance)
    for key in sums:
        name = key.removeprefix("scored/")
        if name != key and sums[key]:
            out[f"query_accuracy/{name}"] = sums[f"correct/{name}"] / sums[key]
    return {name: float(value) for name, value in out.items()}


def scaled(accuracy: float, chance: float) -> float:
    """Accuracy so that a guess has 0 and no mistake 1 (Beck et al. 2024, arXiv 2405.04517)."""
    return (accuracy - chance) / (1 - chance)


@dataclasses.dataclass(frozen=True)
class Training:
    """All that a run is made of; made by `build`.

    model: the Linen module. data: its batches (see `memjax.data.Data`). mesh: the devices.
    optimizer, schedule: of optax. step, evaluate: jitted (state, batch) -> (state, metrics), with
    the state donated, and (params, batch) -> sums. rows: of a batch. seed: of the parameters.
    """

    model: LanguageModel
    data: data.Data
    mesh: Mesh
    optimizer: optax.GradientTransformation
    schedule: Callable
    step: jax.stages.Wrapped
    evaluate: jax.stages.Wrapped
    rows: int
    seed: int

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, nothing computed."""
        with jax.sharding.use_abstract_mesh(alone(self.mesh)):
            shapes = jax.eval_shape(self._init, jax.random.key(self.seed))
        params = sharding.shardings(shapes.params, self.mesh)
        shapes = nn.unbox(shapes)
        placed = TrainState(
            sharding.replicated(self.mesh),
            params,
            sharding.optimizer_shardings(self.optimizer, shapes.opt_state, params, self.mesh),
        )
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, placed
        )

    def init(self) -> TrainState:
        """The initial state, made where its shardings say; a function of the config's seed."""
        target = jax.tree.map(lambda a: a.sharding, self.abstract_state())
        make = jax.jit(lambda key: nn.unbox(self._init(key)), out_shardings=target)
        return make(jax.random.key(self.seed))

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a training batch, as `put` places it."""

        def whole(a):
            lie = sharding.batch_sharding(self.mesh, None, *a.shape[1:2])
            return jax.ShapeDtypeStruct((self.rows, *a.shape[1:]), a.dtype, sharding=lie)

        return {name: whole(a) for name, a in self.data.example.items()}

    def lower(self) -> tuple[Any, jax.stages.Lowered]:
        """The training step as a jaxpr of the whole batch, and lowered for the devices of the mesh,
        which need not be attached."""
        given = self.abstract_state(), self.abstract_batch()
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            traced = self.step.trace(*given)
            return traced.jaxpr.jaxpr, traced.lower()

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Moves a batch to the devices, rows and tokens spread over them; a process gives its own
        rows."""
        return {name: sharding.placed(self.mesh, array) for name, array in batch.items()}

    def train(self, steps: int) -> tuple[TrainState, dict[str, np.ndarray]]:
        """The state after so many steps from the initial one, and the metrics of each step
        [steps] by name. Without files and held-out figures, which `memjax.train` has."""
        state, found = self.init(), []
        for batch in itertools.islice(self.data.train, steps):
            state, metrics = self.step(state, self.put(batch))
            found.append(metrics)
        return state, jax.tree.map(lambda *each: np.array(each), *jax.device_get(found))

    def evaluation(self, params: PyTree, limit: int | None = None) -> dict[str, float]:
        """Held-out metrics over all evaluation batches, or over `limit` of them."""
        sums: dict[str, float] = {}
        for batch in self.data.evaluation(limit):
            for name, value in jax.device_get(self.evaluate(params, self.put(batch))).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return summarise(sums, self.data.bytes_per_token, self.data.chance)

    def _init(self, key: PRNGKeyArray) -> TrainState:
        params = init_params(self.model, key)
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(nn.unbox(params)))


def alone(mesh: Mesh) -> AbstractMesh:
    """One device of a mesh: forms are of its platform, and nothing is split."""
    device = mesh.abstract_mesh.abstract_device
    return AbstractMesh((1,), ("one",), axis_types=(AxisType.Auto,), abstract_device=device)


def init_params(model: LanguageModel, key: PRNGKeyArray) -> PyTree:
    """Initial parameters, boxed with their logical axis names."""
    return model.init(key, blank(model.config, 1, 2))["params"]


def abstract_params(model: LanguageModel) -> PyTree:
    """Shapes and dtypes of the parameters, nothing computed."""
    return nn.unbox(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))


def build(config: Any, devices: Sequence[jax.Device] | None = None) -> Training:
    """Model, data, optimiser and jitted steps of a config (see `configs/`).

    devices: of a topology that need not be attached, to lower the step for; its text is not read
    then. None: all of this machine.

    Raises ValueError with one message for a setting that does not exist or does not fit.
    """
    model_config = model_of(config)
    mesh = sharding.mesh(config.mesh, devices)
    if config.accumulate < 1 or config.batch % config.accumulate:
        raise ValueError(
            f"accumulate {config.accumulate} does not divide the batch of {config.batch} rows"
        )
    sharding.batch_sharding(mesh, config.batch // config.accumulate)  # refuses what does not fit
    share = sharding.share(mesh, config.batch) if devices is None else None
    source = data.make(
        config.data, batch=config.batch, seed=config.seed, share=share, read=devices is None
    )
    for name in ("vocab", "features"):
        given, needed = getattr(model_config, name), getattr(source, name)
        if given != needed:
            raise ValueError(
                f"model.{name} is {given}, the data has {needed}; set model.{name} to {needed}"
            )
    for length in (source.length, source.evaluation_length):  # refuses what does not fit
        sharding.batch_sharding(mesh, length=length)
    model = LanguageModel(model_config)
    optimizer, schedule = optim.make(config.optim, config.steps)
    step = make_train_step(model, optimizer, schedule, source.queries, config.accumulate)
    run = Training(
        model=model,
        data=source,
        mesh=mesh,
        optimizer=optimizer,
        schedule=schedule,
        step=jax.jit(step, donate_argnums=0),
        evaluate=jax.jit(make_eval_step(model, source.evaluation_queries)),
        rows=config.batch,
        seed=config.seed,
    )
    # Left to itself, XLA may return a parameter placed otherwise than it came.
    placed = jax.tree.map(lambda a: a.sharding, run.abstract_state())
    placed_step = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
    return dataclasses.replace(run, step=placed_step)


def model_of(config: Any) -> ModelConfig:
    """The frozen model settings of a config; ValueError for a field that does not exist."""
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    given = dict(config.model)
    for name in given:
        if name not in fields:
            raise ValueError(unknown("field of model", name, sorted(fields)))
    given["mixers"] = {name: dict(options) for name, options in given.get("mixers", {}).items()}
    return ModelConfig(**given)
