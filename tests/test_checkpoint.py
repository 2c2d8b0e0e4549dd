"""Saving, restoring, killed saves, and the messages for what does not fit."""

import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from memjax import checkpoint
from memjax.checkpoint import Checkpoints
from memjax.errors import UserError

CPU = jax.sharding.SingleDeviceSharding(jax.devices()[0])
CONFIG = ConfigDict(dict(steps=9, model=dict(dim=4, layers=((("a",), 2),))))
FACTS = {"source": "text", "files": 3, "seed": 0, "hash": "aaaa"}


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: tuple
    key: jax.Array


def make_state(fill=1.0, width=3):
    params = {"layer": {"kernel": jnp.full((4, width), fill), "scale": jnp.ones(2, jnp.bfloat16)}}
    return State(jnp.int32(7), params, optax.adamw(1e-3).init(params), jax.random.key(3))


def abstract(state):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=CPU), state)


def make_data():
    return iter(
        grain.MapDataset.range(100)
        .seed(1)
        .shuffle()
        .repeat(None)
        .to_iter_dataset()
        .batch(4, drop_remainder=True)
    )


def equal(a, b):
    def raw(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x)

    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(raw(x), raw(y))


def test_round_trip(tmp_path):
    meta = {"config": CONFIG, "data": FACTS, "clock": {"spent": 1.5}}
    state, data = make_state(), make_data()
    with Checkpoints(str(tmp_path), every=3, keep=2) as saved:
        assert saved.latest() is None and saved.meta() == {}
        assert saved.restore(abstract(state), make_data()) is None
        for step in range(1, 8):
            next(data)
            assert saved.save(step, make_state(float(step)), data, meta) == (step in (3, 6))
        assert saved.save(7, make_state(7.0), data, meta, force=True)
        assert not saved.save(7, make_state(8.0), data, meta, force=True)  # already there
        kept = next(data)
    with Checkpoints(str(tmp_path), every=3, keep=2) as saved:
        assert saved.steps() == [6, 7] and saved.latest() == 7
        assert saved.meta()["clock"] == {"spent": 1.5} and saved.meta(6)["data"] == FACTS
        other = make_data()
        step, restored, meta = saved.restore(abstract(state), other, expect=meta)
        assert step == 7 and meta["config"]["model"] == {"dim": 4, "layers": [[["a"], 2]]}
        equal(restored, make_state(7.0))
        np.testing.assert_array_equal(next(other), kept)
        assert saved.restore(abstract(state), step=6)[1].params["layer"]["kernel"][0, 0] == 6
        assert saved.save(9, restored, other, meta)
    assert checkpoint.read_meta(str(tmp_path))[0] == 9


def test_saved_before_donated(tmp_path):
    """The state may be donated, and the iterator moved, as soon as `save` returns."""
    step_fn = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    state, data, following = {"w": jnp.zeros((1000, 1000))}, make_data(), {}
    with Checkpoints(str(tmp_path), every=4, keep=5) as saved:
        for step in range(1, 17):
            state = step_fn(state)
            saved.save(step, state, data)
            following[step] = next(data)
        for step in saved.steps():
            other = make_data()
            got = saved.restore(abstract(state), other, step=step)[1]
            assert set(np.unique(got["w"])) == {float(step)}
            np.testing.assert_array_equal(next(other), following[step])
        assert saved.steps() == [4, 8, 12, 16]


def test_boxed_state(tmp_path):
    """Parameters that still carry their logical axis names."""
    box = nn.LogicallyPartitioned(jnp.ones((2, 3)), ("embed", "mlp"))
    with Checkpoints(str(tmp_path), every=1) as saved:
        saved.save(1, {"params": {"w": box}})
        _, got, _ = saved.restore(jax.eval_shape(lambda: {"params": {"w": box}}))
    assert got["params"]["w"].names == ("embed", "mlp")


def test_params_alone(tmp_path):
    state = make_state(5.0)
    with Checkpoints(str(tmp_path), every=1, keep=3) as saved:
        saved.save(1, make_state(2.0), None, {"config": CONFIG})
        saved.save(2, state, None, {"config": CONFIG})
    step, params, meta = checkpoint.restore_params(str(tmp_path))
    assert step == 2 and meta["config"]["steps"] == 9
    equal(params, state.params)
    shapes = jax.eval_shape(lambda: state.params)
    step, params, _ = checkpoint.restore_params(str(tmp_path), shapes, step=1)
    equal(params, make_state(2.0).params)
    with pytest.raises(
        UserError,
        match=r"different shapes or dtypes:\n    params.layer.kernel: "
        r"float32\[4,3\] in the checkpoint, float32\[4,6\] in the model",
    ):
        checkpoint.restore_params(str(tmp_path), jax.eval_shape(lambda: make_state(width=6).params))
    with pytest.raises(UserError, match="has no 'weights'; it has key, opt_state, params, step"):
        checkpoint.restore_params(str(tmp_path), key="weights")
    with pytest.raises(UserError, match="holds no checkpoint of step 3; it has 1, 2."):
        checkpoint.restore_params(str(tmp_path), step=3)


# ---------------------------------------------------------------- what does not fit


def saved_run(folder, **meta):
    with Checkpoints(str(folder), every=1) as saved:
        saved.save(4, make_state(), make_data(), {"config": CONFIG, "data": FACTS, **meta})
    return f"{folder}/checkpoints/4"


def refusal(folder, wanted, data=None, **kw):
    with Checkpoints(str(folder), every=1) as saved, pytest.raises(UserError) as err:
        saved.restore(wanted, data, **kw)
    return str(err.value)


