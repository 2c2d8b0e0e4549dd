"""Records that survive kills, late reading, the clock, the progress line, the curve."""

import io
import json
import math
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from memjax import metrics, progress
from memjax.errors import UserError


def steps_of(path):
    return [r["step"] for r in metrics.read_records(str(path))]


def test_jsonl_values(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = metrics.Jsonl(str(path))
    log.write(jnp.int32(1), {"loss": jnp.float32(0.1), "n": np.int64(3), "bad": jnp.float32("nan")})
    log.write(2, {"kind": "eval", "accuracy": 0.5})
    log.flush()
    log.close()
    one, two = (json.loads(line) for line in path.read_text().splitlines())
    assert one.pop("time") > 1e9
    assert one == {"step": 1, "kind": "train", "loss": float(np.float32(0.1)), "n": 3, "bad": None}
    assert two["kind"] == "eval" and isinstance(one["n"], int)


def test_jsonl_resume(tmp_path):
    """A kill leaves half a line; resuming drops it and what is after the restored step."""
    path = tmp_path / "metrics.jsonl"
    log = metrics.Jsonl(str(path))
    for step in range(1, 6):
        log.write(step, {"loss": step})
    log.write(4, {"kind": "eval", "loss": 9})
    log.close()
    with open(path, "a") as f:
        f.write('{"step": 6, "lo')
    assert steps_of(path) == [1, 2, 3, 4, 5, 4]
    log = metrics.Jsonl(str(path))  # opening alone repairs the end
    log.write(7, {"loss": 0})
    assert steps_of(path) == [1, 2, 3, 4, 5, 4, 7]
    assert log.truncate_after(4) == 2
    log.write(5, {"loss": 0})
    assert steps_of(path) == [1, 2, 3, 4, 4, 5]
    assert log.truncate_after(9) == 0
    log.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_jsonl_odd_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n[1]\n{"loss": 1}\n{"step": "x"}\n{"step": 2}')
    assert steps_of(path) == [1]
    metrics.Jsonl(str(path)).close()
    assert path.read_text() == '{"step": 1}\n'
    assert metrics.read_records(str(tmp_path / "absent")) == []


def test_metrics_new_and_resumed(tmp_path):
    for restored, expected in ((None, [1, 2, 3]), (2, [1, 2, 1, 2, 3]), (None, [1, 2, 3])):
        run = metrics.Metrics(str(tmp_path / "run"), restored)
        for step in (1, 2, 3):
            run.write(step, {"loss": 1.0})
        run.flush()
        run.close()
        assert steps_of(tmp_path / "run" / "metrics.jsonl") == expected


@pytest.mark.parametrize("name, flag", [("tensorboardX", "tensorboard"), ("wandb", "wandb")])
def test_missing_package(tmp_path, monkeypatch, name, flag):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as err:
        metrics.Metrics(str(tmp_path), **{flag: True})
    assert str(err.value) == (
        f"config.log.{flag}=True needs the package {name}, which is not installed; "
        f"run `pip install {name}`, or leave config.log.{flag} at False."
    )


def test_other_writers(tmp_path, monkeypatch):
    """Against stand-ins with the same calls: what is written, and a W&B run that continues."""
    calls = []

    class Recorder:
        def __init__(self, *args, **settings):
            calls.append(("open", args, settings))

        def __getattr__(self, name):
            return lambda *args, **settings: calls.append((name, args, settings))

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Recorder))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Recorder))
    ids = []
    for restored in (None, 4):
        calls.clear()
        run = metrics.Metrics(
            str(tmp_path),
            restored,
            tensorboard=True,
            wandb=True,
            config={"steps": 5, "layers": ("a",)},
        )
        run.write(5, {"kind": "eval", "loss": jnp.float32(2), "note": "text"})
        run.flush()
        run.close()
        assert calls[0][2] == {"purge_step": None if restored is None else 5}
        assert calls[1][2]["config"] == {"steps": 5, "layers": ["a"]}
        ids.append(calls[1][2]["id"])
        assert ("add_scalar", ("eval/loss", 2.0, 5), {}) in calls
        assert ("log", ({"eval/loss": 2.0},), {"step": 5}) in calls
        assert [c[0] for c in calls][-2:] == ["close", "finish"]
    assert ids[0] == ids[1]


def test_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboardX")
    run = metrics.Metrics(str(tmp_path), tensorboard=True)
    run.write(1, {"loss": 1.0})
    run.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_summary(tmp_path):
    path = tmp_path / "summary.json"
    metrics.write_json(
        str(path),
        {
            "finished": True,
            "z": jnp.float32(0.5),
            "a": {"x": math.inf},
            "n": np.int32(3),
            "v": (1, 2),
        },
    )
    text = path.read_text()
    assert json.loads(text) == {"finished": True, "z": 0.5, "a": {"x": None}, "n": 3, "v": [1, 2]}
    assert list(json.loads(text)) == ["finished", "z", "a", "n", "v"]
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_late():
    late = metrics.Late()
    assert late.flush() is None
    assert late.push(1, {"loss": jnp.float32(1.5), "n": jnp.int32(2)}) is None
    assert late.push(2, {"loss": jnp.bfloat16(2.5)}) == (1, {"loss": 1.5, "n": 2})
    assert late.flush() == (2, {"loss": 2.5}) and late.flush() is None


