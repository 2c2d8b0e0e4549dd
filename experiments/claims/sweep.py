"""Do memories do what their papers say, at a size for two cores?

    python -m memjax.sweep --sweep=experiments/claims/sweep.py --jobs=2

Each claim says that one model is better than another. It holds here if every seed of the one is
better than every seed of the other, is reversed if every seed of the other is, and open if they
overlap. Trains what the experiments that it takes its rows from have not trained yet.
"""

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from memjax import results

PARTS = (
    "forgetting_mqar", "parity_and_groups", "recall_claims", "memory_caching", "hybrid_recall",
    "joint_recall", "chunk_length", "mqar",
)  # fmt: skip
READMES = ("../../README.md",)
GATED = {"mode": "grm", "segment": 4}  # of Memory Caching: 8 segments of 4 tokens bind the pairs
COLORS = {"holds": "tab:blue", "open": "0.6", "reversed": "tab:red"}


@dataclasses.dataclass(frozen=True)
class Claim:
    """`figure` of the rows of `experiment` with the labels `common` and `better` is above that of
    those with `worse`, or below it if less is better."""

    text: str
    experiment: str
    figure: str
    common: Mapping[str, Any]
    better: Mapping[str, Any]
    worse: Mapping[str, Any]
    less: bool = False

    def groups(self, rows):
        rows = results.select(rows, experiment=self.experiment, **self.common)
        return results.select(rows, **self.better), results.select(rows, **self.worse)

    def verdict(self, rows):
        """'holds', 'reversed' or 'open'; '-' unless both have three seeds."""
        sign = -1 if self.less else 1
        better, worse = ([sign * row[self.figure] for row in g] for g in self.groups(rows))
        if min(len(better), len(worse)) < 3:
            return "-"
        if min(better) > max(worse):
            return "holds"
        return "reversed" if max(better) < min(worse) else "open"


def recall(text, question, better, worse):
    return Claim(
        text, "recall_claims", "query_accuracy", {"question": question},
        {"model": better}, {"model": worse},
    )  # fmt: skip


def solves(rows):
    return recall(
        f"Gated KalmaNet (2511.21016) recalls more than Gated DeltaNet, {rows} x 64", "solve",
        f"gated_kalmanet, {rows} x 64, half-life 256",
        f"gated_delta_net, {rows} x 64, half-life 256",
    )  # fmt: skip


def formal(text, task, figure, better, worse):
    return Claim(
        text, "parity_and_groups", figure, {"task": task}, {"model": better}, {"model": worse}
    )


def forgets(text, better, worse):
    return Claim(
        text, "forgetting_mqar", "query_accuracy", {"dtype": "float32"},
        {"cell": better}, {"cell": worse},
    )  # fmt: skip


def hybrid(text, better, worse):
    return Claim(
        text, "hybrid_recall", "query_accuracy", {"task": "mqar"},
        {"model": better}, {"model": worse},
    )  # fmt: skip


def cached(text, cell, better, worse):
    return Claim(
        text, "memory_caching", "query_accuracy", {"cell": cell}, better, worse,
    )  # fmt: skip


def chunks(cell, task, figure, long, less):
    return Claim(
        f"`{cell}`, {task}: chunks of 1 token are better than of {long}", "chunk_length", figure,
        {"task": task, "cell": cell}, {"chunk": 1}, {"chunk": long}, less,
    )  # fmt: skip


