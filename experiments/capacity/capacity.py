"""What does each memory hold before it is trained, and do the closed forms say so?

    python experiments/capacity/capacity.py          # measures what results.jsonl has not yet
    python experiments/capacity/capacity.py --show   # the tables and the picture from the rows

Every cell with plain inputs, and two variants: what fades by 0.95 a write, and a delta rule of
strength one half (see memjax/probes/recall.py).
"""

import argparse
import dataclasses
import pathlib
import time

from memjax import cells, probe, results
from memjax.config_text import write_text
from memjax.probes import recall
from memjax.train import versions

FOLDER = pathlib.Path(__file__).parent
RESULTS = str(FOLDER / "results.jsonl")
SEEDS = 20
PLAIN = "plain"
# variant: (settings of the study, its cells)
VARIANTS = {
    PLAIN: ({}, cells.names()),
    "decay 0.95": ({"keep": 0.95}, ["simple_gla", "gated_delta_net", "gated_kalmanet"]),
    "strength 0.5": ({"strength": 0.5}, ["delta_net"]),
}
LAWS = (
    ("sum", "linear_attention", PLAIN),
    ("sum, decay 0.95", "simple_gla", "decay 0.95"),
    ("delta rule", "delta_net", PLAIN),
    ("delta rule, strength 0.5", "delta_net", "strength 0.5"),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", action="store_true", help="measure nothing")
    given = parser.parse_args()
    rows = results.read(RESULTS)
    for variant, (settings, names) in () if given.show else VARIANTS.items():
        study = recall.Study(seeds=SEEDS, **settings)
        lists = recall.draw(study)
        for name in names:
            if results.select(rows, cell=name, variant=variant):
                continue
            start = time.perf_counter()
            found = recall.measure(probe.make_cell(name, study), study, lists)
            seconds = round(time.perf_counter() - start, 1)
            del found["by_position"]  # of each N; the ages of N = 128 are kept
            labels = {"cell": name, "variant": variant}
            about = {"study": dataclasses.asdict(study), "seconds": seconds, "versions": versions()}
            rows.append({**labels, **rounded(found), **about})
            results.write(RESULTS, rows)
            print(f"{variant}, {name}: {seconds} s", flush=True)
    readme = FOLDER / "README.md"
    text = results.with_tables(readme.read_text(encoding="utf-8"), tables(rows))
    write_text(str(readme), text)
    draw(rows).savefig(FOLDER / "capacity.png")


def rounded(value):
    """Numbers with five digits, in any nest of lists and dicts."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def tables(rows):
    """The errors beside their laws, and all cells."""
    return {"laws": laws(rows), "ages": ages(rows), "cells": everything(rows)}


def laws(rows):
    counts = [row["pairs"] for row in rows[0]["capacity"]]
    lines, seeds = [], rows[0]["study"]["seeds"]
    for title, name, variant in LAWS:
        (found,) = results.select(rows, cell=name, variant=variant)
        measured, theory, far = [], [], []
        for row in found["capacity"]:
            measured.append(f"{row['error']:.4f} ({row['error_sd']:.4f})")
            theory.append(f"{row['theory']:.4f}")
            difference = row["error"] - row["theory"]
            deviations = difference / (row["error_sd"] / seeds**0.5)
            far.append(f"{100 * difference / row['theory']:+.1f} %, {deviations:+.1f} se")
        lines += [[title, *measured], ["law", *theory], ["difference", *far]]
    return ["memory", *(f"N = {n}" for n in counts)], lines


def spread(row, figure, digits=2):
    return f"{row[figure]:.{digits}f} ({row[figure + '_sd']:.{digits}f})"


def everything(rows):
    head = ["cell", "error, N = 128", "law", "top-1, N = 64", "128", "256", "bound twice"]
    head += ["first 32 after 96 others", "effective rank, N = 256", "state bytes"]
    lines = []
    for found in rows:
        capacity = {row["pairs"]: row for row in found["capacity"]}
        title = f"`{found['cell']}`" + (
            "" if found["variant"] == PLAIN else f", {found['variant']}"
        )
        law = f"{capacity[128]['theory']:.2f}" if "theory" in capacity[128] else "-"
        line = [title, spread(capacity[128], "error"), law]
        line += [spread(capacity[n], "right") for n in (64, 128, 256)]
        line.append(spread(next(r for r in found["overwrite"] if r["rebound"] == 1), "right"))
        line.append(spread(next(r for r in found["interference"] if r["items"] == 96), "right"))
        line += [spread(found["over_time"][-1], "rank", 1), found["state_bytes"]]
        lines.append(line)
    return head, lines


def ages(rows):
    """Top-1 by the age of a pair after 128 pairs, of the sum and the delta rule."""
    lines = []
    for title, name, variant in LAWS:
        (found,) = results.select(rows, cell=name, variant=variant)
        lines.append([title, *(f"{row['right']:.2f}" for row in found["by_age"])])
    octaves = [(row["from"], row["to"]) for row in rows[0]["by_age"]]
    head = [f"age {a}" if a == b else f"{a}-{b}" for a, b in octaves]
    return ["memory", *head], lines


def draw(rows):
    """The picture of `python -m memjax.probe` with the variants as cells of their own."""
    found = {
        row["cell"] + ("" if row["variant"] == PLAIN else f", {row['variant']}"): row
        for row in rows
    }
    return probe.draw_cells(found, f"untrained, d = 64, {SEEDS} seeds")


if __name__ == "__main__":
    main()
