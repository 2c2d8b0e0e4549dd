"""The papers' parametrisations: what single mixers hand to their cells, and groups of heads."""

import contract
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import distance

from memjax import cells, registry
from memjax.nn.layers import Context
from memjax.nn.stack import make_mixer, mixer_names, mixer_options
from memjax.typing import fields

pytestmark = pytest.mark.usefixtures("exact_products")
B, T, D = 2, 13, 16


def build(name, seed=0, **options):
    """(module, its parameters with weights large enough that each matters, x, context)."""
    module = registry.get(name).mixer(dim=D, std=0.3, **options)
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    ctx = Context(None, None, jnp.broadcast_to(jnp.arange(T), (B, T)))
    params = nn.unbox(jax.jit(lambda key: module.init(key, x, None, ctx))(jax.random.key(seed)))
    return module, params["params"], x, ctx


def inputs_of(module, params, x, ctx):
    """The cell's inputs, of a sequence from its start."""
    return jax.jit(lambda p: module.apply({"params": p}, x, {}, ctx, method="inputs")[0])(params)


def test_retnet_fades_at_the_papers_rates():
    xs = inputs_of(*build("retnet", heads=4))
    rates = np.broadcast_to([0.96875, 0.984375, 0.9921875, 0.99609375], (B, T, 4))
    assert distance(np.exp(xs.g), rates) < 1e-6


def test_kda_decays_each_channel_and_gla_forgets_slowly_at_the_start():
    g = np.asarray(inputs_of(*build("kda", heads=2)).g)
    assert g.shape == (B, T, 2, 8) and (g <= 0).all()
    assert (g.std(axis=-1) > 0).all()
    module, params, x, ctx = build("gla", heads=2)
    xs = inputs_of(module, params, x, ctx)
    assert xs.k.shape == (B, T, 2, 4) and xs.v.shape == (B, T, 2, 8)
    small = jax.tree.map(lambda a: a / 1e3, params["decay"])
    g = inputs_of(module, {**params, "decay": small}, x, ctx).g
    assert distance(np.exp(g), np.full(g.shape, 0.5 ** (1 / 16))) < 1e-3


def test_comba_reads_with_a_weaker_key_and_corrects_the_query():
    module, params, x, ctx = build("comba", heads=2)
    xs = inputs_of(module, params, x, ctx)
    plain = inputs_of(module, {**params, "correction": jnp.zeros(2)}, x, ctx)
    assert distance(xs.p, np.float64(xs.k) / (1 + np.exp(-1))) < 1e-6
    assert distance(xs.q, np.float64(plain.q) - xs.p) < 1e-6
    assert distance(np.linalg.norm(plain.q, axis=-1), np.ones((B, T, 2))) < 1e-5


def softplus(x):
    return np.logaddexp(0, x)


def silu(x):
    return x / (1 + np.exp(-x))


def test_mamba2_is_its_papers_layer():
    """The whole layer as a float64 loop over tokens, in the letters of arXiv 2405.21060."""
    module, params, x, ctx = build("mamba2", heads=4, groups=2, state_dim=5)
    y, state, _ = jax.jit(module.apply)({"params": params}, x, None, ctx)
    w = jax.tree.map(np.float64, params)
    u, width = np.float64(x), 2 * D // 4
    z, values, k, q = (
        np.einsum("btd,dhn->bthn", u, w[name]["kernel"])
        for name in ("gate", "values", "key", "query")
    )
    dt = softplus(u @ w["step"]["kernel"] + w["dt_bias"])
    flat = np.concatenate([a.reshape(B, T, -1) for a in (values, k, q)], axis=-1)
    padded = np.concatenate([np.zeros((B, 3, flat.shape[-1])), flat], axis=1)
    kernel = w["short_convolution"]["kernel"]
    flat = silu(
        sum(padded[:, 3 - i : 3 - i + T] * kernel[i] for i in range(4))
        + w["short_convolution"]["bias"]
    )
    xc = flat[..., : 2 * D].reshape(B, T, 4, width)
    b, c = (
        np.repeat(a.reshape(B, T, 2, 5), 2, axis=2)
        for a in (flat[..., 2 * D : 2 * D + 10], flat[..., 2 * D + 10 :])
    )
    h, answers = np.zeros((B, 4, 5, width)), []
    for t in range(T):
        decay = np.exp(-np.exp(w["A_log"]) * dt[:, t])
        h = decay[..., None, None] * h
        h = h + np.einsum("bhn,bhp->bhnp", b[:, t], dt[:, t, :, None] * xc[:, t])
        answers.append(np.einsum("bhnp,bhn->bhp", h, c[:, t]) + w["D"][:, None] * xc[:, t])
    gated = (np.stack(answers, axis=1) * silu(z)).reshape(B, T, 2, -1)
    gated = gated / np.sqrt(np.mean(gated**2, axis=-1, keepdims=True) + 1e-5)
    gated = gated * w["output_norm"]["scale"]
    expected = np.einsum("bthp,hpd->btd", gated.reshape(xc.shape), w["output"]["kernel"])
    assert distance(y, expected) < 1e-5
    assert distance(state["memory"], h) < 1e-5
    assert inputs_of(module, params, x, ctx).k.shape == (B, T, 2, 5)  # not repeated


