"""Piecewise-stationary sources: the oracles against enumeration, and their reference values."""

import itertools
import math

import numpy as np
import pytest
from task_checks import chi_square, refuses

from memjax import tasks
from memjax.tasks import piecewise

# --- oracles ------------------------------------------------------------------------------------


def single(symbols, alphabet):
    """The probability of symbols under one law drawn from Dirichlet(1/2, ..)."""
    gamma, half = math.gamma, alphabet / 2
    counts = [symbols.count(symbol) for symbol in range(alphabet)]
    parts = math.prod(gamma(count + 0.5) / gamma(0.5) for count in counts)
    return parts * gamma(half) / gamma(len(symbols) + half)


def by_hazard(symbols, alphabet, ending):
    """Sum over all sets of switches of their probability times that of the segments."""
    total = 0.0
    for switches in itertools.product([False, True], repeat=len(symbols) - 1):
        cuts = [0, *(t + 1 for t, switch in enumerate(switches) if switch), len(symbols)]
        product = 1.0
        for begin, end in itertools.pairwise(cuts):
            product *= single(symbols[begin:end], alphabet)
            product *= math.prod(1 - ending[r] for r in range(end - begin - 1))
            if end < len(symbols):
                product *= ending[end - begin - 1]
        total += product
    return total


def by_tree(symbols, alphabet, depth):
    """The recursion of partition tree weighting, on a block of 2**depth positions."""
    if not symbols:
        return 1.0
    if not depth:
        return single(symbols, alphabet)
    half = 2 ** (depth - 1)
    halves = by_tree(symbols[:half], alphabet, depth - 1)
    halves *= by_tree(symbols[half:], alphabet, depth - 1)
    return (single(symbols, alphabet) + halves) / 2


@pytest.mark.parametrize("alphabet, length", [(2, 7), (2, 8), (3, 5)])
@pytest.mark.parametrize("switching", piecewise.SWITCHING)
def test_oracle_is_exact(switching, alphabet, length):
    """Every sequence's probability, position by position; all of them sum to 1."""
    source = tasks.make("piecewise", switching=switching, alphabet=alphabet, period=3)
    total = 0.0
    for symbols in itertools.product(range(alphabet), repeat=length):
        nats = source.oracle(np.array(symbols))
        assert nats.shape == (length,) and nats.dtype == np.float64
        total += math.exp(-nats.sum())
        if symbols[0] or symbols[-1] != 1:
            continue  # a share of them is enough for the slow sums
        if switching == "ptw":
            expected = by_tree(symbols, alphabet, (length - 1).bit_length())
        else:
            expected = by_hazard(symbols, alphabet, piecewise.hazards(switching, 3, length))
        assert math.isclose(math.exp(-nats.sum()), expected, rel_tol=1e-12)
    assert abs(total - 1) < 1e-14 * alphabet**length


@pytest.mark.parametrize("switching", piecewise.SWITCHING)
def test_oracle_sees_only_the_past(switching):
    """The nats of a prefix are those of the whole; rounding is all that may differ. In "ptw" the
    block has to be the same, 2**D."""
    source = tasks.make("piecewise", switching=switching, period=5, length=200)
    symbols = source[0]["targets"]
    whole = source.oracle(symbols)
    for length in (129, 177):
        np.testing.assert_allclose(source.oracle(symbols[:length]), whole[:length], atol=1e-12)
    flipped = symbols.copy()
    flipped[150:] = 1 - flipped[150:]
    np.testing.assert_allclose(source.oracle(flipped)[:150], whole[:150], atol=1e-12)


def test_oracle_where_weights_underflow():
    """Starts long ago have weights far below any float, and stay without influence when a symbol
    could be explained by them: the same by logarithms, which keep them."""
    symbols = np.concatenate([np.repeat([0, 1], 1500), np.tile([0, 1], 250)])
    length, switch = len(symbols), math.log(1 / 32)
    ones = np.append(0, np.cumsum(symbols))
    weights, expected = np.zeros(1), np.empty(length)
    for t, symbol in enumerate(symbols):
        runs = t - np.arange(t + 1)
        count = ones[t] - ones[: t + 1]
        joint = weights + np.log(((count if symbol else runs - count) + 0.5) / (runs + 1))
        total = np.logaddexp.reduce(joint)
        weights = np.append(joint - total + math.log(1 - 1 / 32), switch)
        expected[t] = -total
    assert weights.min() < math.log(np.finfo(float).smallest_subnormal) - 100
    source = tasks.make("piecewise", switching="geometric", length=length)
    np.testing.assert_allclose(source.oracle(symbols), expected, rtol=1e-9)


