"""The benchmark of the kernels, as far as it goes without a GPU."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bench, common, interpreted, ops

needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < common.GPU_JAX, reason="the GPU interpreter needs jax 0.11.2"
)


def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.bench"],
        cwd=Path(bench.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "bench times kernels on a GPU; the platform here is cpu"


@pytest.mark.parametrize("text", ["4,2048,16", "4,2048,16,x", "4 2048 16 128"])
def test_a_shape_has_four_numbers(text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--shapes", text])
    with pytest.raises(SystemExit):
        bench.main()
    assert f"'{text}' is not B,T,H,D, such as 4,2048,16,128" in capsys.readouterr().err


def test_the_table():
    case = {"op": "chunk_linear", "decay": "head", "shape": (2, 64, 4, 128)}
    rows = [
        {**case, "direction": "forward", "ours": 0.5e-3, "fla": 1e-3, "plain": 0.02},
        {**case, "direction": "both", "ours": 1e-3, "plain": 0.04},
    ]
    assert bench.table(rows).splitlines()[2:] == [
        "| chunk_linear | head | 2, 64, 4, 128 | forward | 0.500 | 1.000 | 20.000 | 2.00 |",
        "| chunk_linear | head | 2, 64, 4, 128 | both | 1.000 |  | 40.000 |  |",
    ]


def test_a_measurement_is_of_many_calls(monkeypatch):
    """A clock that only the calls move: two seconds the first call, 1/128 each other."""
    times = {"now": 0.0, "calls": 0}

    def call():
        times["now"] += 1 / 128 if times["calls"] else 2
        times["calls"] += 1

    monkeypatch.setattr(bench.time, "perf_counter", lambda: times["now"])
    assert bench.timed(call, lambda found: None, 5) == 1 / 128
    assert times["calls"] == 2 + 1 + 5 * 3


@pytest.mark.slow
@needs_interpreter
@pytest.mark.parametrize("case", bench.CASES, ids="-".join)
@pytest.mark.parametrize("form", ["ours", "plain"])
def test_what_is_right_is_timed(case, form):
    """cuDNN cannot be interpreted."""
    if (form, case[0]) == ("ours", "window_attention"):
        pytest.skip("cuDNN needs a GPU")
    with interpreted("gpu", gpu_interpreter()):
        assert not bench.wrong(*case, bench.forms(*case)[form], (1, 128, 1, 64))


def test_what_is_wrong_is_not_timed():
    case = ("chunk_linear", "head")

    def shifted(q, k, v, g):
        return ops.OPS[case][1](q, k, jnp.roll(v, 1, axis=1), g, chunk=64)

    error = bench.wrong(*case, bench.in_jax(shifted), (1, 64, 1, 64))
    assert re.fullmatch(r"(d[gkqv]|o|state) is .* off, at most 0.01", error)


def test_the_whole_command(monkeypatch, capsys):
    """With plain forms in the place of kernels, and a peer that refuses."""

    def refuses(*given):
        raise RuntimeError("known to be wrong")

    def forms(op, decay):
        plain = bench.in_jax(ops.OPS[op, decay][1])
        return {"ours": plain, "plain": plain, "fla": refuses}

    for name, value in {"TRIED": (1, 128, 1), "LEAST": 0, "forms": forms}.items():
        monkeypatch.setattr(bench, name, value)
    command = "bench --ops chunk_linear --shapes 1,128,1,64 --repeats 1 --forms ours fla"
    monkeypatch.setattr(bench.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(sys, "argv", command.split())
    bench.main()
    written = capsys.readouterr()
    head, _, *lines = written.out.strip().splitlines()
    assert head.startswith("cpu, on ") and head.endswith("medians of 1.")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[:4] for row in rows] == [
        ["chunk_linear", decay, "1, 128, 1, 64", direction]
        for decay in ("none", "head", "channel")
        for direction in bench.DIRECTIONS
    ]
    assert all(float(row[4]) > 0 and row[5:] == ["", "", ""] for row in rows)
    assert "chunk_linear, decay head, without fla: known to be wrong" in written.err


def gpu_interpreter():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams()
