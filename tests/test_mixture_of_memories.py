"""Mixture of Memories: its identities, the tokens of each memory packed, its layer in a model."""

import functools

import contract
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import distance
from wrapped import DEEP, DELTA, B, D, T, answers, bare, either, given_for

from memjax import train_step
from memjax.nn.layers import Context
from memjax.nn.lm import LanguageModel, ModelConfig
from memjax.nn.stack import make_mixer
from memjax.wrappers.memory_caching import MemoryCaching
from memjax.wrappers.mixture_of_memories import MixtureOfMemories, merge

pytestmark = pytest.mark.usefixtures("exact_products")


@either
def test_one_memory_is_the_cell_itself(form):
    cell = MixtureOfMemories(DELTA, 1)
    given = given_for(cell)
    given = given._replace(xs=given.xs._replace(gates=np.ones_like(given.xs.gates)))
    alone = jax.tree.map(lambda a: a[:, :, :, 0], bare(given))
    assert distance(answers(cell, form, given), answers(DELTA, form, alone)) < 1e-6


def sparse(cell, seed=0, **changes):
    """Inputs of which each token goes to two memories of the cell."""
    given = given_for(cell, seed, **changes)
    order = np.random.default_rng(seed).random(given.xs.gates.shape).argsort(axis=-1)
    gates = np.where(order < 2, given.xs.gates, 0)
    return given._replace(xs=given.xs._replace(gates=gates))


@either
@pytest.mark.parametrize("inner", [DELTA, DEEP])
def test_each_memory_sees_its_tokens_packed(inner, form):
    """The paper's form: the tokens of each memory alone, one after another."""
    cell = MixtureOfMemories(inner, 4)
    given = sparse(cell)
    expected = np.zeros((T, inner.value_dim))
    for m in range(4):
        gates = np.float64(given.xs.gates[0, :, 0, m])
        mine = np.flatnonzero(gates)
        leaves = [leaf[:1, mine][:, :, :, m] for leaf in given.xs[:-1]]
        params = jax.tree.map(lambda a, m=m: a[:, m], given.params)
        packed = contract.Given(params, leaves)
        expected[mine] += gates[mine, None] * answers(inner, "scan", packed)[0, :, 0]
    assert distance(answers(cell, form, given)[0, :, 0], expected) < 1e-6


@either
def test_memories_without_a_token_stay_as_they_are(form):
    cell = MixtureOfMemories(DELTA, 4)
    given = sparse(cell, state=True)
    gates = given.xs.gates.copy()
    gates[..., 2] = 0
    given = given._replace(xs=given.xs._replace(gates=gates))
    _, state = contract.values(cell, form, given)
    assert np.array_equal(state[:, :, 2], given.state[:, :, 2])
    assert not np.array_equal(state[:, :, 1], given.state[:, :, 1])


@either
def test_the_order_of_memories_does_not_matter(form):
    cell = MixtureOfMemories(DELTA, 4)
    given, order = sparse(cell), [2, 0, 3, 1]
    other = given._replace(xs=jax.tree.map(lambda a: a[:, :, :, order], given.xs))
    assert distance(answers(cell, form, other), answers(cell, form, given)) < 1e-6


@either
def test_equal_memories_with_gates_of_sum_one_are_one(form):
    cell = MixtureOfMemories(DELTA, 4)
    given = given_for(cell)
    same = jax.tree.map(lambda a: np.repeat(a[:, :, :, :1], 4, axis=3), given.xs)
    given = given._replace(xs=same._replace(gates=np.full_like(same.gates, 0.25)))
    alone = jax.tree.map(lambda a: a[:, :, :, 0], bare(given))
    assert distance(answers(cell, form, given), answers(DELTA, form, alone)) < 1e-6


def test_bad_mixtures_are_refused():
    with pytest.raises(ValueError, match="number must be at least 1"):
        MixtureOfMemories(DELTA, 0)
    with pytest.raises(ValueError, match="cannot wrap itself"):
        MixtureOfMemories(MemoryCaching(MixtureOfMemories(DELTA)))
    with pytest.raises(ValueError, match="Mamba2Mixer puts gate, D beside its memory's answers"):
        options = {"mixture_of_memories": {"shared": False}}
        make_mixer("mixture_of_memories(mamba2)", options, dim=16)().make_cell()
    with pytest.raises(ValueError, match="memory_caching wraps a memory cell; given hybrid"):
        make_mixer("memory_caching(hybrid)", {})


@functools.cache
def mixture(**options):
    """(module, parameters, x, context) around Gated DeltaNet with its short convolution."""
    found = {"mixture_of_memories": options, "gated_delta_net": {"heads": 2}}
    module = make_mixer("mixture_of_memories", found, dim=D, std=0.3)()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    ctx = Context(None, None, jnp.broadcast_to(jnp.arange(T), (B, T)), losses=jnp.zeros(()))
    variables = jax.jit(lambda: nn.unbox(module.init(jax.random.key(0), x, None, ctx)))()
    return module, variables, x, ctx


