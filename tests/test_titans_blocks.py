"""Titans' memory as a gate, as a layer and as a context, each against its equation."""

import contract
import jax
import numpy as np
import pytest
from block_references import (
    Same,
    T,
    W,
    attend,
    context,
    initialise,
    norm,
    project,
    softmax,
    tokens,
)
from contract import distance

import memjax
from memjax.blocks.bmojo import Inputs
from memjax.blocks.mac import WRITTEN, Segment
from memjax.blocks.titans import MAG, MAL
from memjax.nn.stack import make_mixer

pytestmark = pytest.mark.usefixtures("exact_products")
PERSISTENT = 2
SHARED = dict(dim=8, std=0.5)
DELTA = {"delta_net": {"heads": 2}}
AGE = np.arange(T)[:, None] - np.arange(T)


def always(own, keys, values, visible):
    """Keys, values and what is visible, with the persistent ones in front."""
    k, v = (np.float64(own[name]).transpose(1, 0, 2)[None] for name in ("k", "v"))
    k, v = np.concatenate([k, keys], axis=1), np.concatenate([v, values], axis=1)
    return k, v, np.concatenate([np.ones((len(visible), PERSISTENT), bool), visible], axis=1)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


@pytest.mark.parametrize("name", ["mag", "mal"])
def test_mag_and_mal_equal_their_equations(name):
    """With persistent keys and values, which every token sees."""
    window = {"heads": 2, "window": W, "rotary_base": 0.0, "persistent": PERSISTENT}
    options, x = {"sliding_window": window, **DELTA}, tokens()
    module = make_mixer(f"{name}(sliding_window, delta_net)", options, **SHARED)(name="mixer")
    params, apply = initialise(module, x)
    memory = make_mixer("delta_net", options, **SHARED)(name="mixer")
    held = np.float64(memory.apply({"params": params["memory"]}, x, None, context())[0])

    def near(x):
        layer = params["attention"]
        q, k, v = (project(x, layer[n]) for n in ("query", "key", "value"))
        return attend(layer, q, *always(layer["memory"], k, v, (AGE >= 0) & (AGE < W)))

    expected = near(held) if name == "mal" else norm(near(x)) * sigmoid(norm(held))
    assert distance(apply(params, x), expected) <= 3e-6


@pytest.mark.slow
def test_mag_of_a_constant_gate_is_the_window_and_mal_without_a_memory_too():
    """A gate of one half: half of the normed window. `Same` in the memory's place: the window."""
    window = {"heads": 2, "window": W}
    x, options = tokens(), {"sliding_window": window, **DELTA}
    attention = make_mixer("sliding_window", options, **SHARED)
    delta = make_mixer("delta_net", options, **SHARED)
    for kind, memory in ((MAG, delta), (MAL, Same)):
        params, apply = initialise(kind(inner=(attention, memory), **SHARED), x)
        if kind is MAG:
            params["memory_norm"]["scale"] *= 0
        layer = attention(name="mixer")
        alone = layer.apply({"params": params["attention"]}, x, None, context())[0]
        expected = norm(np.float64(alone)) / 2 if kind is MAG else alone
        assert distance(apply(params, x), expected) <= 1e-6


@pytest.mark.parametrize("written", WRITTEN)
def test_mac_equals_its_equation(written):
    """Segment by segment: the memory is asked as it stood behind the last one, a token sees what it
    says of tokens up to its own, and it is written with the attention's answers or the tokens."""
    plain, x = dict(segment=W, persistent=PERSISTENT, heads=2, rotary_base=0.0), tokens()
    options = {"mac": plain | {"written": written}}
    module = make_mixer("mac(delta_net)", options | DELTA, **SHARED)(name="mixer")
    params, apply = initialise(module, x)
    memory = make_mixer("delta_net", options | DELTA, **SHARED)(name="mixer")

    @jax.jit
    def ask(part, state, write):
        ctx = context(1, part.shape[1]).replace(write=write)
        return memory.apply({"params": params["memory"]}, part, state, ctx)

    layer, state, answers = params["attention"], None, []
    for begin in range(0, T, W):
        part = x[:, begin : begin + W]
        n = part.shape[1]
        told = np.float64(ask(part, state, np.zeros((1, n), bool))[0])
        q, k, v = (project(part, layer[name]) for name in ("query", "key", "value"))
        told_k, told_v = (project(told, layer[name]) for name in ("key", "value"))
        q, k, told_k = norm(q), norm(k), norm(told_k)
        keys, values = np.concatenate([k, told_k], axis=1), np.concatenate([v, told_v], axis=1)
        past = np.tri(n, dtype=bool)
        visible = np.concatenate([past, past], axis=1)
        y = attend(layer, q, *always(layer["memory"], keys, values, visible))
        given = np.float32(y) if written == "answers" else part
        held, state, _ = ask(given, state, np.ones((1, n), bool))
        answers.append(norm(y) * sigmoid(norm(np.float64(held))))
    assert distance(apply(params, x), np.concatenate(answers, axis=1)) <= 5e-6


def test_mac_whose_memory_tells_the_token_itself_is_attention_within_segments():
    """Every key stands there twice, which changes no softmax."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, T, 2, *n)).astype(np.float32) for n in ((1, 8), (8,), (6,)))
    y, _ = memjax.run(Segment(8, 6, window=W), {}, Inputs(q, k, v, k, v))
    segment = np.arange(T) // W
    visible = (AGE >= 0) & (segment[:, None] == segment)
    scores = np.einsum("bthk,bshk->bhts", np.float64(q[:, :, :, 0]), k) / 8**0.5
    expected = np.einsum("bhts,bshv->bthv", softmax(scores, visible), np.float64(v))
    assert distance(y[:, :, :, 0], expected) <= 1e-6


def test_mac_refuses_what_is_no_memory_and_unknown_options():
    publishing = "rwkv7", "mixture_of_memories", "memory_caching(rwkv7)"
    module = make_mixer("mac(delta_net)", {"mac": {"written": "x"}}, **SHARED)(name="mixer")
    with pytest.raises(ValueError, match="mac: written 'x': allowed are answers, tokens"):
        initialise(module, tokens())
    for inside in ("base_conv", "bmojo_f(mixture_of_memories)", *publishing):
        module = make_mixer(f"mac({inside})", {}, **SHARED)(name="mixer")
        with pytest.raises(ValueError, match="mac needs a memory cell that publishes nothing"):
            initialise(module, tokens())


@pytest.mark.slow
def test_a_single_token_that_is_not_written_changes_no_bit_of_mac():
    """Also where the next segment begins."""
    module = make_mixer("mac(delta_net)", {"mac": {"segment": W, "heads": 2}, **DELTA}, **SHARED)
    module, x = module(name="mixer"), tokens()
    params, _ = initialise(module, x)

    @jax.jit
    def step(x, state, ctx):
        return module.apply({"params": params}, x, state, ctx)[1]

    state = step(x[:, :1], None, context(1, 1))
    silent = context(1, 1).replace(write=np.zeros((1, 1), bool))
    for n in range(1, 2 * W + 1):
        ctx = silent.replace(position=np.full((1, 1), n))
        contract.assert_identical(step(x[:, n : n + 1], state, ctx), state, f"{n} tokens")
        emptied = step(x[:, :1], state, silent.replace(reset=np.ones((1, 1), bool)))
        contract.assert_identical(emptied, step(x[:, :1], None, silent), f"{n} tokens, emptied")
        state = step(x[:, n : n + 1], state, ctx.replace(write=None))
