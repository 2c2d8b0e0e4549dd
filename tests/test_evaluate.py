"""Held-out figures taken apart: against the training run's own, and against plain loops."""

import functools
import json
import math
import shutil

import numpy as np
import pytest
import tiny_runs as runs

from memjax import data, evaluate, metrics, tasks, train
from memjax.errors import UserError

compiled_once = runs.compiled_once
LN2 = math.log(2)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return runs.trained(tmp_path_factory)


@pytest.fixture(scope="module")
def recall(tmp_path_factory):
    """A finished run on forgetting MQAR."""
    folder = tmp_path_factory.mktemp("recall") / "run"
    settings = {**runs.TASK, "data.length": 32, "data.updates": 1, "model.vocab": 64}
    settings["data.vocab"] = 64
    source = f"{runs.ROOT}/configs/forgetting_mqar.py:delta_net"
    train.train(runs.load(source, settings), str(folder))
    return str(folder)


def test_text_adds_up_to_the_figure_of_training(workdir):
    found = evaluate.evaluate(workdir)
    expected = json.load(open(f"{workdir}/summary.json"))["bits_per_byte"]
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    for group in ("by_context", "by_file"):
        tokens = np.array([row["bytes"] for row in found[group]])
        bits = np.array([row["bits_per_byte"] for row in found[group]])
        assert np.average(bits, weights=tokens) == pytest.approx(expected, rel=1e-5)
    sizes = {name: len(text.encode()) for name, text in runs.PAGES.items()}
    assert {row["name"]: row["bytes"] for row in found["by_file"]}.items() <= sizes.items()
    assert len(found["by_file"]) > 1
    assert [(r["from"], r["to"]) for r in found["by_context"]][:3] == [(1, 1), (2, 3), (4, 7)]


@pytest.mark.slow
def test_longer_rows_show_more_context_and_are_read_in_pieces(workdir, monkeypatch):
    found = evaluate.evaluate(workdir, length=64)
    assert found["length"] == 64
    assert max(row["from"] for row in found["by_context"]) == 64
    monkeypatch.setattr(evaluate, "PIECE", 24)  # a piece in the middle, and a short one
    again = evaluate.evaluate(workdir, length=64)
    for row, same in zip(found["by_context"], again["by_context"], strict=True):
        assert same == {**row, "bits_per_byte": pytest.approx(row["bits_per_byte"], rel=1e-5)}


@pytest.mark.slow
def test_some_rows_of_text(workdir):
    found, whole = evaluate.evaluate(workdir, rows=3), evaluate.evaluate(workdir)
    assert "by_file" not in found and "by_file" in whole
    bytes_ = [sum(row["bytes"] for row in each["by_context"]) for each in (found, whole)]
    assert 0 < bytes_[0] <= 4 * 16 < bytes_[1]  # one batch of rows of 16 bytes


def test_context_and_files_are_counted_across_rows():
    """Two documents of 3 and 4 bytes in rows of 5, against a loop over the stream."""
    reset = np.array([[1, 0, 0, 0, 1], [0, 0, 0, 0, 0]], bool)
    mask = np.array([[1, 1, 1, 0, 1], [1, 1, 1, 0, 0]], bool)
    nats = np.arange(10.0).reshape(2, 5)
    batch = {"reset": reset, "mask": mask, "nats": nats, "targets": np.ones((2, 5), int)}
    found = evaluate.of_text(iter([batch]), ["a", "b"], np.array([0, 1]))
    assert found["by_file"] == [
        {"name": "a", "bits_per_byte": pytest.approx(1 / LN2), "bytes": 3},
        {"name": "b", "bits_per_byte": pytest.approx((4 + 5 + 6 + 7) / 4 / LN2), "bytes": 4},
    ]
    by_context = {
        row["from"]: (row["bits_per_byte"] * LN2, row["bytes"]) for row in found["by_context"]
    }
    assert by_context[1] == (pytest.approx((0 + 4 + 5) / 3), 3)  # a row begins without a past
    assert by_context[2] == (pytest.approx((1 + 2 + 6 + 7) / 4), 4)


def test_task_by_distance_and_by_group(recall):
    found = evaluate.evaluate(recall)
    expected = json.load(open(f"{recall}/summary.json"))
    assert found["query_accuracy"] == pytest.approx(expected["query_accuracy"])
    assert found["sequence_accuracy"] == pytest.approx(expected["sequence_accuracy"])
    assert sum(row["queries"] for row in found["by_distance"]) == 8 * 2
    assert [row["rebound"] for row in found["by_rebound"]] == [True, False]
    assert found["by_rebound"][0]["query_accuracy"] == pytest.approx(
        expected["query_accuracy/rebound"]
    )


