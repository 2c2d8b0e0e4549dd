"""Operations counted from jaxprs."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from memjax import cells, cost, inputs, train_step
from memjax.blocks.hybrid import COMBINE
from memjax.cell import run
from memjax.nn.layers import Context
from memjax.nn.lm import LanguageModel, ModelConfig
from memjax.nn.stack import make_mixer
from pallas_kernels.programs import Program


def test_products_loops_and_branches():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert cost.flops(jnp.matmul, a, b) == 2 * 3 * 4 * 5
    assert cost.flops(lambda a: jnp.exp(a) + 1, a) == 2 * 12
    assert cost.flops(jnp.sum, a) == 12
    assert cost.flops(lambda a: a.T.reshape(-1)[2:], a) == 0

    def products(n):
        return 2 * 3 * 4 * 5 * n

    looped = cost.flops(lambda a: jax.lax.scan(lambda c, _: (c @ b @ b.T, None), a, None, 7)[0], a)
    assert looped == 7 * products(2)
    assert cost.flops(jax.jit(jax.checkpoint(lambda a: a @ b)), a) == products(1)
    chosen = cost.flops(lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ b @ b.T, lambda: 2 * a), a)
    assert products(2) <= chosen <= products(2) + 2


def test_work_that_is_split_over_devices():
    """Four devices have two rows each; the other axis is left to the compiler."""
    mesh = AbstractMesh((2, 4), ("data", "split"), axis_types=(AxisType.Auto,) * 2)
    rows = PartitionSpec("split")
    split = jax.shard_map(
        lambda a, b: a @ b,
        mesh=mesh,
        in_specs=(rows, PartitionSpec()),
        out_specs=rows,
        axis_names={"split"},
        check_vma=False,
    )
    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 3), (3, 5)))
    assert cost.flops(split, a, b) == 2 * 8 * 3 * 5


def test_a_gradient_costs_about_twice_the_forward_pass():
    a, b = jnp.ones((30, 40)), jnp.ones((40, 50))
    forward = cost.flops(lambda a, b: jnp.sum(a @ b), a, b)
    both = cost.flops(jax.value_and_grad(lambda a, b: jnp.sum(a @ b), (0, 1)), a, b)
    assert 2.9 < both / forward < 3.1


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="while loop's number of trips"):
        cost.flops(lambda x: jax.lax.while_loop(lambda x: x < 9, lambda x: x + 1, x), jnp.ones(()))


def test_what_is_not_counted_is_refused():
    with pytest.raises(ValueError, match="an operation that is not counted"):
        cost.flops(jnp.linalg.cholesky, jnp.eye(3))


def test_the_scan_of_a_memory_costs_its_equation():
    """DeltaNet token by token: S^T k, the outer product, and S^T q, each 2 K V at the least."""
    cell = cells.get("delta_net").cell()
    xs = inputs.draw(cell, np.random.default_rng(0), 2, 9, 3)
    counted = cost.flops(lambda xs: run(cell, {}, xs, implementation="scan"), xs)
    least = 2 * 9 * 3 * (2 * 8 * 6 + 2 * 8 * 6 + 2 * 8 * 6)
    assert least <= counted < 1.5 * least


def layer_flops(layer, length, combine="gate"):
    """Operations of both passes of a layer of width 256, gradients of the weights included."""
    options = {"sliding_window": {"window": 128}, "hybrid": {"combine": combine}}
    module = make_mixer(layer, options, dim=256, std=0.02)()
    x = jax.ShapeDtypeStruct((1, length, 256), jnp.float32)
    ctx = Context(None, None, jnp.arange(length)[None])
    params = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x, None, ctx))

    def loss(params, x):
        return jnp.sum(module.apply(params, x, None, ctx)[0])

    return cost.flops(jax.grad(loss, (0, 1)), params, x)


def test_a_hybrid_costs_what_its_halves_do_and_a_window_what_its_length_does():
    """At most 10 % more than the sum: the gate has a projection of its own."""
    halves = layer_flops("sliding_window", 512) + layer_flops("gated_delta_net", 512)
    for combine in COMBINE:
        both = layer_flops("hybrid(sliding_window, gated_delta_net)", 512, combine)
        assert halves * 0.98 <= both <= halves * 1.1, f"{combine}: {both / halves}"
    few, more, many = (layer_flops("sliding_window", length) for length in (1024, 2048, 4096))
    assert many - more <= 2.05 * (more - few)  # 4 times where a token sees all


def model(*layers, **changes):
    """(sizes, shapes of the parameters) of a model of width 32."""
    sizes = ModelConfig(vocab=96, dim=32, layers=((layers, 2),), mlp=2.0, **changes)
    return sizes, train_step.abstract_params(LanguageModel(sizes))


def test_the_model_flops_of_a_transformer():
    """6 for each parameter of a product, and 12 for each channel of a query and token in sight."""
    matrices = 96 * 32 + 2 * (4 * 32 * 32 + 3 * 64 * 32)
    for window, seen in ((8, 8), (50, 20)):
        options = {"sliding_window": {"window": window}}
        sizes, params = model("sliding_window", mixers=options, remat="full")
        assert cost.model_flops(sizes, params, 20) == 6 * matrices + 2 * 12 * seen * 32
    fewer = cost.model_flops(sizes, params, 20, queries=5)
    assert fewer == 6 * (matrices - 96 * 32 * 15 / 20) + 2 * 12 * 20 * 32


def dots(text):
    """Operations of the products of a compiled program, in loops as often as they run."""
    shapes = dict(re.findall(r"%([\w.\-]+) = \w+\[([\d,]*)\]", text))
    shapes = {name: [int(n) for n in shape.split(",") if n] for name, shape in shapes.items()}
    total = 0
    for times, line in Program(text).operations(inside=True):
        if found := re.search(r"%([\w.\-]+) = .* dot\((?:\w+\[[^ ]* )?%([\w.\-]+),", line):
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)[1].split(",")
            sizes = (shapes[found[2]][int(axis)] for axis in contracted)
            total += times * 2 * math.prod(shapes[found[1]]) * math.prod(sizes)
    return total


def test_model_flops_are_those_of_the_compiled_gradient():
    """Of a hybrid whose memory runs token by token, as it is counted. XLA has more by the gradients
    of rank-one writes, which are two products of 2 K V each."""
    length = 32
    mixers = {"gated_delta_net": {"implementation": "scan"}, "sliding_window": {"window": length}}
    sizes, params = model("gated_delta_net", "sliding_window", mixers=mixers)
    rows = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(params, rows):
        return jnp.sum(LanguageModel(sizes).apply({"params": params}, rows)[0] ** 2)

    text = jax.jit(jax.grad(loss)).lower(params, rows).compile().as_text()
    counted = cost.model_flops(sizes, params, length) * length
    writes = 2 * length * 4 * (2 * 2 * 8 * 8)  # layers, tokens, heads
    assert dots(text) == pytest.approx(counted + writes, rel=1e-3)