def statistics(count, **settings):
    """Of `count` rows: oracle [count, T], entropy of the true law [count, T], nats without switches
    [count, T], switches [count]."""
    source = tasks.make("piecewise", split="test", **settings)
    static = tasks.make("piecewise", switching="static", length=source.length)
    oracle, entropy, alone, switches = [], [], [], []
    for index in range(count):
        example = source[index]
        segment, laws = source.segments(index)
        oracle.append(example["oracle"])
        logs = np.log(laws, out=np.zeros_like(laws), where=laws > 0)
        entropy.append(-(laws * logs).sum(axis=1)[segment])
        alone.append(static.oracle(example["targets"]))
        switches.append(example["switches"])
    return tuple(map(np.array, (oracle, entropy, alone, switches)))


# Nats per symbol of 2,000 other rows of 256 symbols, by another implementation: switches a row,
# Bayes-optimal loss and its standard error, entropy, loss without switches, loss by quarter.
REFERENCE = {
    ("ptw", 1): (3.87, 0.4170, 0.0044, 0.3849, 0.4985, (0.4303, 0.4160, 0.4170, 0.4048)),
    ("lin", 1): (16.8, 0.4633, 0.0038, 0.3867, 0.5588, (0.5167, 0.4579, 0.4426, 0.4362)),
    ("geometric", 32): (8.07, 0.4699, 0.0024, 0.3849, 0.6480, (0.4737, 0.4673, 0.4709, 0.4679)),
    ("geometric", 64): (4.02, 0.4412, 0.0033, 0.3828, 0.6017, (0.4545, 0.4369, 0.4362, 0.4374)),
}


def check_reference(switching, period, count):
    """Means of independent samples differ by 4 standard errors, both counted, at most."""
    oracle, entropy, alone, switches = statistics(count, switching=switching, period=period)
    mean_switches, loss, error, true, without, quarters = REFERENCE[switching, period]

    def close(values, expected):
        spread = values.std(axis=0) * np.sqrt(1 / count + 1 / 2000)
        assert (np.abs(values.mean(axis=0) - expected) < 4 * spread).all()

    row = oracle.mean(axis=1)
    close(row, loss)
    close(switches, mean_switches)
    close(entropy.mean(axis=1), true)
    close(alone.mean(axis=1), without)
    close(oracle.reshape(count, 4, -1).mean(axis=2), quarters)
    # The standard error itself, whose relative error is about 1 / sqrt(2 count).
    assert abs(row.std() / np.sqrt(2000) / error - 1) < 4 * np.sqrt(0.5 / count + 0.5 / 2000) + 0.02
    # No predictor is better on average; the law itself is better than any.
    assert entropy.mean() < oracle.mean() < alone.mean()


@pytest.mark.parametrize("switching, period", REFERENCE)
def test_reference_values(switching, period):
    check_reference(switching, period, 200)


@pytest.mark.slow
@pytest.mark.parametrize("switching, period", REFERENCE)
def test_reference_values_of_many_rows(switching, period):
    check_reference(switching, period, 2000)


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        *({"switching": switching} for switching in piecewise.SWITCHING),
        {"switching": "ptw", "length": 100, "alphabet": 5},
        {"switching": "regular", "period": 1, "length": 9, "split": "test"},
        {"length": 1},
    ],
)
def test_layout(settings):
    source = tasks.make("piecewise", **settings)
    for index in range(1000):
        example = source[index]
        assert example["inputs"][0] == source.alphabet == source.vocab - 1
        assert (example["inputs"][1:] == example["targets"][:-1]).all()
        assert example["targets"].max() < source.alphabet and example["mask"].all()
        assert example["mask"].sum() == source.queries
        segment, laws = source.segments(index)
        assert laws.shape == (segment[-1] + 1, source.alphabet)
        np.testing.assert_allclose(laws.sum(axis=1), 1, rtol=1e-12)
        assert example["switches"] == segment[-1] == example["switch"].sum()
        assert (example["switch"][1:] == (segment[1:] > segment[:-1])).all()
        assert ("oracle" in example) == (source.split == "test")
    if source.switching == "regular":
        assert np.flatnonzero(example["switch"]).tolist() == [
            *range(source.period, source.length, source.period)
        ]
    if source.switching == "static":
        assert not example["switch"].any()