@pytest.mark.slow
def test_rows_of_a_task_may_be_longer_and_fewer(recall):
    found = evaluate.evaluate(recall, length=62, rows=5)
    assert found["length"] == 62
    assert sum(row["queries"] for row in found["by_distance"]) == 5 * 2
    assert max(row["distance"] for row in found["by_distance"]) > 32


def test_task_against_a_loop():
    rng = np.random.default_rng(0)
    mask = rng.random((6, 9)) < 0.5
    mask[2] = False  # a row that fills up the last batch
    batch = {
        "mask": mask,
        "correct": mask & (rng.random((6, 9)) < 0.6),
        "distance": rng.integers(1, 4, (6, 9)) * mask,
        "inputs": np.zeros((6, 9), int),
        "targets": rng.integers(0, 3, (6, 9)) * mask,
        "nats": rng.random((6, 9)) * mask,
        "depth": np.array([0, 7, 7, 7, 0, 7]),
    }
    parts = [{k: v[:4] for k, v in batch.items()}, {k: v[4:] for k, v in batch.items()}]
    found = evaluate.of_task(iter(parts), 0.25)
    assert found["query_accuracy"] == pytest.approx(batch["correct"].sum() / mask.sum())
    rows = [batch["correct"][i][mask[i]].all() for i in range(6) if i != 2]
    assert found["sequence_accuracy"] == pytest.approx(np.mean(rows))
    assert found["scaled_accuracy"] == pytest.approx((found["query_accuracy"] - 0.25) / 0.75)
    of_answers = [batch["correct"][mask & (batch["targets"] == a)].mean() for a in range(3)]
    assert found["macro_accuracy"] == pytest.approx(np.mean(of_answers))
    assert found["loss"] == pytest.approx(batch["nats"].sum() / mask.sum())
    assert "by_position" not in found  # other positions stand between the scored ones
    for row in found["by_distance"]:
        chosen = mask & (batch["distance"] == row["distance"])
        assert row["queries"] == chosen.sum()
        assert row["query_accuracy"] == pytest.approx(batch["correct"][chosen].mean())
    for row, used in zip(found["by_depth"], ([0, 4], [1, 3, 5]), strict=True):
        shares = [batch["correct"][i][mask[i]].mean() for i in used]
        assert row == {
            "depth": batch["depth"][used[0]],
            "query_accuracy": pytest.approx(np.mean(shares)),
            "sequence_accuracy": pytest.approx(np.mean([share == 1 for share in shares])),
            "rows": len(used),
        }
    shown = evaluate.table(found).splitlines()
    assert shown[-1].split() == ["7", *(f"{row[f]:.4f}" for f in list(row)[1:3]), "3"]


def test_a_fact_of_many_values_is_shown_by_octaves():
    sizes = np.arange(40, 140)
    right = np.random.default_rng(0).random(100)
    lines = evaluate.by_fact("size", sizes, {"query_accuracy": right})
    assert [(line["size"], line["to"], line["rows"]) for line in lines] == [
        (40, 63, 24), (64, 127, 64), (128, 139, 12),
    ]  # fmt: skip
    for line in lines:
        inside = (sizes >= line["size"]) & (sizes <= line["to"])
        assert line["query_accuracy"] == pytest.approx(right[inside].mean())
    assert len(evaluate.by_fact("size", sizes[:24], {"query_accuracy": right[:24]})) == 24


