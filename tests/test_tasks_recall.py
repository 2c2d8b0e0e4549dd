"""Recall tasks apart from MQAR on tokens: stacked MQAR, joint recall, associative recall."""

import collections

import numpy as np
import pytest
from task_checks import chi_square, close_to, refuses

from memjax import tasks
from memjax.tasks import __main__ as command
from memjax.tasks.joint_recall import counted

SMALL_TABLES = dict(
    min_contexts=5, max_contexts=5, min_keys=5, max_keys=5, num_values=8, length=112, vocab=28
)


# --- stacked MQAR -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [dict(num_values=64, width=16), dict(length=40, pairs=8, passes=3, num_values=8)]
)
def test_stacked_layout(settings):
    source = tasks.make("stacked_mqar", **settings)
    pairs, passes, width = source.pairs, source.passes, source.width
    end = (passes + 1) * pairs
    rows = {row.tobytes(): number for number, row in enumerate(source.table)}
    assert len(rows) == 2 * source.num_values
    for index in range(300):
        example = source[index]
        inputs = example["inputs"]
        keys = np.array([rows[key.tobytes()] for key in inputs[:end, :width]]).reshape(-1, pairs)
        values = [rows[value.tobytes()] for value in inputs[: passes * pairs, width:]]
        assert keys.max() < source.num_values <= min(values)
        assert (np.sort(keys) == np.sort(keys[0])).all() and len(set(keys[0])) == pairs
        assert len(set(values)) == pairs == example["pairs"]
        assert not inputs[passes * pairs :, width:].any() and not inputs[end:].any()
        queries = np.flatnonzero(example["mask"])
        assert queries.tolist() == list(range(passes * pairs, end))
        bound = dict(zip(keys[:-1].ravel(), values, strict=True))
        answers = [bound[key] - source.num_values for key in keys[-1]]
        assert example["targets"][queries].tolist() == answers
        shown = queries - example["distance"][queries]
        assert (shown >= (passes - 1) * pairs).all() and (shown < passes * pairs).all()
        assert (keys.ravel()[shown] == keys[-1]).all()


def test_stacked_table_is_frozen_and_on_the_sphere():
    """Cosines of uniform directions have mean 0 and variance 1 / width."""
    table = tasks.make("stacked_mqar", num_values=256, width=32).table
    assert table.dtype == np.float32 and table.shape == (512, 32)
    np.testing.assert_allclose(np.linalg.norm(table.astype(float), axis=1), 1, rtol=0, atol=1e-6)
    cosines = (table.astype(float) @ table.T)[np.triu_indices(512, 1)]
    # pairs of directions are uncorrelated: standard errors of the mean and of the mean square,
    # whose variance is 2 (width - 1) / (width**2 (width + 2))
    assert abs(cosines.mean()) < 4.5 * np.sqrt(1 / 32 / cosines.size)
    spread = np.sqrt(2 * 31 / (32**2 * 34) / cosines.size)
    assert abs((cosines**2).mean() - 1 / 32) < 4.5 * spread
    for same in (dict(seed=5), dict(split="test")):
        assert (tasks.make("stacked_mqar", num_values=256, width=32, **same).table == table).all()
    other = tasks.make("stacked_mqar", num_values=256, width=32, table_seed=1).table
    assert (other != table).any(1).all()
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0] = 1


def test_stacked_is_solved_by_the_nearest_key():
    source = tasks.make("stacked_mqar", length=128, pairs=64)
    for index in range(20):
        example = source[index]
        written, asked = np.split(example["inputs"], 2)
        nearest = np.argmax(asked[:, :64] @ written[:, :64].T, axis=1)
        read = written[nearest, 64:] @ source.table[source.num_values :].T
        assert (np.argmax(read, axis=1) == example["targets"][64:]).all()


def test_stacked_orders_are_uniform_and_fresh():
    """Every order of 3 queries after 3 writes is equally likely, and so is each second pass."""
    source = tasks.make("stacked_mqar", length=9, pairs=3, passes=2, num_values=3, width=4)
    rows = {row.tobytes(): number for number, row in enumerate(source.table)}
    counts = np.zeros((2, 27))
    for index in range(2000):
        inputs = source[index]["inputs"][:, :4]
        keys = np.array([rows[key.tobytes()] for key in inputs]).reshape(3, 3)
        for later in (1, 2):
            places = np.argmax(keys[0][:, None] == keys[later], axis=1)
            counts[later - 1, places @ [9, 3, 1]] += 1
    for row in counts:
        assert (row > 0).sum() == 6
        assert chi_square(row[row > 0]) < 20.5  # 5 degrees of freedom, p = 0.001


# --- joint recall -------------------------------------------------------------------------------


