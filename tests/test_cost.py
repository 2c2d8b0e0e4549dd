"""Operations counted from jaxprs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import cells, cost, inputs
from memjax.blocks.hybrid import COMBINE
from memjax.cell import run
from memjax.nn.layers import Context
from memjax.nn.stack import make_mixer


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
