"""Sequences that devices share: folds of memories, eight virtual devices, training, refusals."""

import functools
import math
import re

import contract
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs as runs
from contract import Case, Given
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from test_mesh import assert_same, three_steps, trained_on_eight

import memjax
from memjax import recurrence, sharding
from memjax.axes import MESH_AXES
from memjax.nn.layers import Context
from memjax.nn.stack import make_mixer

DEVICES, TOKENS = 8, 96  # 12 tokens a device, a chunk and a half
FADING = ("log_decay", "rate", "multiple")
CASES = {case.name: case for case in contract.cases() if case.cell.folds}
FIRST = "gated_delta_net"
OTHERS = [f"{FIRST}:float64", *(name for name in CASES if name != FIRST)]
GROUPS = [",".join(OTHERS[i::9]) for i in range(9)]


def problem(case: Case, length: int = TOKENS) -> Given:
    """Inputs of the contract, with resets and tokens that are not written, of memories that fade so
    little that their first token is known at their last."""
    given = contract.problem(case, 0, length)
    few = {name for name, field in case.fields.items() if field.kind in FADING}
    changes = {name: 0.02 * getattr(given.xs, name) for name in few}
    return given._replace(xs=given.xs._replace(**changes))


def fold(case: Case, given: Given):
    """The element of all tokens."""
    return case.cell.fold(given.params, given.state, given.xs, given.reset, given.write)


# ---------------------------------------------------------------- one device


@pytest.mark.parametrize(
    "name", ["rg_lru", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != "rg_lru")]
)
def test_folds_of_three_spans(name):
    """Joined in either order and applied to the state in front they give the state behind."""
    case = CASES[name]
    given, size = problem(case), TOKENS // 3
    for row, first in ((1, size), (2, 2 * size)):  # the others begin inside a span, or none does
        given.reset[row, first] = True
    given.write[2, 2 * size :] = False  # a document of which nothing is written
    each = [
        given._replace(
            xs=contract.tokens(given.xs, span),
            state=None,
            reset=given.reset[:, span],
            write=given.write[:, span],
        )
        for span in (slice(i * size, (i + 1) * size) for i in range(3))
    ]

    def of_every_memory(function):
        return jax.jit(jax.vmap(jax.vmap(function)))

    compose, apply = map(of_every_memory, (case.cell.compose, case.cell.apply))
    one, two, three = map(jax.jit(functools.partial(fold, case)), each)
    left, right = compose(three, compose(two, one)), compose(compose(three, two), one)
    _, behind = contract.values(case.cell, "chunked", given)
    for element in (left, right):
        found = contract.named(apply(element, given.state))
        for path, exact in contract.named(behind).items():
            assert contract.distance(found[path], exact) < 1e-5, (name, path)


# ---------------------------------------------------------------- eight devices

COMPARE = """
import json, sys
import test_context
print(json.dumps([test_context.shared(*name.split(":")) for name in sys.argv[1].split(",")]))
"""


def placed(given: Given) -> Given:
    """The tokens spread over eight devices, the rest on all of them."""
    mesh = sharding.mesh({"context": DEVICES})
    whole, part = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (None, "context")))
    places = Given(whole, part, whole, part, part)
    return Given(*(jax.device_put(*pair) for pair in zip(given, places, strict=True)))


def shared(name: str, dtype: str = "float32") -> dict:
    """How far a memory's values and gradients on eight devices are from those on one, and what its
    program sends. Runs where there are eight."""
    case = CASES[name]
    with contract.x64(dtype == "float64"):
        given = contract.cast(problem(case), dtype)
        exact = contract.evaluate(case.cell, "chunked", given)
        found = contract.evaluate(case.cell, "chunked", placed(given))
        floors = contract.floors(exact)
        program = jax.jit(contract.apply, static_argnums=(0, 1))
        text = program.lower(case.cell, "chunked", placed(given)).compile().as_text()
        element = jax.eval_shape(functools.partial(fold, case), given)
    through, state = (len(jax.tree.leaves(part)) for part in element)
    hops = math.ceil(math.log2(DEVICES))
    return {
        "name": name,
        "exact": dtype == "float64",
        "far": {path: contract.distance(found[path], exact[path], floors[path]) for path in exact},
        "sent": len(re.findall(r" collective-permute(?:-start)?\(", text)),
        # states at every hop and to the next device; what passes through has no use in the last hop
        "expected": state * (hops + 1) + through * (hops - 1),
        "gathered": len(re.findall(r" all-(?:gather|to-all)", text)),
    }


@pytest.mark.parametrize(
    "names", [FIRST, *(pytest.param(names, marks=pytest.mark.slow) for names in GROUPS)]
)
def test_eight_devices_compute_what_one_does(names):
    """Values to 1e-5, gradients to 1e-4; only elements of fixed size are sent, and log2 n times."""
    for found in runs.on_eight_devices(COMPARE, names):
        for path, far in found["far"].items():
            bound = 1e-4 if path.startswith("gradient") else 1e-5
            assert far < (1e-12 if found["exact"] else bound), (found["name"], path, far)
        assert found["sent"] == found["expected"] and not found["gathered"], found