CLAIMS = (
    forgets("the delta rule overwrites a value, a sum does not (2102.11174)",
            "delta_net", "linear_attention"),
    forgets("a decay (Simple GLA) overwrites better than a sum", "simple_gla", "linear_attention"),
    forgets("the delta rule overwrites better than that decay", "delta_net", "simple_gla"),
    formal("parity beyond the trained length needs steps up to 2 (2411.12537), DeltaNet", "parity",
           "from_128", "delta_net, beta <= 2", "delta_net, beta <= 1"),
    formal("the same, Gated DeltaNet", "parity",
           "from_128", "gated_delta_net, beta <= 2", "gated_delta_net, beta <= 1"),
    formal("S3 beyond the trained length needs two steps a token (2502.10297)", "S3", "token_128",
           "delta_product, 2 steps, beta <= 2", "delta_product, 1 step, beta <= 2"),
    recall("Lattice (2504.05646) recalls more than DeltaNet, 8 x 64 numbers", "slots",
           "lattice, 8 x 64", "delta_net, 8 x 64"),
    recall("the same, 16 x 64", "slots", "lattice, 16 x 64", "delta_net, 16 x 64"),
    recall("OmegaNet (2505.23735) recalls more with a window c of 8 than of 1", "window",
           "omega_net, c = 8", "omega_net, c = 1"),
    recall("products of 8 channels (2505.23735) bind two keys better than the 8, OmegaNet",
           "features", "omega_net, products of 8", "omega_net, 8 channels"),
    recall("and better than 44 channels, at equal state", "features",
           "omega_net, products of 8", "omega_net, 44 channels"),
    recall("linear attention with Taylor features of 8 (2402.18668), than the 8", "features",
           "linear_attention, Taylor of 8", "linear_attention, 8 channels"),
    recall("and than 44 channels, at equal state", "features",
           "linear_attention, Taylor of 8", "linear_attention, 44 channels"),
    solves(8),
    solves(16),
    cached("Memory Caching (2602.24281), gated: 8 segments of DeltaNet recall more than none",
           "delta_net", GATED, {"mode": "alone"}),
    cached("8 segments of DeltaNet more than one", "delta_net", GATED, GATED | {"segment": 32}),
    cached("8 segments of linear attention more than none",
           "linear_attention", GATED, {"mode": "alone"}),
    cached("8 segments of linear attention more than one",
           "linear_attention", GATED, GATED | {"segment": 32}),
    hybrid("B'MOJO (2407.06324) recalls what its window does not see", "bmojo", "window"),
    hybrid("B'MOJO-F, without the store, recalls less", "bmojo", "bmojo_f"),
    chunks("titans", "forgetting_mqar", "query_accuracy", 32, False),
    chunks("omega_net", "forgetting_mqar", "query_accuracy", 32, False),
    chunks("titans", "tiny_text", "bits_per_byte", 64, True),
    chunks("omega_net", "tiny_text", "bits_per_byte", 64, True),
    Claim("joint recall: attention binds context and key, Mamba-2 does not (2507.00449)",
          "joint_recall", "query_accuracy", {"lr": 5e-3},
          {"cell": "attention"}, {"cell": "mamba2"}),
)  # fmt: skip


def tried(rows):
    """The claims of which both models have three seeds."""
    return [claim for claim in CLAIMS if claim.verdict(rows) != "-"]


def tables(rows):
    lines = []
    for claim in tried(rows):
        figures = [results.spread(group, claim.figure) for group in claim.groups(rows)]
        lines.append([claim.text, *figures, claim.verdict(rows), f"`{claim.experiment}`"])
    return {"claims": (["claim", "the one", "the other", "here", "experiment"], lines)}


def draw(rows):
    """Left: MQAR against the bytes of state. Right: the claims that are about accuracies, from the
    mean of the other to that of the one."""
    shown = [claim for claim in tried(rows) if not claim.less]
    figure = Figure(figsize=(13, 1 + 0.33 * len(shown)), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    recalled = results.select(rows, experiment="mqar")
    for cell, group in results.grouped(recalled, "cell").items():
        widths = results.grouped(group, "dim").values()
        sizes = [results.best(each, "lr", "score") for each in widths]
        (line,) = left.plot(
            [each[0]["state_bytes"] for each in sizes],
            [results.mean(each, "score") for each in sizes],
            "o-", label=cell,
        )  # fmt: skip
        points = [(row["state_bytes"], row["score"]) for each in sizes for row in each]
        left.plot(*zip(*points, strict=True), "o", color=line.get_color(), alpha=0.3, ms=4)
    left.set_xscale("log", base=2)
    left.set(
        xlabel="bytes of state, widths 32 and 64", ylabel="accuracy, mean of 4 to 32 pairs",
        ylim=(-0.02, 1.02), title="MQAR after 1000 steps, one layer, one head",
    )  # fmt: skip
    left.legend(fontsize=8)
    for height, claim in enumerate(shown):
        better, worse = (results.mean(group, claim.figure) for group in claim.groups(rows))
        color = COLORS[claim.verdict(rows)]
        right.plot([worse, better], [height, height], color=color, linewidth=2)
        right.plot([worse], [height], "o", color=color, mfc="white")
        right.plot([better], [height], "o", color=color)
    right.set_yticks(range(len(shown)), [textwrap.fill(c.text, 44) for c in shown], fontsize=7)
    right.set_ylim(len(shown) - 0.5, -0.5)
    right.set(xlim=(-0.1, 1.02), title="accuracy; filled: the one that is said to be better")
    for verdict, color in COLORS.items():
        right.plot([], [], color=color, label=verdict)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    return figure