def test_another_tree(tmp_path):
    where = saved_run(tmp_path)
    wanted = abstract(make_state(width=6))._asdict()
    wanted["params"] = {
        "layer": {"kernel": wanted["params"]["layer"]["kernel"]},
        "head": {"bias": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=CPU)},
    }
    wanted["step"] = jax.ShapeDtypeStruct((), jnp.float32, sharding=CPU)
    del wanted["opt_state"]
    got = refusal(tmp_path, wanted)
    assert got == (
        f"{where} does not fit the model.\n"
        "  missing in the checkpoint:\n"
        "    params.head.bias\n"
        "  missing in the model:\n"
        "    opt_state.0.count\n"
        "    opt_state.0.mu.layer.kernel\n"
        "    opt_state.0.mu.layer.scale\n"
        "    opt_state.0.nu.layer.kernel\n"
        "    opt_state.0.nu.layer.scale\n"
        "    params.layer.scale\n"
        "  different shapes or dtypes:\n"
        "    params.layer.kernel: float32[4,3] in the checkpoint, float32[4,6] in the model\n"
        "    step: int32[] in the checkpoint, float32[] in the model\n"
        "Use another --workdir, or the config and the version of memjax that made it."
    )
    many = {
        **abstract(make_state())._asdict(),
        **{f"x{i:02d}": jax.ShapeDtypeStruct((), jnp.float32) for i in range(15)},
    }
    assert "    x11\n    ... and 3 more\nUse another" in refusal(tmp_path, many)


def test_another_config(tmp_path):
    where = saved_run(tmp_path)
    config = ConfigDict(dict(steps=20, model=dict(dim=8, layers=((("a",), 2),))))
    good = abstract(make_state())
    assert refusal(tmp_path, good, expect={"config": config}) == (
        f"{where} is of a run with another config. Fields that differ, there -> now:\n"
        "  model.dim: 4 -> 8\n  steps: 9 -> 20\n"
        "Use another --workdir, or give the fields the values they have there."
    )
    with Checkpoints(str(tmp_path), every=1) as saved:
        assert saved.restore(good, expect={"config": config}, ignore=("steps", "model.dim"))


def test_other_data(tmp_path):
    where = saved_run(tmp_path)
    facts = {**FACTS, "files": 4, "seed": 1, "hash": "bbbb"}
    assert refusal(tmp_path, abstract(make_state()), make_data(), expect={"data": facts}) == (
        f"{where} was trained on other data: fingerprint aaaa there, bbbb now. "
        "Facts that differ, there -> now:\n  files: 3 -> 4\n  seed: 0 -> 1\n"
        "A run can only continue with the same data in the same order. Use another --workdir, "
        "or the data and settings it had."
    )


def test_no_data_position(tmp_path):
    with Checkpoints(str(tmp_path), every=1) as saved:
        saved.save(4, make_state())
    assert "holds no data position" in refusal(tmp_path, abstract(make_state()), make_data())


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"holds no checkpoint \(no folder .*give the --workdir of"):
        checkpoint.restore_params(str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    Checkpoints(str(tmp_path)).close()
    with pytest.raises(UserError, match="holds no checkpoint; it has none."):
        checkpoint.read_meta(str(tmp_path))


@pytest.mark.parametrize("setting", ["every", "keep"])
def test_impossible_settings(tmp_path, setting):
    with pytest.raises(UserError, match=f"config.checkpoint.{setting}=0: must be at least 1."):
        Checkpoints(str(tmp_path), **{setting: 0})


def test_a_damaged_checkpoint(tmp_path):
    where = saved_run(tmp_path)
    for name in os.listdir(f"{where}/state"):
        if name == "_METADATA":
            os.remove(f"{where}/state/{name}")
    assert "cannot be read" in refusal(tmp_path, abstract(make_state()))


# ---------------------------------------------------------------- kill -9

WRITER = """
import sys, jax.numpy as jnp, numpy as np, grain
from memjax.checkpoint import Checkpoints
rng = np.random.default_rng(0)
noise = jnp.asarray(rng.random((3_000_000,), np.float32))     # 12 MB that do not compress
data = iter(grain.MapDataset.range(100000).to_iter_dataset())
with Checkpoints(sys.argv[1], every=1, keep=2) as saved:
    for step in range(1, 10_000):
        next(data)
        saved.save(step, {'w': noise + step, 'step': jnp.int32(step)}, data, {'n': step})
        print(step, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.06])
def test_kill_in_the_middle_of_a_save(tmp_path, delay):
    """Whatever the moment, the newest complete step restores and the next save goes through."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(checkpoint.__file__)))
    env = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        seen = 0
        while seen < 3:
            line = process.stdout.readline()
            assert line, "the writer ended early"
            seen = int(line)
        time.sleep(delay)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    seen = max([seen, *(int(line) for line in process.stdout.read().split())])
    process.stdout.close()
    data = iter(grain.MapDataset.range(100000).to_iter_dataset())
    wanted = abstract({"w": jnp.zeros(3_000_000), "step": jnp.int32(0)})
    with Checkpoints(str(tmp_path), every=1, keep=2) as saved:
        step, state, meta = saved.restore(wanted, data)
        assert seen - 1 <= step <= seen + 1 and meta == {"n": step} and state["step"] == step
        noise = np.random.default_rng(0).random((3_000_000,), np.float32)
        np.testing.assert_array_equal(state["w"], noise + np.float32(step))
        assert next(data) == step
        assert saved.save(step + 1, state, data, {"n": step + 1})
    with Checkpoints(str(tmp_path), every=1, keep=2) as saved:
        assert saved.latest() == step + 1
    assert not [n for n in os.listdir(tmp_path / "checkpoints") if f"{step + 1}." in n]
