"""Probes memories: any cell untrained, or the layers of a checkpoint on their own data.

    python -m memjax.probe --cells=all
    python -m memjax.probe --cells=delta_net,linear_attention --seeds=20
    python -m memjax.probe --workdir=runs/quickstart

Untrained: random unit pairs are stored in a cell and asked for: recall error and top-1 by the
number of pairs, beside the closed form where there is one, by age and by place in the list, after
overwriting, after an unrelated context; state norm, write norm and effective rank. A checkpoint:
norms, rank and fidelity of every memory, and for associative recall which activation restores an
answer. Both write figures as JSON and a PNG beside it (see memjax/probes).
"""

import dataclasses
import functools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import memjax
from memjax import cells, config, data, generate, metrics, workload
from memjax.cell import MemoryCell
from memjax.cells.sliding_window import SlidingWindow
from memjax.nn.lm import LanguageModel
from memjax.probes import intervention, layers, recall
from memjax.typing import PyTree

SHARP = 32.0  # inverse temperature of softmax: exact recall of unit keys at d = 64
TIMES = 16  # at which a trained state is measured in a row
ROWS = 16  # of a checkpoint's data


def make_cell(name: str, study: recall.Study) -> MemoryCell:
    """The cell of a name at the study's sizes. A window holds a quarter of the pairs, as much as a
    segment; softmax has the inverse temperature `SHARP`, as trained queries and keys are long."""
    part = study.pairs // 4
    shape = workload.Shape(length=study.pairs, dim=study.dim, window=part)
    cell = workload.make_cell(cells.get(name), shape)
    known = {field.name for field in dataclasses.fields(cell)}
    changes: dict[str, Any] = {"scale": SHARP} if isinstance(cell, SlidingWindow) else {}
    return dataclasses.replace(cell, **changes, **({"segment": part} if "segment" in known else {}))


def untrained(names: Sequence[str], study: recall.Study, kept=lambda found: None) -> dict[str, Any]:
    """Figures of each cell by name; tells a line for each, and calls `kept` with all so far."""
    lists, found = recall.draw(study), {}
    half = study.pairs // 2
    print(f"{'cell':<20} {'error':>7} {'theory':>7} {'top-1':>6} {'rebound':>8}  ({half} pairs)")
    for name in names:
        start = time.perf_counter()
        found[name] = recall.measure(make_cell(name, study), study, lists)
        found[name]["seconds"] = round(time.perf_counter() - start, 2)
        row = next(row for row in found[name]["capacity"] if row["pairs"] == half)
        theory = f"{row['theory']:7.3f}" if "theory" in row else f"{'-':>7}"
        again = found[name]["overwrite"][1]["right"]
        told = f"{row['error']:7.3f} {theory} {row['right']:6.3f} {again:8.3f}"
        print(f"{name:<20} {told}  {found[name]['seconds']:6.1f} s", flush=True)
        kept(found)
    return found


def checkpoint(workdir: str, step: int | None) -> dict[str, Any]:
    """Figures of a run's checkpoint, by default its latest, on the first rows of its held-out data.

    Raises:
      UserError: no such run or checkpoint, or data that cannot be made.
    """
    step, model, params, meta = generate.load(workdir, step)
    settings, batch = dict(meta["config"]["data"]), meta["config"]["batch"]
    with config.user_errors("data"):
        source = data.make(settings, batch=batch, seed=meta["config"]["seed"])
    rows = {name: a[:ROWS] for name, a in next(iter(source.evaluation(batch))).items()}
    found = opened(model, params, rows["inputs"], rows.get("reset"))
    if "distance" in rows:
        found["intervention"] = restored(model, params, rows)
    return {"workdir": workdir, "step": step, "rows": len(rows["inputs"]), **found}