def halves(source, example):
    """The contexts [2, c] and pairs [2, c, k, 2] of both halves, and where their pairs begin."""
    contexts, keys = int(example["contexts"]), int(example["keys"])
    half = contexts * (2 * keys + 1)
    starts = np.array([1, 2 + half])
    blocks = np.stack([example["inputs"][start : start + half] for start in starts])
    blocks = blocks.reshape(2, contexts, 2 * keys + 1)
    places = starts[:, None, None] + np.arange(half).reshape(contexts, -1)
    return blocks[:, :, 0], blocks[:, :, 1:].reshape(2, contexts, keys, 2), places[:, :, 1::2]


@pytest.mark.parametrize("settings", [{}, SMALL_TABLES, dict(max_contexts=6, min_keys=16)])
def test_joint_layout(settings):
    source = tasks.make("joint_recall", **settings)
    first_key = 10 + source.num_values
    first_context = first_key + source.max_keys
    sizes = set()
    for index in range(300):
        example = source[index]
        inputs, queries = example["inputs"], np.flatnonzero(example["mask"])
        contexts, pairs, places = halves(source, example)
        count, keys = pairs.shape[1:3]
        sizes.add((count, keys))
        used = 2 + 2 * count * (2 * keys + 1)
        assert inputs[0] == 1 and inputs[used // 2] == 4 and (inputs[used:] == 3).all()
        assert first_context <= contexts.min() and contexts.max() < first_context + (
            source.max_contexts
        )
        assert first_key <= pairs[..., 0].min() and pairs[..., 0].max() < first_context
        assert 10 <= pairs[..., 1].min() and pairs[..., 1].max() < first_key
        tables = [
            {(c, k): v for c, row in zip(cs, rows, strict=True) for k, v in row.tolist()}
            for cs, rows in zip(contexts.tolist(), pairs, strict=True)
        ]
        assert tables[0] == tables[1] and len(tables[0]) == count * keys
        assert len({k for _, k in tables[0]}) == keys
        assert (queries == places[1].ravel()).all() and len(queries) == count * keys
        assert (example["targets"][queries] == pairs[1, :, :, 1].ravel()).all()
        shown = queries - example["distance"][queries]
        assert (inputs[shown] == example["targets"][queries]).all()
        first = {
            (c, k): at + 1
            for c, row, begin in zip(contexts[0], pairs[0], places[0], strict=True)
            for k, at in zip(row[:, 0].tolist(), begin.tolist(), strict=True)
        }
        asked = [(c, k) for c, row in zip(contexts[1], pairs[1], strict=True) for k in row[:, 0]]
        assert shown.tolist() == [first[pair] for pair in asked]
    low, high = (source.min_contexts, source.min_keys), (source.max_contexts, source.max_keys)
    assert (np.min(list(sizes), 0) == low).all() and (np.max(list(sizes), 0) == high).all()


@pytest.mark.parametrize("settings", [{}, SMALL_TABLES])
def test_joint_blind_predictors_get_one_in_values(settings):
    """A constant answer; the value of the key in another context; that of another key beside it."""
    source = tasks.make("joint_recall", **settings)
    counts, by_key, by_context, trials = np.zeros(source.num_values, int), 0, 0, 0
    for index in range(300):
        example = source[index]
        _, pairs, _ = halves(source, example)
        order = np.argsort(pairs[1, :, :, 0], axis=1)
        table = np.take_along_axis(pairs[1, :, :, 1], order, 1)  # rows in one order of keys
        counts += np.bincount(table.ravel() - 10, minlength=source.num_values)
        by_key += (table == np.roll(table, 1, axis=0)).sum()
        by_context += (table == np.roll(table, 1, axis=1)).sum()
        trials += table.size
    assert source.chance == 1 / source.num_values
    for right in (*counts, by_key, by_context):
        assert close_to(right, trials, source.chance)


def test_joint_counting_beats_a_guess():
    """The most frequent value of a key, or of a context, that was not asked for yet."""
    assert counted(1, 8) == 1 and counted(2, 8) == pytest.approx((1 + 9 / 16) / 2)
    assert counted(5, 8) == pytest.approx(0.563, abs=5e-4)  # in the README of the experiment
    source = tasks.make("joint_recall", **SMALL_TABLES)
    right = np.zeros((400, 2))
    for index in range(len(right)):
        contexts, pairs, _ = halves(source, source[index])
        for way in range(2):
            left = collections.defaultdict(collections.Counter)
            for half in range(2):
                for context, block in zip(contexts[half].tolist(), pairs[half], strict=True):
                    for key, value in block.tolist():
                        counts = left[(key, context)[way]]
                        if half:
                            right[index, way] += value == max(counts, key=counts.__getitem__)
                        counts[value] += -1 if half else 1
    right /= source.queries
    error = right.std(axis=0) / len(right) ** 0.5
    assert (abs(right.mean(axis=0) - counted(5, 8)) < 4 * error).all() and (error < 0.01).all()


def test_joint_sizes_and_orders_are_uniform():
    source = tasks.make(
        "joint_recall", min_contexts=1, max_contexts=2, min_keys=2, max_keys=3, length=30
    )
    sizes, orders = np.zeros((2, 2)), np.zeros((2, 2, 2))
    for index in range(2000):
        example = source[index]
        contexts, pairs, _ = halves(source, example)
        sizes[len(contexts[0]) - 1, pairs.shape[2] - 2] += 1
        if pairs.shape[1:3] == (2, 2):
            again = int(contexts[0, 0] != contexts[1, 0])  # the place of the first context
            keys = pairs[..., 0]
            beside, later = keys[0, 0, 0] == keys[0, 1, 0], keys[0, 0, 0] == keys[1, again, 0]
            orders[again, int(beside), int(later)] += 1
    assert chi_square(sizes) < 16.3 and chi_square(orders) < 24.3  # 3 and 7 degrees, p = 0.001


# --- associative recall -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, dict(by_value=True), dict(pairs=4, num_keys=4, length=20, by_value=True)]
)
def test_associative_layout(settings):
    source = tasks.make("associative_recall", **settings)
    end = 2 * source.pairs + 2
    for index in range(1000):
        example = source[index]
        inputs = example["inputs"]
        keys, values = inputs[1 : end - 1].reshape(-1, 2).T
        assert 3 <= keys.min() and keys.max() < 3 + source.num_keys <= values.min()
        assert len(set(keys)) == len(set(values)) == source.pairs == example["pairs"]
        assert inputs[0] == 1 and inputs[end - 1] == 2 and not inputs[end + 1 :].any()
        assert np.flatnonzero(example["mask"]).tolist() == [end]
        asked, answers = (values, keys) if source.by_value else (keys, values)
        assert example["targets"][end] == dict(zip(asked, answers, strict=True))[inputs[end]]
        assert inputs[end - example["distance"][end]] == example["targets"][end]


