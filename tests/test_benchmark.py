"""The benchmark's gate, records, table and command, at tiny sizes; nothing here is timed."""

import dataclasses
import functools
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags

from memjax import benchmark, cells, forms, inputs, peers, workload
from memjax.cell import FORMS
from memjax.cells.delta_net import DeltaNet
from memjax.config import parse_flags
from memjax.errors import UserError, exit_on_user_error
from memjax.typing import Field
from memjax.workload import Shape

TINY = Shape(batch=2, length=9, heads=2, dim=4, window=5)


@pytest.mark.parametrize("name", cells.names())
def test_the_cells_have_the_sizes_and_the_librarys_chunk(name):
    spec = cells.get(name)
    cell, _, xs = workload.problem(spec, TINY)
    while hasattr(cell, "inner"):  # a wrapper
        cell = cell.inner
    assert cell.value_dim == 4 and getattr(cell, "key_dim", 4) == 4
    for field in dataclasses.fields(cell):
        if field.name in ("chunk", "block", "frozen_chunk"):
            assert getattr(cell, field.name) == field.default
    for leaf in xs:
        assert leaf.shape[:3] == (2, 9, 2) and leaf.dtype == np.float32
    if name == "sliding_window":
        assert cell.window == 5
    if name == "attention":
        assert cell.window >= 9 + workload.STEPS


def test_draw_holds_what_the_fields_say():
    spec = cells.get("gated_delta_net")
    cell = workload.make_cell(spec, TINY)
    xs = inputs.draw(cell, np.random.default_rng(0), 2, 50, 3)
    again = inputs.draw(cell, np.random.default_rng(0), 2, 50, 3)
    for leaf, same in zip(xs, again, strict=True):
        assert np.array_equal(leaf, same)
    for leaf in (xs.q, xs.k):
        np.testing.assert_allclose(np.linalg.norm(leaf, axis=-1), 1, atol=1e-6)
    assert (xs.g <= 0).all() and (0 <= xs.beta).all() and (xs.beta <= 2).all()
    with pytest.raises(ValueError, match="field kind 'vlaue': allowed are query, key"):
        Field("V", "vlaue")


@dataclasses.dataclass(frozen=True)
class WrongValues(DeltaNet):
    """Its chunked form forgets to carry 0.1 % of the answer."""

    def chunked(self, params, state, xs, reset, write):
        y, state = super().chunked(params, state, xs, reset, write)
        return 0.999 * y, state


@dataclasses.dataclass(frozen=True)
class WrongGradient(DeltaNet):
    """Its chunked form has the right values and stops the gradient of beta."""

    def chunked(self, params, state, xs, reset, write):
        xs = xs._replace(beta=jax.lax.stop_gradient(xs.beta))
        return super().chunked(params, state, xs, reset, write)


@pytest.mark.parametrize("cell", [WrongValues, WrongGradient])
def test_the_gate_refuses_a_wrong_form(cell):
    spec = dataclasses.replace(cells.get("delta_net"), cell=lambda: cell(8, 6))
    assert workload.check(spec, TINY, ["scan"]) == {"scan": 0.0}
    with pytest.raises(UserError, match="delta_net, chunked: relative distance .* is not timed"):
        benchmark.measure(spec, TINY)


def test_the_gate_refuses_what_is_not_finite():
    assert workload.distances([np.array([1.0, np.nan])], [np.ones(2)]) == [math.inf]
    assert workload.distances([np.ones(2)], [np.ones(2)]) == [0.0]


