"""Probes: against loops in numpy and answers that are known, untrained and inside of models."""

import dataclasses
import functools
import json

import jax
import models
import numpy as np
import pytest
import tiny_runs as runs

import memjax
from memjax import cells, inputs, probe, train
from memjax.cells.delta_net import DeltaNet
from memjax.cells.delta_product import DeltaProduct
from memjax.cells.linear_attention import LinearAttention
from memjax.cells.sliding_window import SlidingWindow
from memjax.nn.lm import LanguageModel
from memjax.probes import intervention, laws, layers, pairs, recall, states

compiled_once = runs.compiled_once
STUDY = recall.Study(dim=8, seeds=3, pairs=32, every=4, keys=8, distractors=16)


# ---------------------------------------------------------------- states


def test_norms_and_states_over_time_against_a_loop():
    cell = DeltaNet(4, 3)
    xs = inputs.draw(cell, np.random.default_rng(0), 2, 12, 2)
    reset = np.zeros((2, 12), bool)
    reset[1, 7] = True
    norms, writes, held = (np.asarray(a) for a in states.timeline(cell, {}, xs, 4, reset))
    assert held.shape == (3, 2, 2, 4, 3)
    for row in range(2):
        for head in range(2):
            state = np.zeros((4, 3))
            for t in range(12):
                k, v, beta = (a[row, t, head] for a in (xs.k, xs.v, xs.beta))
                old = state
                state = np.zeros((4, 3)) if reset[row, t] else state
                state = state + beta * np.outer(k, v - k @ state)
                size = np.linalg.norm(state)
                assert norms[t, row, head] == pytest.approx(size, rel=1e-5)
                change = np.linalg.norm(state - old) / size
                assert writes[t, row, head] == pytest.approx(change, rel=1e-4)
                if t % 4 == 3:
                    np.testing.assert_allclose(held[t // 4, row, head], state, atol=1e-5)
    found = np.asarray(states.read_map(cell, {}, held))
    np.testing.assert_allclose(found, 4**-0.5 * held, atol=1e-6)


def test_effective_rank():
    matrices = np.stack([np.eye(4), np.ones((4, 4)), np.zeros((4, 4)), np.diag([3, 1, 0, 0])])
    two = np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))
    np.testing.assert_allclose(states.effective_rank(matrices), [4, 1, 0, two], atol=1e-6)


def test_fidelity_of_reads():
    """Orthogonal keys keep their reads in a sum. A sharp window keeps them while the pair is in it,
    and for what it answers then, another value, the cosine of random values is left."""
    keys = np.tile(np.eye(16, dtype=np.float32), (3, 1, 1))
    values = pairs.unit(np.random.default_rng(0), 3, 16, 64)
    adds, window = LinearAttention(16, 64), SlidingWindow(16, 64, window=4, scale=50.0)
    lags = (1, 3, 4, 8)
    found = states.fidelity(adds, {}, pairs.tokens(adds, keys, values), lags)
    np.testing.assert_allclose(found, 1, atol=1e-5)
    given = pairs.tokens(window, keys, values)
    found = states.fidelity(window, {}, given, lags)
    np.testing.assert_allclose(found[:2], 1, atol=1e-5)
    assert np.abs(found[2:]).max() < 0.2
    reset = np.zeros((3, 16), bool)
    reset[:, 4::4] = True  # no pair is four tokens old
    found = states.fidelity(window, {}, given, lags, reset)
    np.testing.assert_allclose(found[:2], 1, atol=1e-5)
    assert np.isnan(found[2:]).all()


@pytest.mark.parametrize("name", ["attention", "delta_product", "mixture_of_memories", "rwkv4"])
def test_each_token_may_be_asked_by_its_own_key(name):
    cell = cells.get(name).cell()
    xs = inputs.draw(cell, np.random.default_rng(0), 2, 5, 1, queries=3)
    asked = states.by_own_key(cell, xs)
    params = cell.init_params(jax.random.key(0), 1)
    jax.eval_shape(functools.partial(memjax.run, cell), params, asked)  # the shapes fit
    if name == "attention":
        np.testing.assert_array_equal(asked.q[:, :, :, 2], xs.k)
    if name == "delta_product":
        np.testing.assert_array_equal(asked.q, xs.k[..., -1, :])
    if name == "rwkv4":
        assert asked is not None and not pairs.has_queries(cell)