@pytest.mark.parametrize("by_value", [False, True])
def test_associative_query_is_uniform(by_value):
    source = tasks.make("associative_recall", by_value=by_value)
    counts = np.zeros(16)
    for index in range(4000):
        counts[(34 - source[index]["distance"][34] - 1) // 2] += 1
    assert chi_square(counts) < 37.7  # 15 degrees of freedom, p = 0.001


# --- messages and text --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("stacked_mqar", dict(pairs=9), "pairs=9 with passes=1 takes 18 .* use length=18"),
        ("stacked_mqar", dict(passes=2), "pairs=8 with passes=2 takes 24 .* use length=24"),
        ("stacked_mqar", dict(num_values=7), "num_values=7 .* allowed: pairs, 8, up"),
        ("stacked_mqar", dict(width=0), "width=0 .* 1 or more"),
        ("stacked_mqar", dict(table_seed=-1), r"table_seed=-1 .* 0 to 2\*\*64 - 1"),
        ("joint_recall", dict(min_keys=17), "min_keys=17 with max_keys=16 .* 1 <= min_keys"),
        ("joint_recall", dict(min_contexts=0), "min_contexts=0 .* 1 <= min_contexts"),
        ("joint_recall", dict(num_values=1), "num_values=1 .* 2 or more"),
        ("joint_recall", dict(vocab=57), "vocab=57 .* take 58 or more"),
        ("joint_recall", dict(length=1057), "takes 1058 tokens, .* use length=1058"),
        ("associative_recall", dict(pairs=17), "pairs=17 takes 37 .* use length=37"),
        ("associative_recall", dict(num_keys=15), "pairs=16 .* 1 to num_keys, 15"),
        ("associative_recall", dict(num_keys=2**30), r"num_keys=1073741824 .* to 2\*\*30 - 2"),
    ],
)
def test_impossible_settings(name, settings, message):
    refuses(name, settings, message)


def test_show_of_vectors_names_their_numbers():
    source = tasks.make("stacked_mqar", num_values=64)
    example, lines = source[3], command.show(source, 3).splitlines()
    rows = {row.tobytes(): number for number, row in enumerate(source.table)}
    for at in np.flatnonzero(example["mask"]):
        key = rows[example["inputs"][at, :64].tobytes()]
        numbers = [at, key, example["targets"][at], example["distance"][at]]
        assert any(line.split()[1:] == [str(n) for n in numbers] for line in lines)


def test_show_of_tables_has_a_line_for_each_context():
    source = tasks.make("joint_recall", **SMALL_TABLES)
    lines = command.show(source, 3).splitlines()
    contexts, pairs, _ = halves(source, source[3])
    for context, row in zip(contexts.ravel(), pairs.reshape(10, 5, 2), strict=True):
        words = " ".join(f"{key}:{value}" for key, value in row)
        assert any(line.endswith(f" {context}   {words}") for line in lines)
    assert "5 contexts of 5 keys" in lines[2]