def test_records():
    said = []
    records = benchmark.measure(cells.get("gated_delta_net"), TINY, repeats=1, say=said.append)
    scan, chunked = records
    assert [scan["form"], chunked["form"]] == ["scan", "chunked"] and len(said) == 2
    for record in records:
        for key in ("forward_ms", "both_ms", "decode_us", "compile_s", "peak_bytes", "flops"):
            assert record[key] > 0, key
        assert record["state_bytes"] == 2 * 4 * 4 * 4
        assert record["both_x"] == scan["both_ms"] / record["both_ms"]
    assert chunked["distance_from_scan"] <= 1e-4
    lines = benchmark.table(records).splitlines()
    assert len(lines) == 3 and lines[0].startswith("cell")
    assert {line.rindex(" ") for line in lines}  # every row has several columns
    assert len({len(line) for line in lines}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", benchmark.distinct(cells.names()))
def test_twice_the_tokens_take_twice_the_memory(name):
    """Temporary memory of the chunked form, forward and backward, as the README says."""
    few, many = (chunked_peak(cells.get(name), length) for length in (2048, 4096))
    assert 0 < many <= 2.1 * few


def chunked_peak(spec, length):
    cell, params, xs = workload.problem(spec, Shape(length=length))
    y, _ = jax.eval_shape(functools.partial(workload.forward, cell, "chunked"), params, xs)
    both = functools.partial(workload.backward, cell, "chunked")
    return benchmark.compile_(both, params, xs, np.zeros(y.shape, y.dtype))[2]


def test_what_is_too_large_is_not_timed():
    records = benchmark.measure(cells.get("delta_net"), TINY, ["chunked"], 1, limit=0)
    (record,) = records
    assert record["both_ms"] is None and record["both_x"] is None and record["peak_bytes"] > 0
    assert " - " in benchmark.table(records)


def test_peers_that_are_not_installed_are_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (peer,) = peers.of("gated_delta_net")
    _, _, xs = workload.problem(cells.get("gated_delta_net"), TINY)
    with pytest.raises(UserError, match=r"--peers needs torch.*pip install -e '.\[peers\]'"):
        peer.answers(xs)


@pytest.mark.parametrize("name", sorted({peer.cell for peer in peers.PEERS}))
def test_peers_do_the_same_work(name):
    pytest.importorskip("torch", reason="needs torch: pip install -e '.[peers]'")
    pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[peers]'")
    records = benchmark.measure(cells.get(name), TINY, repeats=1, others=True)
    found = {record["form"]: record for record in records}
    for peer in peers.of(name):
        assert found[peer.name]["distance_from_scan"] <= 1e-5 and found[peer.name]["both_ms"] > 0


def test_layers_of_peers_are_timed_beside_ours():
    pytest.importorskip("titans_pytorch", reason="needs titans-pytorch: pip install -e '.[peers]'")
    shape = dataclasses.replace(TINY, length=64)
    records = benchmark.measure(cells.get("titans"), shape, repeats=1, others=True)
    found = {record["form"]: record for record in records}
    for name in ("memjax layer", "titans-pytorch layer"):
        assert found[name]["forward_ms"] > 0 and found[name]["both_ms"] > 0


def row(form, length, forward, both, kind="DeltaNet"):
    return {"class": kind, "form": form, "length": length, "forward_ms": forward, "both_ms": both}


def test_measurements_decide_which_form_runs(monkeypatch):
    records = [row("scan", 64, 1, 9), row("chunked", 64, 2, 3)]
    records += [row("scan", 4096, 5, None), row("chunked", 4096, 4, 7)]
    old = {"cpu": {"Other": 1, "DeltaNet": 2}, "tpu": 3}
    table = forms.updated(old, "cpu", records)
    assert table["tpu"] == 3 and table["cpu"]["Other"] == 1
    monkeypatch.setattr(forms, "table", lambda: table)
    assert forms.fastest("cpu", "DeltaNet", 1, False) == ()  # 64 tokens tell nothing of one
    assert forms.fastest("cpu", "DeltaNet", 500, False) == ("scan", "chunked")
    assert forms.fastest("cpu", "DeltaNet", 600, False) == ("chunked", "scan")
    assert forms.fastest("cpu", "DeltaNet", 9, True) == ("chunked", "scan")
    assert forms.fastest("cpu", "DeltaNet", 9999, True) == ("chunked",)
    assert forms.fastest("cpu", "Unmeasured", 9, True) == ()
    cell = DeltaNet(8, 6)
    assert cell.preferred(9, False) == ("scan", "chunked")
    assert cell.preferred(9999, True) == ("chunked", "scan")


def test_the_kept_measurements_name_cells_and_forms():
    kinds = {type(cells.get(name).cell()).__name__ for name in cells.names()}
    for by_kind in forms.table().values():
        assert set(by_kind) <= kinds
        for directions in by_kind.values():
            assert set(directions) <= set(forms.DIRECTIONS)
            for length, order in (row for rows in directions.values() for row in rows):
                assert length > 0 and order and set(order) <= set(FORMS)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "memjax.benchmark", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_command(tmp_path):
    out = tmp_path / "figures.json"
    done = command(
        "--cells=linear_attention", "--length=5,1", "--heads=1", "--dim=2", "--repeats=1",
        f"--out={out}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("linear_attention") == 4
    figures = json.loads(out.read_text(encoding="utf-8"))
    found = [(r["length"], r["form"]) for r in figures["records"]]
    assert found == [(5, "scan"), (5, "chunked"), (1, "scan"), (1, "chunked")]
    assert figures["platform"] == "cpu"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert done.stdout.splitlines()[1].split()[:2] == ["cell", "form"]


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, monkeypatch):
    out, values = tmp_path / "figures.json", flags.FlagValues()
    benchmark.define_flags(values)
    values(["", "--cells=delta_net", "--length=5,1", f"--out={out}"])
    monkeypatch.setattr(flags, "FLAGS", values)

    def measure(spec, shape, *_):
        if shape.length == 1:
            raise KeyboardInterrupt
        return [{"length": 5}]

    monkeypatch.setattr(benchmark, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([""])
    assert json.loads(out.read_text(encoding="utf-8"))["records"] == [{"length": 5}]


@pytest.mark.parametrize("out", ["nowhere/x.json", "x.png"])
def test_a_file_that_cannot_be_written_is_refused_at_once(out):
    done = command("--cells=delta_net", f"--out={out}")
    assert done.returncode == 2 and done.stdout == ""
    assert f"--out={out}: expected a file *.json in a folder that exists" in done.stderr


def test_no_form_at_all_is_one_message():
    done = command("--cells=delta_net", "--forms=pallas", "--length=5")
    assert done.returncode == 2 and done.stdout.count("\n") == 1
    assert "--forms=pallas: none of these cells has such a form here: delta_net" in done.stderr


# flags, and what the message says
MISTAKES = {
    "--cells=delta_nte": "Did you mean 'delta_net'?",
    "--forms=chunkd": "--forms: no form 'chunkd'; allowed: scan, chunked, pallas",
    "--length=64,0": "--length=64,0: expected numbers of tokens",
    "--chunk=12": "--chunk=12: expected a power of two",
    "--dim=many": "many",
    "--lenght=5": "length",
    "extra": "'extra' is no flag",
}


@exit_on_user_error
def start(flag):
    values = flags.FlagValues()
    benchmark.define_flags(values)
    rest = parse_flags(["benchmark", flag], config=False, flag_values=values)
    return benchmark.chosen(values, rest)


def test_mistakes_are_one_message(capsys):
    for given, message in MISTAKES.items():
        with pytest.raises(SystemExit) as stop:
            start(given)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