def test_switches_of_the_tree():
    """In front of p one stands where its block, of 2**level positions, and all around it split."""
    source = tasks.make("piecewise", length=16)
    switch = np.array([source[i]["switch"] for i in range(4000)])
    level = np.array([(p & -p).bit_length() for p in range(1, 16)])
    law = 0.5 ** (5 - level)
    assert law[7] == 1 / 2 and law[0] == 1 / 16 and law.sum() == 2
    assert not switch[:, 0].any()
    error = np.sqrt(law * (1 - law) / 4000)
    assert (np.abs(switch[:, 1:].mean(axis=0) - law) < 4 * error).all()


@pytest.mark.parametrize("switching", ["lin", "geometric"])
def test_segments_follow_the_hazard(switching):
    """The first segment has r symbols with probability h(r) (1 - h(1)) .. (1 - h(r - 1))."""
    source = tasks.make("piecewise", switching=switching, period=4, length=12)
    first = [np.append(np.flatnonzero(source[i]["switch"]), 12)[0] for i in range(4000)]
    ending = piecewise.hazards(switching, 4, 12)
    law = ending * np.cumprod(np.append(1, 1 - ending[:-1]))
    law[-1] = 1 - law[:-1].sum()
    counts = np.bincount(first, minlength=13)[1:]
    assert chi_square(counts, law) < 31.3  # 11 degrees of freedom, p = 0.001


def test_laws_and_symbols():
    """Of segments of one symbol: the mean entropy of Beta(1/2, 1/2) is 2 ln 2 - 1; of K symbols
    each is seen in 1 of K, and as often as its laws say."""
    for alphabet in (2, 4):
        source = tasks.make("piecewise", switching="regular", period=1, alphabet=alphabet)
        laws = np.concatenate([source.segments(i)[1] for i in range(20)])
        symbols = np.concatenate([source[i]["targets"] for i in range(20)])
        assert chi_square(np.bincount(symbols)) < 16.3  # 3 degrees of freedom, p = 0.001
        hits = np.eye(alphabet)[symbols] - laws  # each of mean 0 and variance law (1 - law)
        error = np.sqrt((laws * (1 - laws)).sum(axis=0))
        assert (np.abs(hits.sum(axis=0)) < 4 * error).all()
        if alphabet == 2:
            entropy = -(laws * np.log(laws)).sum(axis=1)
            error = entropy.std() / np.sqrt(len(laws))
            assert abs(entropy.mean() - (2 * math.log(2) - 1)) < 4 * error


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(switching="tree"),
            "switching='tree' .* allowed: ptw, lin, geometric, regular, static",
        ),
        (dict(period=0), "period=0 .* 1 or more"),
        (dict(alphabet=1), "alphabet=1 .* 2 or more"),
        (dict(length=0), "length=0 .* 1 or more"),
    ],
)
def test_impossible_settings(settings, message):
    refuses("piecewise", settings, message)


def test_show_marks_the_switches():
    source = tasks.make("piecewise", switching="regular", period=32, split="test")
    example = source[0]
    lines = source.show(example)
    assert lines[0] == "switches  7" and f"{example['oracle'].mean():.3f} nats" in lines[1]
    assert len(lines) == 3 + 8 and all(line.startswith("| ") for line in lines[4:])
    symbols = " ".join(lines[3:]).replace("| ", "").split()
    assert symbols == [str(symbol) for symbol in example["targets"]]