def opened(model: LanguageModel, params: PyTree, tokens, reset) -> dict[str, Any]:
    """Norms, rank and fidelity of every memory of a model, and fidelity across its layers."""
    length = tokens.shape[1]
    every = max(n for n in range(1, length + 1) if length % n == 0 and n <= max(1, length // TIMES))
    lags = tuple(2**i for i in range(20) if 2**i < length)
    memories, outputs = layers.capture(model, params, tokens, reset)
    found = []
    for memory in memories:
        found.append(layers.measure(memory, reset, lags, every))
        last, near = found[-1]["over_time"][-1], found[-1]["fidelity"]
        told = f"norm {last['norm']:.3g}, rank {last['rank']:.1f}, fidelity after"
        after = ", ".join(f"{row['lag']} {row['cosine']:.2f}" for row in near[::2])
        print(f"{memory.name} ({found[-1]['cell']}): {told} {after}", flush=True)
    across = [float(value) for value in layers.across_layers(outputs)]
    return {"memories": found, "across_layers": across}


def restored(model: LanguageModel, params: PyTree, rows: Mapping[str, np.ndarray]) -> list[dict]:
    """The intervention on both tokens of a binding; tells the place that restores most. [] where
    the task has no such queries."""
    try:
        query = intervention.first_queries(
            *(rows[name] for name in ("inputs", "targets", "mask", "distance"))
        )
        tokens = {which: intervention.corrupted(query, which) for which in ("target", "source")}
    except ValueError as reason:
        print(f"no intervention: {reason}")
        return []
    found = [
        {"corrupted_token": which, **intervention.restoration(model, params, query, changed)}
        for which, changed in tokens.items()
    ]
    for each in found:
        told = (
            f"{each['corrupted_token']} exchanged: {each['clean']:.3f} -> {each['corrupted']:.3f}"
        )
        print(f"{told} of probability; restored at")
        for row in sorted(each["rows"], key=lambda row: -row["probability"])[:5]:
            place = f"layer {row['layer']}, {row['component']}, {row['position']}"
            print(f"  {place:<36} {row['probability']:+.3f}")
    return found


# ---------------------------------------------------------------- what is shown


def draw_cells(found: Mapping[str, Any], title: str) -> Figure:
    """A line for each cell, one for cells that answer alike, closed forms as crosses."""
    alike: dict[tuple, list[str]] = {}
    for name, figures in found.items():
        key = tuple(round(row["error"], 4) for row in figures["capacity"])
        alike.setdefault(key, []).append(name)
    groups = {"\n".join(names): found[names[0]] for names in alike.values()}
    panels = (
        ("capacity", "pairs", "error", "pairs stored"),
        ("capacity", "pairs", "right", "pairs stored"),
        ("by_age", "from", "right", "age of a pair, half of the pairs stored"),
        ("overwrite", "rebound", "right", "times bound again"),
        ("interference", "items", "change", "pairs of another context"),
        ("over_time", "pairs", "norm", "pairs stored"),
        ("over_time", "pairs", "write", "pairs stored"),
        ("over_time", "pairs", "rank", "pairs stored"),
    )
    names = {"right": "top-1", "change": "top-1, change", "norm": "state norm"}
    names |= {"write": "write norm / state norm", "rank": "effective rank", "error": "error"}
    figure = Figure(figsize=(19, 8), dpi=110, layout="constrained")
    for axes, (probe, x, y, label) in zip(figure.subplots(2, 4).flat, panels, strict=True):
        for i, (name, figures) in enumerate(groups.items()):
            style = dict(color=f"C{i % 10}", linestyle=("-", "--", ":")[i // 10 % 3], marker=".")
            rows = figures[probe]
            where = [row[x] for row in rows]
            axes.plot(where, [row[y] for row in rows], label=name, **style)
            if y == "error" and "theory" in rows[0]:
                axes.plot(where, [row["theory"] for row in rows], "kx", markersize=8)
        axes.set(xlabel=label, ylabel=names[y])
        axes.grid(alpha=0.25)
        if x != "rebound":
            axes.set_xscale("symlog" if x in ("from", "items") else "log", base=2)
        if y in ("error", "norm"):
            axes.set_yscale("symlog", linthresh=0.1)
            axes.set_ylim(bottom=0)
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", fontsize=8, labelspacing=0.8)
    figure.suptitle(f"{title}; crosses: closed form")
    return figure


def draw_layers(found: Mapping[str, Any], title: str) -> Figure:
    """Norms, rank and fidelity of each memory, and a map of what restores an answer."""
    maps = found.get("intervention", [])
    figure = Figure(figsize=(16, 8 if maps else 4), dpi=110, layout="constrained")
    grid = figure.subplots(2 if maps else 1, 4, squeeze=False)
    panels = (
        *(("over_time", "tokens", y) for y in ("norm", "write", "rank")),
        ("fidelity", "lag", "cosine"),
    )
    for axes, (probe, x, y) in zip(grid[0], panels, strict=True):
        for memory in found["memories"]:
            rows = memory[probe]
            axes.plot([r[x] for r in rows], [r[y] for r in rows], ".-", label=memory["name"])
        axes.set(xlabel=x, ylabel=y)
        axes.set_xscale("log", base=2)
    if found["memories"]:
        grid[0][0].legend(fontsize=8)
    for axes, each in zip(grid[-1], maps, strict=False):
        places = list(dict.fromkeys(row["position"] for row in each["rows"]))
        table = np.array([row["probability"] for row in each["rows"]]).reshape(-1, len(places))
        sites = list(dict.fromkeys(f"{row['layer']} {row['component']}" for row in each["rows"]))
        limit = max(each["clean"] - each["corrupted"], 1e-6)
        axes.imshow(table, vmin=-limit, vmax=limit, cmap="RdBu", aspect="auto")
        axes.set_xticks(range(len(places)), places)
        axes.set_yticks(range(len(sites)), sites, fontsize=7)
        axes.set_title(f"{each['corrupted_token']} exchanged: probability restored", fontsize=9)
    for axes in grid[1][len(maps) :] if maps else ():
        axes.set_axis_off()
    figure.suptitle(title)
    return figure


# ---------------------------------------------------------------- the command


def define_flags() -> None:
    """The command's flags; made when it runs, so that other programs may import this module."""
    study = recall.Study()
    flags.DEFINE_list("cells", [], "cells to probe untrained, or all")
    flags.DEFINE_string("workdir", None, "folder of a run, to probe its checkpoint instead")
    flags.DEFINE_integer("step", None, "checkpoint to use; the latest when not given")
    for name, text in (
        ("dim", "key and value dimension of a memory"),
        ("seeds", "lists of pairs"),
        ("pairs", "of the longest list: 64, 128, 256, .."),
    ):
        flags.DEFINE_integer(name, getattr(study, name), text, lower_bound=2)
    flags.DEFINE_float("keep", study.keep, "factor per write of cells that fade", 0.0, 1.0)
    flags.DEFINE_float("strength", study.strength, "of rates, within their ranges", 0.0, 1.0)
    flags.DEFINE_string("out", "", "file for the figures, *.json; a PNG beside it")


def chosen(given: flags.FlagValues, rest: Sequence[str]) -> tuple[list[str], recall.Study]:
    """(names of cells, study) of the flags; UserError for what does not exist."""
    if rest[1:]:
        raise config.UserError(f"{rest[1]!r} is no flag; flags begin with --")
    if bool(given.cells) == bool(given.workdir):
        raise config.UserError(
            "expected --cells=all, --cells=NAME,NAME or --workdir=FOLDER, one of them"
        )
    if not given.keep or not given.strength:
        raise config.UserError(
            f"--keep={given.keep}, --strength={given.strength}: expected numbers above 0, at most 1"
        )
    with config.user_errors("--cells"):
        names = [cells.get(name).name for name in given.cells if name != "all"]
    if "all" in given.cells:
        names = cells.names()
    with config.user_errors("untrained"):
        settings = ("dim", "seeds", "pairs", "keep", "strength")
        return names, recall.Study(**{name: getattr(given, name) for name in settings})


@config.exit_on_user_error
def main(argv: Sequence[str]) -> None:
    given = flags.FLAGS
    names, study = chosen(given, argv)
    logging.set_verbosity(logging.ERROR)  # orbax tells a lot
    out = given.out or os.path.join(given.workdir or "runs", "probe.json")
    picture = os.path.splitext(out)[0] + ".png"
    if not (given.out or given.workdir):
        os.makedirs("runs", exist_ok=True)
    folder = os.path.dirname(out) or "."
    if out == picture or not (os.path.isdir(folder) or folder == given.workdir):
        raise config.UserError(f"--out={out}: expected a file *.json in a folder that exists")
    with config.user_errors(f"--out={out}", OSError):
        if given.workdir:
            found = checkpoint(given.workdir, given.step)
            metrics.write_json(out, found)
            figure = draw_layers(found, f"{given.workdir}, step {found['step']}")
        else:
            about = {"memjax": memjax.__version__, "jax": jax.__version__}
            about |= {"device": jax.devices()[0].device_kind, **dataclasses.asdict(study)}

            def keep(cells_so_far):
                metrics.write_json(out, {**about, "cells": cells_so_far})

            found = untrained(names, study, keep)
            figure = draw_cells(found, f"untrained, d = {study.dim}, {study.seeds} seeds")
        FigureCanvasAgg(figure).print_png(picture)
    print(f"figures: {out}\nplot:    {picture}")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=functools.partial(config.parse_flags, config=False))
