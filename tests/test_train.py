"""Training in Python, without the command: the step, evaluation, accumulation, devices, the run."""

import gzip
import itertools
import json
import os
import shutil
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs as runs

import memjax
from memjax import checkpoint, chips, config, evaluate, metrics, progress, train, train_step
from memjax.data import tokens

# What the first step of training reports, and the loss of the second. To 1e-4: a change of the
# model, its initialisation, the data or the optimiser moves them; another XLA does not.
REFERENCE = {
    "task": {
        "loss": 3.114910,
        "accuracy": 0,
        "grad_norm": 0.9623367,
        "lr": 0.01,
        "scored": 32,
        "next": 3.099422,
    },
    "text": {
        "loss": 5.560654,
        "accuracy": 0,
        "grad_norm": 1.384096,
        "lr": 0.0005,
        "scored": 64,
        "next": 5.552973,
    },
}
LINEAR = f"{runs.MQAR}:linear_attention"
FORGETTING = {
    "batch": 4,
    "data.length": 16,
    "data.pairs": 2,
    "data.updates": 1,
    "data.vocab": 18,
    "data.eval_examples": 8,
    "model.vocab": 18,
    "model.dim": 8,
}

pytestmark = pytest.mark.usefixtures("compiled_once")
compiled_once = runs.compiled_once


def task(**changes):
    return runs.load(runs.MQAR, {**runs.TASK, **changes})


def text(folder, **changes):
    return runs.load(runs.TEXT, runs.text(folder, **changes))


def advance(run, steps, state):
    """(state, metrics of each step) after `steps` steps; `state` stays as it is."""
    state, batches, values = jax.tree.map(jnp.copy, state), iter(run.data.train), []
    for _ in range(steps):
        state, found = run.step(state, run.put(next(batches)))
        values.append({name: float(value) for name, value in found.items()})
    return state, values


def largest_difference(a, b) -> float:
    """max |a - b| / max |a| over two trees of arrays."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    scale = max(float(np.abs(np.asarray(x, np.float64)).max()) for x, _ in pairs)
    apart = (np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max() for x, y in pairs)
    return max(map(float, apart)) / scale


# ---------------------------------------------------------------- one step


@pytest.fixture(scope="module")
def first_steps():
    """A short run on an easy task, step by step."""
    changes = {"steps": 60, "batch": 16, "optim.lr": 0.02, "data.vocab": 18, "model.vocab": 18}
    run = memjax.build(task(**changes))
    before = run.init()
    after, values = advance(run, 1, before)
    _, values = advance(run, 60, before)
    return run, before, after, values


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run on text: its folder, its initial state, and what two steps make of it."""
    folder = tmp_path_factory.mktemp("plain")
    run = memjax.build(text(folder))
    state = run.init()
    return folder, run, state, advance(run, 2, state)


def test_reference_metrics_after_one_step_of_a_task(first_steps):
    _, _, _, (first, second, *_) = first_steps
    assert {**first, "next": second["loss"]} == pytest.approx(REFERENCE["task"], rel=1e-4)


def test_reference_metrics_after_one_step_of_text(workdir):
    first, second, *_ = runs.records(workdir)
    found = {name: first[name] for name in REFERENCE["text"] if name != "next"}
    assert {**found, "next": second["loss"]} == pytest.approx(REFERENCE["text"], rel=1e-4)


def test_a_step_reports_what_it_did(first_steps):
    run, before, after, values = first_steps
    assert int(after.step) == 1
    assert values[0]["scored"] == next(iter(run.data.train))["mask"].sum() == 32
    assert [v["lr"] for v in values[:2]] == pytest.approx([0.01, 0.02])
    assert all(v["grad_norm"] > 0 for v in values)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before.params, after.params)
    # Adam's first step is lr in every direction; weight decay adds a tenth of a weight below 1.
    assert 0.99 * 0.01 < max(jax.tree.leaves(moved)) < 1.1 * 0.01


def test_a_run_without_files_makes_the_same_steps(first_steps):
    run, _, after, values = first_steps
    state, history = run.train(1)
    assert {name: list(found) for name, found in history.items()} == {
        name: [value] for name, value in values[0].items()
    }
    assert largest_difference(after.params, state.params) == 0