def test_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = metrics.Clock(window=2)
    assert clock.tokens_per_second() == 0 and clock.eta(5) == math.inf
    now[0] += 30  # compilation
    clock.start()
    for _ in range(3):
        now[0] += 2
        clock.tick(100)
    with clock.paused():
        now[0] += 50  # evaluation
    now[0] += 4
    clock.tick(100)
    assert (clock.spent, clock.steps, clock.tokens) == (10.0, 4, 400)
    assert clock.tokens_per_second() == pytest.approx(200 / 6)  # the last two steps
    assert clock.mean_tokens_per_second() == 40 and clock.eta(4) == pytest.approx(12)
    again = metrics.Clock(**json.loads(json.dumps(clock.state())))
    with again.paused():  # paused before it started: stays so
        now[0] += 9
    again.tick(100)  # only starts it
    now[0] += 1
    again.tick(100)
    assert (again.spent, again.steps, again.tokens) == (11.0, 5, 500)


def test_clock_counts_the_step_in_flight(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(
        metrics.jax, "block_until_ready", lambda state: now.__setitem__(0, now[0] + 3)
    )
    clock = metrics.Clock()
    clock.start()
    now[0] += 1
    clock.tick(8)
    with clock.paused(wait_for="state"):
        now[0] += 40
    assert clock.spent == 4 and clock.tokens_per_second() == 2


# ---------------------------------------------------------------- for people


def test_numbers():
    human = {
        0: "0",
        7: "7",
        0.81: "0.81",
        999: "999",
        999.7: "1k",
        1234: "1.23k",
        41234: "41.2k",
        412345: "412k",
        999_600: "1M",
        1_230_000: "1.23M",
        2.5e9: "2.5G",
        3e15: "3000T",
        -1500: "-1.5k",
        math.nan: "nan",
    }
    assert {n: progress.human(n) for n in human} == human
    times = {
        0.42: "0.4s",
        48.2: "48s",
        59.6: "1m00s",
        725: "12m05s",
        3599.7: "1h00m",
        8040: "2h14m",
        86399: "1d00h",
        273600: "3d04h",
        math.inf: "?",
    }
    assert {t: progress.duration(t) for t in times} == times
    rates = {2.9e-4: "2.9e-4", 1e-3: "1.0e-3", 0: "0", 12: "1.2e1"}
    assert {r: progress.scientific(r) for r in rates} == rates


def test_line():
    values = dict(
        loss=3.4117,
        bits_per_byte=4.9219,
        grad_norm=0.81,
        lr=2.9e-4,
        tokens_per_second=412345,
        eta=8040,
        kind="train",
        time=1.0,
    )
    assert progress.format_line(1200, 20000, values) == (
        "step  1200/20000   6.0% | loss  3.412 | 4.922 bits/byte | grad  0.81 | lr 2.9e-4 | "
        " 412k tok/s | eta  2h14m"
    )
    first = progress.format_line(
        1,
        20000,
        {**values, "loss": 10.5, "grad_norm": 12.25, "eta": 5, "tokens_per_second": 98.7, "lr": 0},
    )
    assert len(first) == len(progress.format_line(1200, 20000, values))
    assert progress.format_line(5, 5, dict(kind="eval", query_accuracy=jnp.float32(0.973))) == (
        "eval 5/5 100.0% | accuracy  97.3%"
    )
    assert "loss    nan | grad   inf" in progress.format_line(
        1, 2, dict(loss=math.nan, grad_norm=math.inf)
    )
    assert "bits" not in progress.format_line(1, 2, dict(loss=1, bits_per_byte=None))


def test_lines_and_bar():
    stream = io.StringIO()
    shown = progress.Progress(10, stream=stream)
    shown.note("compiled in 3s")
    shown.update(5, {"loss": 1.0})
    shown.close()
    assert stream.getvalue() == "compiled in 3s\nstep  5/10  50.0% | loss  1.000\n"
    stream = io.StringIO()
    shown = progress.Progress(10, step=2, stream=stream, bar=True)
    shown.update(5, {"loss": 1.0})
    shown.update(5, {"kind": "eval", "loss": 2.0})
    shown.update(10, {"loss": 0.5})
    shown.close()
    text = stream.getvalue()
    assert "eval  5/10  50.0% | loss  2.000\n" in text and "step 10/10 100.0% | loss  0.500" in text


def test_curve(tmp_path):
    path, png = str(tmp_path / "metrics.jsonl"), str(tmp_path / "loss.png")
    assert progress.plot_loss(path, png) is None
    log = metrics.Jsonl(path)
    for step in range(1, 200):
        log.write(step, {"loss": 5 / step**0.3, "bits_per_byte": 8 / step**0.3})
    log.write(50, {"loss": math.nan})
    log.write(100, {"kind": "eval", "bits_per_byte": 3.0})
    log.close()
    lines = {"uniform": 8, "bigram": 3.4, "zlib -9": 3.38}
    assert progress.plot_loss(path, png, lines, title="a run") == png
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert progress.plot_loss(path, str(tmp_path / "log.png"), key="loss", log_x=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.png", "loss.png", "metrics.jsonl"]


def test_smoothing_is_a_trailing_mean():
    values = np.arange(120.0)
    smooth = progress._smooth(values)
    np.testing.assert_allclose(smooth[:9], values[:9])
    np.testing.assert_allclose(smooth[9:14], values[9:14] - 0.5)
    np.testing.assert_allclose(smooth[14:], values[14:] - 1)