# ---------------------------------------------------------------- recall


def test_scores_by_hand():
    values = np.eye(3)[None, :2]
    answers = np.array([[[2.0, 0.1, 0.0], [0.3, 0.3, 0.0]]])
    found = recall.scores(answers, values, 5 * values, np.eye(3)[2:])
    np.testing.assert_allclose(found.error, [[1.01, 0.09 + 0.49]])
    np.testing.assert_allclose(found.cosine, [[2 / np.hypot(2, 0.1), 0.5**0.5]])
    np.testing.assert_allclose(found.right, [[1, 0.5]])  # the second is as near to both
    found = recall.scores(answers, values, values, np.array([[1.0, 1.0, 0.0]]))
    np.testing.assert_allclose(found.right, [[1, 0]])


@pytest.fixture(scope="module")
def measured():
    lists = recall.draw(STUDY)
    made = {"sum": LinearAttention(8, 8), "delta": DeltaNet(8, 8)}
    return lists, {name: recall.measure(cell, STUDY, lists) for name, cell in made.items()}


def test_capacity_of_a_sum_against_a_loop(measured):
    lists, found = measured
    row = next(row for row in found["sum"]["capacity"] if row["pairs"] == 16)
    errors, right = [], []
    for k, v in zip(lists.keys[:3, :16], lists.values[:3, :16], strict=True):
        answers = k @ (k.T @ v)
        errors.append(np.square(answers - v).sum(axis=1).mean())
        best = (answers @ np.concatenate([v, lists.distractors]).T).argmax(axis=1)
        right.append(np.mean(best == np.arange(16)))
    assert row["error"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert row["error_sd"] == pytest.approx(np.std(errors, ddof=1), rel=1e-4)
    assert row["right"] == pytest.approx(np.mean(right))
    assert row["theory"] == laws.hebbian_error(16, 8)
    assert [row["pairs"] for row in found["sum"]["capacity"]] == [4, 8, 16, 32]


def test_overwriting_of_the_delta_rule_against_a_loop(measured):
    lists, found = measured
    row = next(row for row in found["delta"]["overwrite"] if row["rebound"] == 1)
    errors = []
    for k, v in zip(lists.keys[3:, :16], lists.values[3:, :16], strict=True):
        np.testing.assert_array_equal(k[:8], k[8:])
        state = np.zeros((8, 8))
        for key, value in zip(k, v, strict=True):
            state += np.outer(key, value - key @ state)
        errors.append(np.square(k[8:] @ state - v[8:]).sum(axis=1).mean())
    assert row["error"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert [row["rebound"] for row in found["delta"]["overwrite"]] == [0, 1, 3]


def test_parts_of_a_list_add_up(measured):
    """Ages and places are the items of the capacity row; the first context is the oldest part."""
    for figures in measured[1].values():
        whole = {row["pairs"]: row for row in figures["capacity"]}
        ages = figures["by_age"]
        assert [(row["from"], row["to"]) for row in ages] == [
            (0, 0),
            (1, 1),
            (2, 3),
            (4, 7),
            (8, 15),
        ]
        sizes = [row["to"] - row["from"] + 1 for row in ages]
        for name in ("error", "right", "theory"):
            total = np.average([row[name] for row in ages], weights=sizes)
            assert total == pytest.approx(whole[16][name])
        places = [row for row in figures["by_position"] if row["pairs"] == 32]
        assert np.mean([row["error"] for row in places]) == pytest.approx(whole[32]["error"])
        contexts = figures["interference"]
        assert [row["items"] for row in contexts] == [0, 8, 24]
        assert contexts[0]["change"] == 0
        assert contexts[2]["right"] == pytest.approx(contexts[0]["right"] + contexts[2]["change"])
        first = np.mean([row["error"] for row in places[:2]])
        assert contexts[2]["error"] == pytest.approx(first)
        last = figures["over_time"][-1]
        assert last["pairs"] == 32 and 1 < last["rank"] <= 8 and 0 < last["write"] < 1


def test_no_law_where_none_is_known():
    plain, faded, half = (recall.Study(**x) for x in ({}, {"keep": 0.9}, {"strength": 0.5}))
    known = recall.closed_form
    assert known(LinearAttention(4, 4, feature_map="silu_l2"), plain) is None
    assert known(cells.get("lattice").cell(), plain) is None
    assert known(cells.get("kda").cell(), faded) is None
    assert known(cells.get("dplr").cell(), half) is None
    gla, linear = cells.get("gla").cell(), cells.get("linear_attention").cell()
    assert known(gla, faded)(16, 3, 8) == laws.decay_error(0.9, 16, 3, 8)
    assert known(linear, faded)(16, 3, 8) == laws.hebbian_error(16, 8)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [DeltaNet(16, 16), DeltaProduct(16, 16)])
def test_a_weak_delta_rule_against_its_law(cell):
    """In units of the gain; two micro-steps of a half are one of three quarters."""
    study = recall.Study(dim=16, seeds=24, pairs=64, every=16, keys=16, strength=0.5)
    lists = recall.draw(study)
    for row in recall.measure(cell, study, lists)["capacity"]:
        bound = max(0.03 * row["theory"], 3 * row["error_sd"] / study.seeds**0.5)
        assert abs(row["error"] - row["theory"]) < bound


def test_sizes_that_do_not_fit_are_refused():
    """All numbers of pairs that a probe asks for have to be there."""
    for number in (0, 32, 33, 96, 192, 300):
        with pytest.raises(ValueError, match=f"pairs={number}: allowed are 64, 128, 256, and so"):
            recall.Study(pairs=number)
    with pytest.raises(ValueError, match="keys=24: allowed are 16, 32, 64, and so on"):
        recall.Study(keys=24, pairs=192)
    with pytest.raises(ValueError, match="seeds=1, dim=64: allowed is 2 or more"):
        recall.Study(seeds=1)
    study = recall.Study(dim=8, seeds=2, pairs=64, distractors=8)
    found = recall.measure(DeltaNet(8, 8), study, recall.draw(study))
    assert found["capacity"][-2]["pairs"] == study.pairs // 2
    assert [row["rebound"] for row in found["overwrite"]] == [0, 1]


# ---------------------------------------------------------------- inside of models


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scanned", "sambay"])
def test_an_unrolled_model_is_the_same(name):
    shell, params, run = models.model(name)
    settings, unrolled = layers.unrolled(shell.config, params)
    assert all(repeats == 1 and len(pattern) == 1 for pattern, repeats in settings.layers)
    tokens = models.text()
    expected = run({"params": params}, tokens)[0]
    found = jax.jit(LanguageModel(settings).apply)({"params": unrolled}, tokens)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_is_captured_leaves_the_same_state():
    shell, params, run = models.model("scanned")
    tokens = models.text()
    reset, _ = models.masks(models.LENGTH, reset=(4,))
    memories, outputs = layers.capture(shell, params, tokens, reset)
    assert [memory.name for memory in memories] == [
        f"layer_{i}/{name}" for i in (1, 2) for name in ("memory", "attention")
    ]
    assert outputs.shape == (3, *tokens.shape, 16) and np.isfinite(outputs).all()
    kept = run({"params": params}, tokens, None, reset)[1]["layers"][1][0]["mixer"]
    for memory in memories:
        if memory.name != "layer_2/memory":
            continue
        _, _, held = states.timeline(memory.cell, memory.weights, memory.inputs, 5, reset)
        expected = kept["memory"]["memory"][memory.layer - 1]
        np.testing.assert_allclose(held[-1], expected, atol=1e-5)
    across = layers.across_layers(outputs)
    a, b = outputs[0], outputs[1]
    angles = np.sum(a * b, axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert across.shape == (2,) and across[0] == pytest.approx(angles.mean(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"),
    [("mac", 0), ("window_exit", 2), ("bmojo", 4), ("nested", 3), ("sambay", 3)]
    + [("memory_caching", 1), ("mixture_of_memories", 1), ("rwkv7_channel", 2), ("titans", 1)],
)
def test_models_of_every_kind_are_opened(name, number):
    """In bfloat16, with a document that begins inside of a row."""
    shell = LanguageModel(models.config(name, dtype="bfloat16"))
    reset, _ = models.masks(12, reset=(4,))
    found = probe.opened(shell, models.initialise(shell), models.text(length=12), reset)
    assert len(found["memories"]) == number
    assert len(found["across_layers"]) == shell.config.depth - 1
    for memory in found["memories"]:
        assert all(np.isfinite([*row.values()]).all() for row in memory["over_time"])
        angles = {row["lag"]: row["cosine"] for row in memory["fidelity"]}
        assert np.isnan(angles.pop(8))  # the longest document has 8 tokens
        assert all(abs(angle) <= 1 + 1e-6 for angle in angles.values())


def test_a_model_of_vectors_is_opened():
    sizes = models.config("attention")
    shell = LanguageModel(dataclasses.replace(sizes, features=6, tie=False))
    rows = np.random.default_rng(0).normal(size=(2, 12, 6)).astype(np.float32)
    params = shell.init(jax.random.key(0), rows)["params"]
    memories, outputs = layers.capture(shell, params, rows)
    assert len(memories) == len(outputs) == sizes.depth and outputs.shape[1:] == (2, 12, sizes.dim)
    assert all(jax.tree.leaves(memory.inputs)[0].shape[:2] == (2, 12) for memory in memories)


def recall_rows():
    """Three pairs, noise and one query, in the vocabulary of the tiny models."""
    rng = np.random.default_rng(0)
    rows = np.zeros((6, 10), np.int32)
    for row in rows:
        row[0:6:2], row[1:6:2] = rng.permutation(7)[:3] + 1, rng.permutation(8)[:3] + 9
        row[8] = row[2]
    mask, targets, distance = np.zeros((3, 6, 10), np.int32)
    mask[:, 8], targets[:, 8], distance[:, 8] = 1, rows[:, 3], 5
    return rows, targets, mask.astype(bool), distance


def test_queries_and_corruption():
    rows, *rest = recall_rows()
    query = intervention.first_queries(rows, *rest)
    assert (query.source == 2).all() and (query.target == 3).all() and (query.query == 8).all()
    for which, at in (("source", 2), ("target", 3)):
        tokens = intervention.corrupted(query, which)
        changed = tokens != rows
        assert changed[:, at].all() and changed.sum() == len(rows)
        assert ((tokens[:, at] < 8) == (which == "source")).all()
        assert not any(new in old for new, old in zip(tokens[:, at], rows, strict=True))
    with pytest.raises(ValueError, match="no row has a query"):
        intervention.first_queries(rows, *rest[:2], 1 + rest[2])
    with pytest.raises(ValueError, match="the rows are vectors"):
        intervention.first_queries(rows[..., None].astype(np.float32), *rest)
    one = intervention.Query(*(a[:1] for a in query))
    with pytest.raises(ValueError, match="give more rows"):
        intervention.corrupted(one, "target")


@pytest.mark.parametrize("name", ["scanned", pytest.param("attention", marks=pytest.mark.slow)])
def test_what_is_restored_is_known(name):
    """Whatever the weights: the exchanged token differs in its embedding alone, so that its first
    block's input restores everything; so does what leaves the last block at the query. In front of
    the exchanged token nothing differs, and what leaves the last block elsewhere reaches no answer.
    """
    shell, params, _ = models.model(name)
    query = intervention.first_queries(*recall_rows())
    tokens = intervention.corrupted(query, "target")
    found = intervention.restoration(shell, params, query, tokens)
    lost = found["clean"] - found["corrupted"]
    assert found["queries"] == 6 and found["corrupted_kl"] > 1e-4 and abs(lost) > 1e-6
    place = {(row["layer"], row["component"], row["position"]): row for row in found["rows"]}
    last = shell.config.depth - 1
    assert len(place) == shell.config.depth * 4 * 3
    for whole in ((0, "block input", "target"), (last, "block output", "query")):
        assert place[whole]["probability"] == pytest.approx(lost, abs=1e-6)
        assert place[whole]["kl"] == pytest.approx(0, abs=1e-6)
    nothing = [
        (layer, part, "source") for layer in range(last + 1) for part in intervention.COMPONENTS
    ]
    for none in (*nothing, (last, "block output", "target"), (0, "block input", "query")):
        assert place[none]["probability"] == pytest.approx(0, abs=1e-7)
        assert place[none]["kl"] == pytest.approx(found["corrupted_kl"], abs=1e-6)
    if last == 0:  # through the mixer alone the token reaches the query
        assert place[0, "mixer input", "target"]["probability"] == pytest.approx(lost, abs=1e-6)
        assert place[0, "mixer output", "query"]["probability"] == pytest.approx(lost, abs=1e-6)
    else:  # part of it goes around each
        assert place[1, "block input", "target"]["kl"] < found["corrupted_kl"]


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(capsys):
    """Runs the command: (exit code, stdout, stderr)."""
    return functools.partial(runs.called, probe, capsys)


SMALL = ("--dim=8", "--pairs=64", "--seeds=2")


def test_the_command_measures_cells(command, tmp_path):
    out = tmp_path / "found.json"
    code, shown, err = command("--cells=delta_net", f"--out={out}", *SMALL)
    assert code == 0 and err == "", err
    found = json.loads(out.read_text(encoding="utf-8"))
    assert list(found["cells"]) == ["delta_net"] and found["dim"] == 8
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    row = found["cells"]["delta_net"]["capacity"][1]
    assert row["pairs"] == 32 and f"{row['error']:.3f}" in shown and str(out) in shown


@pytest.mark.slow
def test_the_command_measures_every_cell(command, tmp_path):
    out = tmp_path / "found.json"
    code, _, err = command("--cells=all", f"--out={out}", *SMALL)
    assert code == 0 and err == "", err
    found = json.loads(out.read_text(encoding="utf-8"))["cells"]
    assert list(found) == cells.names()
    for name, figures in found.items():
        assert all(np.isfinite(row["error"]) for row in figures["capacity"]), name
    assert not found["rwkv4"]["queries"] and found["attention"]["capacity"][-1]["right"] == 1


@pytest.mark.slow
def test_the_command_opens_a_checkpoint(command, tmp_path):
    settings = {**runs.TASK, "data.length": 32, "model.vocab": 64, "data.vocab": 64}
    run = str(tmp_path / "run")
    train.train(runs.load(f"{runs.MQAR}:delta_net", settings), run)
    code, shown, err = command(f"--workdir={run}")
    assert code == 0 and err == "", err
    found = json.loads((tmp_path / "run" / "probe.json").read_text(encoding="utf-8"))
    assert [memory["cell"] for memory in found["memories"]] == ["DeltaNet"]
    assert [each["corrupted_token"] for each in found["intervention"]] == ["target", "source"]
    assert (tmp_path / "run" / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert "restored at" in shown and "norm" in shown


@pytest.mark.slow
def test_the_command_opens_a_model_of_text(command, tmp_path_factory, tmp_path):
    run, out = runs.trained(tmp_path_factory), tmp_path / "found.json"
    code, _, err = command(f"--workdir={run}", f"--out={out}")
    assert code == 0 and err == "", err
    found = json.loads(out.read_text(encoding="utf-8"))
    assert "intervention" not in found and len(found["memories"]) == 1
    (memory,) = found["memories"]
    assert [row["tokens"] for row in memory["over_time"]] == [*range(1, 17)]
    assert [row["lag"] for row in memory["fidelity"]] == [1, 2, 4, 8]
    assert all(-1 <= row["cosine"] <= 1 for row in memory["fidelity"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--cells=delta_nte"], "unknown cell 'delta_nte'"),
        (["--cells=hybrid"], "unknown cell 'hybrid'"),
        ([], "expected --cells=all"),
        (["--cells=all", "--workdir=x"], "expected --cells=all"),
        (["--workdir=/nowhere/run"], "/nowhere/run"),
        (["--cells=delta_net", "--pairs=33"], "pairs=33: allowed are 64, 128"),
        (["--cells=delta_net", "--keep=0"], "--keep=0.0, --strength=1.0: expected numbers"),
        (["--cells=delta_net", "--out=/nowhere/x.json"], "/nowhere/x.json"),
        (["--cells=delta_net", "--out=x.png"], "expected a file *.json"),
        (["delta_net"], "'delta_net' is no flag"),
    ],
)
def test_mistakes_are_one_message(command, args, message):
    code, _, err = command(*args)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err, err


def test_cells_are_sized_for_the_study():
    study = dataclasses.replace(STUDY, pairs=64)
    assert probe.make_cell("sliding_window", study).window == 16
    assert probe.make_cell("memory_caching", study).segment == 16
    assert probe.make_cell("attention", study).scale == probe.SHARP