def test_the_loss_falls_on_an_easy_task(first_steps):
    losses = [v["loss"] for v in first_steps[-1]]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3, losses


@pytest.mark.parametrize("pieces", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulation_equals_the_whole_batch(plain, pieces):
    """Rows differ in how many positions are scored, so a mean of means would be another gradient.

    Both are float32 sums of the same numbers in another order. Adam's moments are compared, not
    the parameters: its first step is the sign of the gradient, which rounding decides near zero.
    """
    folder, run, state, (_, wanted) = plain
    whole, _ = advance(run, 1, state)
    split, found = advance(memjax.build(text(folder, accumulate=pieces)), 1, state)
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert largest_difference(whole.opt_state, split.opt_state) < 1e-5


def test_bfloat16_computes_near_float32_with_float32_parameters(plain):
    folder, _, state, (_, wanted) = plain
    run = memjax.build(text(folder, **{"model.dtype": "bfloat16"}))
    after, found = advance(run, 2, state)
    assert {str(a.dtype) for a in jax.tree.leaves(after.params)} == {"float32"}
    for low, full in zip(found, wanted, strict=True):
        assert low["loss"] != full["loss"]
        # 8 bits of mantissa: each rounding is 2^-9 at most, and the loss is a mean of many.
        assert low["loss"] == pytest.approx(full["loss"], rel=2**-8)
        assert low["grad_norm"] == pytest.approx(full["grad_norm"], rel=2**-4)


def test_rematerialisation_changes_nothing_but_memory(plain):
    folder, run, state, (_, wanted) = plain
    whole, _ = advance(run, 1, state)
    again, found = advance(memjax.build(text(folder, **{"model.remat": "full"})), 1, state)
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert largest_difference(whole.opt_state, again.opt_state) < 1e-5


# ---------------------------------------------------------------- evaluation


def test_evaluation_of_a_task_equals_a_count_by_hand():
    source = f"{runs.ROOT}/configs/forgetting_mqar.py:attention"
    run = memjax.build(runs.load(source, FORGETTING))
    params, forward = run.init().params, jax.jit(run.model.apply)
    right, scored, rebound, rows = 0, 0, [], []
    for batch in run.data.evaluation():
        logits, _ = forward({"params": params}, batch["inputs"])
        hit = (np.asarray(logits).argmax(-1) == batch["targets"]) & batch["mask"]
        right, scored = right + hit.sum(), scored + batch["mask"].sum()
        rebound.append((hit & batch["rebound"]).sum() / max(1, batch["rebound"].sum()))
        rows += [h[m].all() for h, m in zip(hit, batch["mask"], strict=True) if m.any()]
    found = run.evaluation(params)
    assert found["query_accuracy"] == pytest.approx(right / scored)
    assert found["query_accuracy/rebound"] == pytest.approx(np.mean(rebound))
    assert found["sequence_accuracy"] == pytest.approx(np.mean(rows))
    assert {"loss", "query_accuracy/not_rebound"} < set(found)


def test_bits_per_byte_counts_every_held_out_byte_once(plain):
    _, run, state, _ = plain
    params, forward = state.params, jax.jit(run.model.apply)
    nats, count = 0.0, 0
    for batch in run.data.evaluation():
        logits, _ = forward({"params": params}, batch["inputs"], reset=batch["reset"])
        chances = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
        picked = np.take_along_axis(chances, batch["targets"][..., None], axis=-1)[..., 0]
        nats, count = nats - picked[batch["mask"]].sum(), count + batch["mask"].sum()
    held_out = sum(len(runs.PAGES[name].encode()) for name in ("e.txt", "f.txt"))
    assert count == held_out
    found = run.evaluation(params)
    assert found["bits_per_byte"] == pytest.approx(nats / count / np.log(2), rel=1e-5)
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)


# ---------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return runs.trained(tmp_path_factory)