LAGS = """
import json, test_context
given = (3, False), (13, False), (3, True)
print(json.dumps([test_context.shared_lags(*args) for args in given]))
"""


def shared_lags(n: int, masked: bool) -> float:
    """The largest error of `lags`, its tail and its gradients on eight devices."""
    rng = np.random.default_rng(0)
    x, tail, weights = (rng.normal(size=(2, t, 5)) for t in (TOKENS, n, n))
    reset = rng.random((2, TOKENS)) < 0.1
    reset[:, [24, 35, 37]] = True  # the first and last tokens of devices, and the second
    write = rng.random((2, TOKENS)) < 0.7 if masked else None

    @jax.jit
    def run(given):
        _, x, tail, reset, write = given

        def loss(x, tail):
            past, new = recurrence.lags(x, tail, reset, write)
            total = sum(jnp.sum(jnp.sin((i + 1) * a)) for i, a in enumerate(past))
            return total + jnp.sum(weights * new), (past, new)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, tail)

    given = contract.cast(Given(None, x, tail, reset, write), np.float32)
    one, many = (jax.tree.leaves(run(each)) for each in (given, placed(given)))
    return max(contract.distance(*pair) for pair in zip(many, one, strict=True))


@pytest.mark.slow
def test_lags_cross_devices():
    """By tails alone where a device has as many tokens, otherwise as the compiler does it."""
    assert max(runs.on_eight_devices(LAGS)) < 1e-6


# ---------------------------------------------------------------- training

CONVOLUTION = {"model.mixers.linear_attention.convolution": 4}
HYBRID = {  # rotary attention, a delayed memory behind a token shift, a channel mixer with a shift
    "model.channel": "rwkv7_channel",
    "model.mixers.hybrid.combine": "window_exit",
    "model.mixers.sliding_window.window": 16,
}


@pytest.mark.parametrize(
    ("layers", "mesh", "changes"),
    [
        ("linear_attention,layers=1", {"fsdp": 1, "context": 8}, CONVOLUTION),
        pytest.param(
            "hybrid(sliding_window,rwkv7),layers=1",
            {"data": 2, "fsdp": 1, "context": 2, "tensor": 2},
            HYBRID,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "attention+mixture_of_memories(delta_net),layers=2",
            {"fsdp": 2, "context": 4},
            {"accumulate": 2, "model.remat": "full"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_packed_text_is_learned_as_on_one_device(tmp_path, layers, mesh, changes):
    sizes = {"batch": 8, "data.length": 64, "data.shuffle": 1, "optim.lr": 1e-3}
    settings = {**runs.text(tmp_path), **sizes, **changes}
    source = f"{runs.ROOT}/configs/text.py:{layers}"
    batch = next(iter(memjax.build(runs.load(source, settings)).data.train))
    assert (batch["reset"][:, 1:].sum(axis=1) > 0).any()  # documents begin inside rows
    assert_same(trained_on_eight(source, settings, mesh), three_steps(source, settings))


# ---------------------------------------------------------------- without devices


def traced(function, given):
    """The program of a function for arrays on a planned mesh of eight."""
    sizes = [DEVICES if axis == "context" else 1 for axis in MESH_AXES]
    mesh = AbstractMesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    place = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), given)
    return jax.jit(function).trace(shapes).jaxpr


def run_of(name: str, length: int):
    """The program of a memory over so many tokens."""
    case = next(case for case in contract.cases() if case.name == name)
    given = contract.problem(case, 0, length, state=False, masks=False)
    return traced(functools.partial(contract.apply, case.cell, None), given)


def test_one_token_is_not_shared():
    assert "shard_map" not in str(run_of("delta_net", 1))
    assert "shard_map" in str(run_of("delta_net", 16))


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("titans", 16, r"Titans with config.mesh.context=8: .* delta_net, .*context=1 and split"),
        ("bmojo", 16, r"EideticWindow with config.mesh.context=8"),
        ("memory_caching", 16, r"MemoryCaching with config.mesh.context=8"),
        ("delta_net", 12, r"DeltaNet .*: 12 tokens do not divide into 8 equal parts; use a length"),
    ],
)
def test_what_cannot_be_shared(name, length, message):
    with pytest.raises(ValueError, match=message):
        run_of(name, length)


def test_a_layer_that_needs_whole_sequences():
    mixer: nn.Module = make_mixer("mac(delta_net)", {}, dim=16)()
    ctx = Context(None, None, jnp.zeros((2, 16), jnp.int32))
    with pytest.raises(ValueError, match=r"mac with config.mesh.context=8: .*; set context=1"):
        traced(lambda x: mixer.init(jax.random.key(0), x, None, ctx), jnp.zeros((2, 16, 16)))


def test_the_file_of_a_memory_without_folds_can_be_run_in_order():
    bare = memjax.MemoryCell()
    for refused in (lambda: bare.fold({}, None, None, None, None), lambda: bare.compose(0, 0)):
        with pytest.raises(NotImplementedError, match="MemoryCell has no fold; run its tokens"):
            refused()