def test_consecutive_positions_against_a_loop():
    """Rows of 7, 3 and 7 scored positions, and one that fills up the last batch."""
    rng = np.random.default_rng(1)
    mask = np.zeros((4, 9), bool)
    mask[0, 1:8] = mask[1, 4:7] = mask[3, 2:] = True
    correct = mask & (rng.random((4, 9)) < 0.8)
    batch = {"mask": mask, "correct": correct, "targets": mask.astype(int)}
    batch |= {name: rng.random((4, 9)) * mask for name in ("nats", "oracle")}
    found = evaluate.of_task(iter([batch]), 0.5)
    assert found["oracle"] == pytest.approx(batch["oracle"].sum() / mask.sum())
    assert "by_distance" not in found
    rows = [np.flatnonzero(mask[i]) for i in (0, 1, 3)]
    for line, low in zip(found["by_position"], (0, 1, 2, 4), strict=True):
        parts = [(i, at[low : line["to"]]) for i, at in zip((0, 1, 3), rows, strict=True)]
        for name, array in (("query_accuracy", correct), ("loss", batch["nats"])):
            values = np.concatenate([array[i, at] for i, at in parts])
            assert line[name] == pytest.approx(values.mean())
        prefixes = [at[: line["to"]] for at in rows]
        whole = [
            correct[i, at].all()
            for i, at in zip((0, 1, 3), prefixes, strict=True)
            if len(at) == line["to"]
        ]
        assert line["sequence_accuracy"] == pytest.approx(np.mean(whole))
        assert line["queries"] == len(values)
    assert [line["to"] for line in found["by_position"]] == [1, 2, 4, 7]


@pytest.fixture
def command(capsys):
    """Runs the command: (exit code, stdout, stderr)."""
    return functools.partial(runs.called, evaluate, capsys)


def test_the_command_writes_a_table_figures_and_a_plot(command, workdir, recall, tmp_path):
    for run in (workdir, recall):
        out = tmp_path / "figures.json"
        code, shown, err = command(f"--workdir={run}", f"--out={out}")
        assert code == 0 and err == "", err
        figures = json.loads(out.read_text(encoding="utf-8"))
        assert figures["step"] == 12
        assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")
        key = "bits_per_byte" if run == workdir else "query_accuracy"
        assert f"{figures[key]:.4f}" in shown and str(out) in shown


def test_other_data_is_refused(command, workdir, tmp_path):
    page = f"{workdir}/../pages/a.txt"
    shutil.copy(page, tmp_path / "a.txt")
    try:
        with open(page, "a", encoding="utf-8") as file:
            file.write("more")
        code, _, err = command(f"--workdir={workdir}")
    finally:
        shutil.copy(tmp_path / "a.txt", page)
    assert code == 2 and "whose bytes is" in err and "evaluate on the same data" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--workdir=/nowhere/run"], "/nowhere/run"),
        (["--workdir={workdir}", "--step=7"], "7"),
        (["--workdir={recall}", "--length=9"], "--length=9: forgetting_mqar: length=9 is odd"),
        (["--workdir={recall}", "--length=64"], "--length=64: forgetting_mqar: vocab=64 is out of"),
        (["--workdir={workdir}", "--length=-1"], "--length"),
        (["--workdir={workdir}", "now"], "'now' is no flag"),
        (["--workdir={workdir}", "--out=/nowhere/x.json"], "/nowhere/x.json"),
    ],
)
def test_mistakes_are_one_message(command, workdir, recall, args, message):
    code, _, err = command(*(arg.format(workdir=workdir, recall=recall) for arg in args))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err, err


def test_longer_rows_of_every_task():
    """In evaluation alone, with longer expressions where rows have one; a mixture has none."""
    for name in set(tasks.names()) - {"mixture"}:
        settings = {"name": name, **tasks.settings(name), "eval_examples": 1}
        length = 2 * settings["length"]
        found = evaluate.lengthened(settings, length, True)
        source = data.make(found, batch=1, seed=0)
        assert (source.length, source.evaluation_length) == (settings["length"], length)
        row = tasks.make(name, **found["test"])
        if hasattr(row, "sizes"):
            assert row.sizes[-1] in (length, length - 1)
    found = evaluate.lengthened({"name": "parity", "test": {"min_size": 20}}, 60, True)["test"]
    assert found == {"min_size": 20, "length": 60, "max_size": 60}
    assert evaluate.lengthened({"name": "text", "length": 8}, 9, False)["length"] == 9
    with pytest.raises(UserError, match="--length=9: a mixture has the lengths of its cells"):
        evaluate.lengthened({"name": "mixture"}, 9, True)


def test_rows_that_the_attention_cannot_hold_are_refused(tmp_path):
    settings = runs.text(tmp_path, steps=4)
    source = f"{runs.ROOT}/configs/text.py:attention,layers=1"
    run = str(tmp_path / "run")
    train.train(runs.load(source, settings), run)
    with pytest.raises(UserError, match=r"--length=99999: the model's attention holds \d+ tokens"):
        evaluate.evaluate(run, length=99999)
    assert metrics.read_records(f"{run}/metrics.jsonl")