def test_the_workdir_of_a_finished_run(workdir):
    assert {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "loss.png",
        "summary.json",
    } == set(os.listdir(workdir))
    with open(f"{workdir}/summary.json", encoding="utf-8") as file:
        summary = json.load(file)
    assert summary["finished"] is True and summary["step"] == summary["steps"] == 12
    assert set(summary["baselines"]) == {"uniform", "unigram", "bigram", "zlib"}
    assert 0 < summary["bits_per_byte"] < 9 and summary["seconds"] > 0
    assert summary["parameters"] > 0 and isinstance(summary["sample"], str)
    assert summary["versions"]["memjax"] == memjax.__version__
    assert "not installed" not in summary["versions"].values()
    rows = runs.records(workdir)
    assert [r["step"] for r in rows if r["kind"] == "train"] == list(range(1, 13))
    assert [r["step"] for r in rows if r["kind"] == "eval"] == [5, 10, 12]
    assert all(r["bits_per_byte"] == pytest.approx(r["loss"] / np.log(2)) for r in rows)
    assert summary["bits_per_byte"] == rows[-1]["bits_per_byte"]


def test_a_finished_run_given_again_changes_no_result(workdir):
    before = runs.records(workdir), runs.summary(workdir)
    with open(f"{workdir}/config.json", encoding="utf-8") as file:
        settings = config.from_json(file.read())
    with settings.unlocked():
        settings.log.every = 5  # how a run is logged may change
    assert train.train(settings, workdir)["finished"] is True
    assert (runs.records(workdir), runs.summary(workdir)) == before


def test_evaluation_rows_may_be_longer_than_those_of_training(tmp_path):
    """A mixture is tested with longer rows and more pairs, on vectors too."""
    sizes = {"steps": 2, "batch": 4, "optim.warmup": 1, "eval.batches": 1, "data.eval_examples": 6}
    settings = runs.load(f"{runs.ROOT}/configs/recall.py:linear_attention,dim=8", sizes)
    settings.data.update(cells="8x1,16x3", settings="vocab=34")
    settings.data.test.cells = "16x4,32x8"
    settings.model.vocab = 34
    summary = train.train(settings, str(tmp_path / "tokens"))
    assert summary["finished"] and 0 <= summary["query_accuracy"] <= 1
    found = evaluate.evaluate(str(tmp_path / "tokens"))
    assert found["length"] == 32 and [row["pairs"] for row in found["by_pairs"]] == [4, 8]
    assert found["query_accuracy"] == pytest.approx(summary["query_accuracy"])
    task = f"{runs.ROOT}/configs/recall.py:linear_attention,dim=8,task=stacked_mqar"
    small = {"data.length": 4, "data.pairs": 2, "data.num_values": 5, "data.width": 3}
    given = {**sizes, **small, "model.vocab": 5, "model.features": 6}
    assert train.train(runs.load(task, given), str(tmp_path / "vectors"))["finished"]


def test_a_run_starts_with_the_parameters_of_another(tmp_path, workdir):
    source, other = shutil.copytree(workdir, tmp_path / "source"), str(tmp_path / "other")
    changes = {"steps": 1, "optim.warmup": 0, "optim.lr": 1e-20, "seed": 1}
    for wrong, given in (("holds no checkpoint", tmp_path), ("different shapes", source)):
        settings = text(tmp_path, **changes, **{"init_from": str(given), "model.dim": 8})
        with pytest.raises(config.UserError, match=f"(?s)config.init_from='{given}'.*{wrong}"):
            train.train(settings, other)
        assert not os.path.exists(other)
    settings = text(tmp_path, **changes, init_from=str(source))
    train.train(settings, other)
    wanted, found = (checkpoint.restore_params(str(path))[1] for path in (source, other))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-15), found, wanted)
    shutil.rmtree(source)  # the run goes on without it, and where the setting is not known
    assert train.train(settings, other)["finished"]
    with settings.unlocked():
        del settings.init_from
    assert train.train(settings, other)["finished"]


