"""Steps compiled for devices that are not there: virtual ones here, TPUs in tests/kernels."""

import dataclasses
import json

import jax
import pytest
import tiny_runs as runs
from jax.sharding import AbstractMesh, AxisType

from memjax import aot, axes, chips
from memjax.config import UserError


def test_a_step_on_virtual_devices(tmp_path):
    """XLA's own count of what a device is handed is that of the shards; no file is read."""
    sizes = {"model.dim": 16, "data.length": 16, "data.glob": "/none/*.txt", "batch": 8}
    settings = {**sizes, "data.bpe": 300, "model.vocab": 300, "mesh.context": 2, "accumulate": 2}
    changed = [f"--config.{name}={value}" for name, value in settings.items()]
    out = tmp_path / "figures.json"
    process = runs.command(
        "aot", f"--config={runs.TEXT}", "--topology=cpu:4", f"--out={out}", *changed, XLA_FLAGS=""
    )
    shown, _ = runs.finish(process)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["devices"] == 4 and found["mesh"] == {"fsdp": 2, "context": 2}
    held = found["bytes"]
    parts = sum(held[name] for name in ("parameters", "optimiser", "batch"))
    assert held["arguments"] == parts + 4  # the number of the step, which lies everywhere
    assert held["batch"] == 8 / 2 * 16 / 2 * (4 + 4 + 1 + 1)  # inputs, targets, mask, reset
    assert 2 * found["parameters"] < held["parameters"] < 3 * found["parameters"]  # half of most
    assert held["peak"] > held["arguments"] + held["temporary"] > held["arguments"]
    assert found["collectives"]["all-reduce"]["count"] > 0
    assert found["products"] > 8 * 16 * found["flops_per_token"] > 0  # chunks, and rematerialised
    assert "4 x cpu, mesh fsdp 2, context 2\n8 x 16 tokens a step in 2 pieces" in shown


LOOP = """
%body (p: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {
  %gathered = f32[4,8]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  %start = (f32[2,8], f32[2,8], u32[]) collective-permute-start(%x), channel_id=2
  %done = f32[2,8] collective-permute-done(%start)
  %inner = (s32[]) while(%t), condition=%c, body=%inside, KNOWN{"n":"3"}}
  %begun = (bf16[4], bf16[8]) fusion(%y), kind=kCustom, calls=%part
}

%inside (p: (s32[])) -> (s32[]) {
  %more = bf16[8]{0} fusion(%y), kind=kCustom, calls=%other_part
}

%part (p: bf16[4]) -> bf16[8] {
  %a = bf16[8]{0} all-gather(%p), channel_id=3, dimensions={0}
}

%other_part (p: bf16[4]) -> bf16[8] {
  %b = bf16[8]{0} all-gather(%p), channel_id=3, dimensions={0}
}

ENTRY %main (p: f32[2,8]) -> f32[] {
  %loop = (s32[], f32[2,8]) while(%t), condition=%c, body=%body, KNOWN{"n":"5"}}
  ROOT %sums = (f32[], pred[3]) all-reduce(%u, %v), channel_id=4, to_apply=%add
}
""".replace("KNOWN", 'backend_config={"known_trip_count":')


def test_collectives_are_counted_as_often_as_they_run():
    assert aot.collectives(LOOP) == {
        "all-gather": {"count": 10, "bytes": 5 * (4 * 8 * 4 + 8 * 2)},
        "all-reduce": {"count": 1, "bytes": 4 + 3},
        "collective-permute": {"count": 5, "bytes": 5 * 2 * 8 * 4},
    }


@pytest.mark.parametrize(
    ("topology", "message"),
    {
        "v9:2x2": "--topology=v9:2x2: no such topology; write GENERATION:CHIPS with one of v4, v5e",
        "v5e": "no such topology; write .* such as v5e:4x4 or v5p:2x2x4, or cpu:NUMBER",
        "cpu:0": "no such topology",
        "": "--topology=: no such topology; write GENERATION:CHIPS",
        "cpu:1000": "has [0-9]+ CPU devices already; start another one",
    }.items(),
)
def test_topologies_that_there_are_not(topology, message):
    jax.devices()
    with pytest.raises(UserError, match=message):
        aot.devices(topology)


def test_a_machine_without_libtpu(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="libtpu, which compiles for TPUs, is not .* or take cpu:8"):
        aot.devices("v5e:4x4")


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory in memory space hbm. Used 17.25G of 15.75G hbm.\nTotal hbm usage >= ..",
        "CompileTimeHbmOom: HLO temporaries (17.25G) exceeds available HBM (15.75G).\nSee ..",
    ],
)
def test_what_a_compiler_says_that_finds_no_room(message):
    found = aot.refused(f"RESOURCE_EXHAUSTED: {message}")
    assert found["fits"] is False
    assert (found["needs"], found["offered"]) == (17.25 * 2**30, 15.75 * 2**30)
    assert aot.verdict(found).endswith(
        "needs 17.25 GiB, 1.50 GiB more than the 15.75 GiB there are"
    )
    assert aot.refused("INTERNAL: no") == {}


def test_forms_follow_the_mesh_in_force():
    kind = jax.sharding.AbstractDevice
    known = {"device_kind": "TPU v5 lite", "num_cores": 1, "platform": "tpu"}
    names = [field.name for field in dataclasses.fields(kind)]  # jax 0.7 has no platform
    device = kind(**{name: known[name] for name in names})
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    assert axes.mesh_platform() is None and axes.platform() == jax.default_backend()
    with jax.sharding.use_abstract_mesh(mesh):
        assert axes.platform() == "tpu"


@pytest.mark.parametrize(
    ("kind", "platform", "cores", "flops"),
    [
        ("TPU v5 lite", "tpu", 1, 197e12),
        ("TPU v5", "tpu", 2, 459e12),
        ("TPU v4", "tpu", 1, 137.5e12),
        ("TPU7x", "tpu", 1, 1153.5e12),
        ("NVIDIA H100 80GB HBM3", "gpu", None, 989.4e12),
        ("cpu", "cpu", None, None),
    ],
)
def test_peaks(kind, platform, cores, flops):
    @dataclasses.dataclass
    class Device:
        device_kind: str
        platform: str
        num_cores: int | None

    device = Device(kind, platform, cores)
    assert chips.peak([device]) == flops
    assert flops is None or chips.peak([device] * 4) == 4 * flops