def test_a_routed_convolution_leaks_neither_the_future_nor_other_sequences():
    module, variables, x, ctx = mixture()
    run = jax.jit(lambda x: module.apply(variables, x, None, ctx)[0])
    y, t = np.asarray(run(x)), T // 2
    moved = np.asarray(run(x.at[0, t].add(1.0)))
    assert np.array_equal(moved[1], y[1])
    assert np.array_equal(moved[0, :t], y[0, :t])
    assert not np.array_equal(moved[0, t], y[0, t])


def test_a_memory_convolves_the_tokens_that_are_routed_to_it():
    """One memory of the mixer alone, on the tokens of its own, has the same inputs."""
    module, variables, x, ctx = mixture()
    xs = jax.jit(lambda x: module.apply(variables, x, {}, ctx, method="inputs")[0])(x)
    params, inner = variables["params"], module.template
    for m in range(4):
        mine = np.flatnonzero(np.asarray(xs.gates[0, :, 0, m]))
        own = jax.tree.map(lambda a, m=m: a[m], params["memories"])
        few = Context(None, None, jnp.arange(len(mine))[None])
        alone, _, _ = inner.apply(
            {"params": merge(params["shared"], own)}, x[:1, mine], {}, few, method="inputs"
        )
        for leaf, one in zip(xs[:-1], alone, strict=True):
            assert distance(np.asarray(leaf[:1, mine][:, :, :, m]), np.asarray(one)) < 1e-6


def test_one_routed_memory_is_the_inner_mixer():
    module, variables, x, ctx = mixture(routed=1, top=1, shared=False)
    params = variables["params"]
    own = jax.tree.map(lambda a: a[0], params["memories"])
    inner = {"params": merge(params["shared"], own)}
    expected = jax.jit(lambda x: module.template.apply(inner, x, None, ctx)[0])(x)
    y = jax.jit(lambda x: module.apply(variables, x, None, ctx)[0])(x)
    assert distance(np.asarray(y), np.asarray(expected)) < 1e-6


def test_an_even_load_costs_the_number_of_choices():
    """Equal probabilities choose the same memories for all; the loss is k for any mean choice."""
    module, variables, x, ctx = mixture()
    even = jax.tree.map(jnp.zeros_like, variables["params"]["router"])
    variables = {"params": {**variables["params"], "router": even}}
    new = jax.jit(lambda x: module.apply(variables, x, None, ctx)[2])(x)
    assert abs(float(new.losses) - 0.01 * 2) < 1e-6
    ctx = ctx.replace(write=jnp.arange(T)[None, :] < jnp.array([[5], [9]]))
    _, loss = module.apply(variables, x, ctx, method="route")
    assert abs(float(loss) - 2) < 1e-6
    rows = np.concatenate([x[0, :5], x[1, :9]])[None]
    trained = mixture()[1]
    _, loss = module.apply(trained, x, ctx, method="route")
    short = Context(None, None, jnp.zeros((1, 14), jnp.int32))
    _, expected = module.apply(trained, jnp.asarray(rows), short, method="route")
    assert abs(float(loss) - float(expected)) < 1e-6


def test_the_trainer_adds_the_load_balancing_loss():
    """The gradient of the router is that of both losses, and the metric names the second."""
    layers = ((("mixture_of_memories(linear_attention)",), 2),)
    options = {"mixture_of_memories": {"balance": 0.5}, "linear_attention": {"heads": 2}}
    tokens = np.random.default_rng(0).integers(0, 11, (4, 9))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((4, 8), bool)}
    model = LanguageModel(ModelConfig(11, D, layers, mlp=0.0, mixers=options))
    descent = optax.sgd(1.0)
    params = jax.jit(lambda key: nn.unbox(train_step.init_params(model, key)))(jax.random.key(0))
    update = jax.jit(train_step.make_train_step(model, descent, lambda _: 1.0))
    state = train_step.TrainState(jnp.zeros((), jnp.int32), params, descent.init(params))
    new, metrics = update(state, batch)

    @jax.jit
    def losses(params):
        def both(params):
            scores = train_step.score(model, params, batch, None)
            return jnp.stack([jnp.mean(scores.nats), scores.auxiliary])

        values, pull = jax.vjp(both, params)
        return values, *(router(pull(one)[0]) for one in jnp.eye(2))

    def router(params):
        return params["stack"]["group_0"]["layer_0"]["mixer"]["router"]["kernel"]

    (nats, auxiliary), task, balance = losses(params)
    assert 2 * 0.5 * 1.5 < float(auxiliary) < 2 * 0.5 * 4  # two layers, k = 2
    assert np.allclose([metrics["loss"], metrics["auxiliary"]], [nats, auxiliary], rtol=1e-6)
    change = np.asarray(router(params) - router(new.params))
    assert distance(change, np.asarray(task + balance)) < 1e-4
    assert distance(change, np.asarray(task)) > 0.1