def test_a_run_says_what_it_costs_and_traces_steps(tmp_path, monkeypatch, capsys):
    """The trace holds the two steps that were asked for; MFU is against the peak of the device."""
    monkeypatch.setattr(chips, "peak", lambda devices: 1e9 * len(devices))
    summary = train.train(task(), str(tmp_path), profile="3:2")
    (folder,) = (tmp_path / "profile" / "plugins" / "profile").iterdir()
    (packed,) = folder.glob("*.trace.json.gz")
    with gzip.open(packed, "rt", encoding="utf-8") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert names.count("train") == 2 and not any("evaluat" in name for name in names)
    rows = metrics.read_records(f"{tmp_path}/metrics.jsonl")
    rows = [row for row in rows if row["kind"] == "train"]
    shares = [row["tokens_per_second"] * summary["flops_per_token"] / 1e9 for row in rows]
    assert [row["mfu"] for row in rows] == pytest.approx(shares)
    shown = capsys.readouterr().out
    flops = progress.human(summary["flops_per_token"])
    assert f"parameters, {flops} model FLOPs a token" in shown
    assert f"steps 4 to 5 are traced: {tmp_path}" in shown and "% mfu" in shown
    assert "B of temporary memory" in shown


@pytest.mark.parametrize("steps", ["100", "3:0", "a:b"])
def test_steps_to_trace_that_there_are_not(tmp_path, steps):
    with pytest.raises(config.UserError, match=f"--profile={steps}: expected START:NUMBER, steps"):
        train.train(task(), str(tmp_path / "run"), profile=steps)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, 6), (signal.SIGINT, 0)])
def test_a_signal_saves_within_one_step(tmp_path, monkeypatch, number, at):
    """A signal during compilation (0) or while the record of step 6 is written."""
    original = metrics.Jsonl.write if at else train.describe

    def interrupted(*args):
        if at in (0, args[1]):
            os.kill(os.getpid(), number)
        return original(*args)

    if at:
        monkeypatch.setattr(metrics.Jsonl, "write", interrupted)
    else:
        monkeypatch.setattr(train, "describe", interrupted)
    handler = signal.getsignal(number)
    summary = train.train(task(), str(tmp_path))
    assert signal.getsignal(number) is handler
    assert summary["finished"] is False and "query_accuracy" not in summary
    assert at < summary["step"] <= at + 1
    assert runs.summary(tmp_path)["step"] == runs.records(tmp_path)[-1]["step"] == summary["step"]
    assert os.path.isdir(tmp_path / "checkpoints" / str(summary["step"]))


def test_an_evaluation_that_a_signal_prevented_is_made_up_for(tmp_path, monkeypatch):
    """Stopped after step 5, which is to be evaluated; the signal comes with the record before."""
    original = metrics.Jsonl.write

    def interrupted(log, step, values):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(log, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Jsonl, "write", interrupted)
        stopped = train.train(task(**{"checkpoint.every": 100}), str(tmp_path))["step"]
    kinds = [(r["kind"], r["step"]) for r in runs.records(tmp_path)]
    assert stopped == 5 and ("eval", 5) not in kinds
    assert train.train(task(**{"checkpoint.every": 100}), str(tmp_path))["finished"]
    found = [(r["kind"], r["step"]) for r in runs.records(tmp_path)]
    assert found[:7] == [*kinds, ("eval", 5), ("train", 6)]
    assert sorted(found) == sorted(set(found))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    handed = metrics.Late.push

    def push(self, step, values):
        return handed(self, step, {**values, "loss": np.float32("nan")} if step == 6 else values)

    monkeypatch.setattr(metrics.Late, "push", push)
    with pytest.raises(FloatingPointError, match="loss of step 6 is nan.*checkpoint is of step 4"):
        train.train(task(), str(tmp_path))
    with np.load(tmp_path / "nonfinite.npz") as kept:
        fed = next(itertools.islice(iter(train_step.build(task()).data.train), 5, None))
        assert all(np.array_equal(kept[name], fed[name]) for name in fed)
    assert [r["step"] for r in runs.records(tmp_path) if r["kind"] == "train"] == [1, 2, 3, 4, 5]


def test_the_sample_begins_a_document(workdir):
    sample = runs.summary(workdir)["sample"]
    assert 0 < len(sample) <= 20 and tokens.BOS not in tokens.BYTES.encode(sample)