@pytest.mark.slow
def test_the_learners_gates_start_where_their_docstrings_say():
    """With nothing but biases, and inside the region that keeps one constant key stable."""
    module, params, x, ctx = build("titans", heads=2, frozen_chunk=4)
    still = inputs_of(module, params, 0 * x, ctx)
    assert distance(1 - np.exp(still.alpha), np.full(still.alpha.shape, 0.018)) < 1e-3
    assert distance(np.exp(still.eta), np.full(still.eta.shape, 0.8022)) < 1e-3
    xs = jax.tree.map(np.float64, inputs_of(module, params, 10 * x, ctx))
    assert (xs.theta > 0).all() and (2 * 4 * xs.theta <= -np.expm1(xs.eta) + 1e-6).all()
    for name in ("omega_net", "atlas"):
        module, params, x, ctx = build(name, heads=2, context=3, frozen_chunk=4)
        xs = jax.tree.map(np.float64, inputs_of(module, params, x, ctx))
        assert distance(jax.nn.softplus(params["coefficients"]), [1, 1, 0.5]) < 1e-6
        assert xs.k.shape == (B, T, 2, 153) and xs.gamma.shape == (B, T, 2, 3)
        assert distance(np.linalg.norm(xs.k, axis=-1), np.ones((B, T, 2))) < 1e-5
        assert (xs.eta <= 1 / 12).all()
        still = inputs_of(module, params, 0 * x, ctx)
        assert distance(np.exp(still.alpha), np.full((B, T, 2), 0.982)) < 1e-3
        assert distance(still.eta, np.full((B, T, 2), 1 / 24)) < 1e-6
    module, params, x, ctx = build("atlas", heads=2, newton_schulz=0, degree=1, key_dim=8)
    xs = jax.tree.map(np.float64, inputs_of(module, params, 10 * x, ctx))
    assert (2 * 4 * 16 * xs.eta <= -np.expm1(xs.theta) + 1e-6).all()
    assert "coefficients" not in params and xs.k.shape == (B, T, 2, 8)
    module, params, x, ctx = build("lattice", heads=2, objective="encoding", retraction=False)
    xs = inputs_of(module, params, 10 * x, ctx)
    assert np.linalg.norm(xs.v, axis=-1).max() < 1 + 1e-6 and np.asarray(xs.gamma).max() <= 0.5
    module, params, x, ctx = build("gated_kalmanet", heads=2)
    still = inputs_of(module, params, 0 * x, ctx)
    assert distance(still.beta, np.full((B, T, 2), 0.5 + 1e-6)) < 1e-7
    assert distance(still.alpha, np.full((B, T, 2), 0.5)) < 1e-6
    with pytest.raises(ValueError, match=r"gated_kalmanet: beta_max must lie in \(0, 1\]"):
        build("gated_kalmanet", heads=2, beta_max=2.0)


@pytest.mark.parametrize("name", cells.names())
def test_gates_stay_in_float32_when_the_rest_is_bfloat16(name):
    """A decay or a rate in bfloat16 has three digits; what is stored and read may be narrow."""
    options = {n: {"heads": 2} for n in mixer_names(name) if "heads" in mixer_options(n)}
    module = make_mixer(name, options, dim=D, dtype=jnp.bfloat16)()
    x = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16)
    ctx = Context(None, None, jnp.zeros((B, T), jnp.int32))

    def run(x):
        params = nn.unbox(module.init(jax.random.key(0), x, None, ctx))
        return module.apply(params, x, {}, ctx, method="inputs")[0], module.apply(
            params, x, None, ctx
        )

    xs, (y, state, _) = jax.eval_shape(run, x)
    assert y.dtype == jnp.bfloat16
    for leaf, field in fields(module.make_cell().inputs).items():
        narrow = field.kind in ("query", "key", "value")
        if field.kind != "multiple":  # of a narrow leaf and a rate
            assert getattr(xs, leaf).dtype == (jnp.bfloat16 if narrow else jnp.float32), leaf


GROUPED = (
    "linear_attention", "retnet", "simple_gla", "gla", "dplr", "delta_net", "gated_delta_net",
    "kda", "comba", "delta_product",
)  # fmt: skip


# Parameters with one part for each key head.
SHARED = {"query", "key", "feedback", "correction", "decay", "rate"}


def repeat(path, leaf):
    """Each key head twice: the heads' axis is behind that of a projection's input, if any."""
    if any(key.key == "first" for key in path):
        return leaf
    return jnp.repeat(leaf, 2, axis=1 if path and path[-1].key == "kernel" else 0)


@pytest.mark.parametrize(
    "name",
    [
        *(fast := ("dplr", "comba")),  # every part that is shared
        *(pytest.param(n, marks=pytest.mark.slow) for n in GROUPED if n not in fast),
    ],
)
def test_value_heads_share_queries_and_keys(name):
    """Two value heads to each key equal as many heads whose q and k weights are the same."""
    options = dict(heads=2, key_dim=4, value_dim=6, convolution=0)
    module, params, x, ctx = build(name, value_heads=4, **options)
    xs = inputs_of(module, params, x, ctx)
    assert xs.k.shape[2] == xs.q.shape[2] == 2 and xs.v.shape[2] == 4
    y, state, _ = jax.jit(lambda p: module.apply({"params": p}, x, None, ctx))(params)
    assert jax.tree.leaves(state["memory"])[0].shape[1] == 4
    wide = dict(params)
    for part in (SHARED | ({"log_decay"} if name == "dplr" else set())) & wide.keys():
        wide[part] = jax.tree_util.tree_map_with_path(repeat, params[part])
    plain = registry.get(name).mixer(dim=D, std=0.3, **{**options, "heads": 4})
    expected, same, _ = jax.jit(lambda p: plain.apply({"params": p}, x, None, ctx))(wide)
    assert distance(y, np.asarray(expected)) < 1e-5
    assert distance(state["memory"], np.asarray(same["memory"])) < 1e-5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "delta_net",
            {"heads": 3, "value_heads": 4},
            "value_heads 4 must be a multiple of heads 3",
        ),
        ("delta_net", {"heads": 2, "value_heads": 6}, "dim 16 does not divide into 6 heads"),
        ("mamba2", {"heads": 3}, "heads 3 must divide expand dim = 32"),
        ("mamba2", {"heads": 4, "groups": 3}, "multiple of groups 3"),
        ("kda", {"gate_rank": "low"}, "gate_rank 'low': allowed are full, value"),
        ("comba", {"beta_max": 2.0}, r"comba: beta_max must lie in \(0, 1\]; given 2.0"),
        ("delta_product", {"steps": 0}, "steps must be at least 1; given 0"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in cells.names() if name != "attention"])
def test_every_layer_stays_finite_for_16_thousand_tokens(name):
    """A random, a constant and a large constant input (one key, gates at their limits): answers,
    state and all gradients, with large weights. Attention has room for fewer tokens."""
    length, dim = 16_384, 16
    options = {n: {"heads": 2} for n in mixer_names(name) if "heads" in mixer_options(n)}
    module = make_mixer(name, options, dim=dim)()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, length, dim)).astype(np.float32)
    x[1:] = x[1:, :1] * np.array([1, 100], np.float32)[:, None, None]
    whole, head = (Context(None, None, jnp.zeros((3, n), jnp.int32)) for n in (length, 4))
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), x[:, :4], None, head))
    params = jax.tree.map(lambda a: a + 0.5 * rng.normal(size=a.shape).astype(np.float32), params)

    @jax.jit
    def run(params):
        def loss(params):
            y, state, _ = module.apply(params, x, None, whole)
            return jnp.mean(jnp.square(y)), (y, state["memory"])

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (y, state)), gradient = contract.to_numpy(run(params))
    for path, leaf in jax.tree_util.tree_leaves_with_path((y, state, gradient)):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
    if hasattr(state, "weights"):  # memories that learn stay inside their stable region
        assert max(np.abs(leaf).max() for leaf in state.weights) < 1e3
