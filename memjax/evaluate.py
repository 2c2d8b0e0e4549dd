"""Held-out figures of a checkpoint, taken apart, as a table, JSON and a plot.

    python -m memjax.evaluate --workdir=runs/quickstart
    python -m memjax.evaluate --workdir=runs/quickstart --length=32768

Text: bits per byte by the number of tokens that the model has seen of the document, and by file.
Tasks: accuracy per query, per row and per kind of answer, by the distance between a query and what
it asks for, by position where all in a row are scored, and by whatever else the task marks; the
loss of the best prediction that is possible beside the model's, where the task knows it. A longer
row than in training shows whether the memory holds on; it is read in pieces, so that it takes no
more memory.
"""

import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memjax import config, data, generate, metrics, tasks, train_step
from memjax.nn.lm import LanguageModel, capacity
from memjax.typing import PyTree

# Facts of the data that do not change what is held out; a task's examples are an endless stream.
MAY_DIFFER = (
    "length", "shuffle", "workers", "batch", "seed", "shards", "hash", "eval_examples", "test",
)  # fmt: skip
PIECE = 4096  # tokens of a row that are read at once
SHOWN = 10  # files in the table, hardest first
MANY = 24  # values of a fact that have a line each
LABELS = {"distance": "tokens since the answer", "to": "scored positions of the row"}

Scored = dict[str, np.ndarray]


def score_rows(model: LanguageModel, params: PyTree, source: data.Data, limit: int | None):
    """Yields batches of `source.evaluation(limit)` with nats and correct [B, T] beside them."""
    given = functools.partial(train_step.score, model, queries=None, differentiate=False)
    score = jax.jit(given, donate_argnames="state")
    for batch in source.evaluation(limit):
        state, parts = None, []
        rows = {name: array for name, array in batch.items() if array.ndim > 1}
        for at in range(0, source.evaluation_length, PIECE):
            piece = {name: array[:, at : at + PIECE] for name, array in rows.items()}
            scores = score(params, piece, state=state)
            state = scores.state
            parts.append(jax.device_get((scores.nats, scores.correct)))
        nats, correct = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        yield {**batch, "nats": nats, "correct": correct}


def of_text(batches: Iterator[Scored], names: Sequence[str], sizes: np.ndarray) -> dict:
    """Bits per byte of held-out text, by context and by file.

    batches: of the held-out stream. names: of its documents, where the batches are all of them in
    order; () for no figures by file. sizes: bytes of each token [vocab].
    """
    sums = {key: np.zeros(64) for key in ("nats", "count")}
    files = {key: np.zeros(len(names)) for key in ("nats", "count")}
    document = -1  # of the token in front of the next row
    for batch in batches:
        seen = _context(batch["reset"])
        index = document + np.cumsum(batch["reset"].ravel()).reshape(seen.shape)
        document = index[-1, -1]
        mask = batch["mask"]
        values = {
            "nats": batch["nats"][mask].astype(np.float64),
            "count": sizes[batch["targets"][mask]],
        }
        octave = np.floor(np.log2(seen[mask])).astype(int)
        for key, value in values.items():
            np.add.at(sums[key], octave, value)
            if names:
                np.add.at(files[key], index[mask], value)
    unit = math.log(2)
    found = {
        "bits_per_byte": sums["nats"].sum() / sums["count"].sum() / unit,
        "by_context": [
            {
                "from": 2**i,
                "to": 2 ** (i + 1) - 1,
                "bits_per_byte": sums["nats"][i] / count / unit,
                "bytes": int(count),
            }
            for i, count in enumerate(sums["count"])
            if count
        ],
    }
    if names:
        found["by_file"] = [
            {"name": name, "bits_per_byte": nats / count / unit, "bytes": int(count)}
            for name, nats, count in zip(names, files["nats"], files["count"], strict=True)
            if count
        ]
    return found


def _context(reset: np.ndarray) -> np.ndarray:
    """How many tokens of its document, itself included, the model has seen at each of [B, T]."""
    position = np.arange(reset.shape[1])
    start = np.maximum.accumulate(np.where(reset, position, 0), axis=1)
    return position - start + 1


def of_task(batches: Iterator[Scored], chance: float) -> dict:
    """Loss, accuracy per query, per row and per answer, and tables by distance, position, every
    group of positions that is marked, and every fact of a row.

    chance: the query accuracy of a guess.
    """
    query, row = _gathered(batches)
    right, holds = query.pop("correct"), query.pop("holds")
    per_query = {"query_accuracy": right}
    per_row = {"query_accuracy": row.pop("share"), "sequence_accuracy": row.pop("whole")}
    losses = {"loss": query.pop("nats")}
    if "oracle" in query:
        losses["oracle"] = query.pop("oracle")
    by_answer = grouped("answer", query.pop("targets"), per_query, "queries")
    found = {
        "query_accuracy": right.mean(),
        "sequence_accuracy": per_row["sequence_accuracy"].mean(),
        "chance": chance,
        "scaled_accuracy": train_step.scaled(right.mean(), chance),
        "macro_accuracy": np.mean([line["query_accuracy"] for line in by_answer]),
        **{name: values.mean() for name, values in losses.items()},
    }
    count, consecutive = query.pop("count"), row.pop("consecutive").all()
    if "distance" in query:
        found["by_distance"] = grouped("distance", query.pop("distance"), per_query, "queries")
    if consecutive and count.max() > 1:
        found["by_position"] = _by_position(count, {**per_query, **losses}, holds)
    for name, marks in query.items():
        by = grouped(name, marks, {**per_query, **losses}, "queries")
        found["by_" + name] = [{**line, name: bool(line[name])} for line in by[::-1]]
    for name, values in row.items():
        found["by_" + name] = by_fact(name, values, per_row)
    return found


def _gathered(batches: Iterator[Scored]) -> tuple[Scored, Scored]:
    """What batches say of each scored position [N] and of each row [R], by name.

    Of positions also count, how many of the row are scored up to it, itself included, and holds,
    whether all these are right; of rows share, the accuracy, whole, whether all is right, and
    consecutive, whether the scored positions stand one behind another.
    """
    query: dict[str, list] = {}
    row: dict[str, list] = {}
    for batch in batches:
        used = batch["mask"].any(axis=1)
        mask, right = batch["mask"][used], (batch["correct"] & batch["mask"])[used]
        first, end = mask.argmax(axis=1), mask.shape[1] - mask[:, ::-1].argmax(axis=1)
        of_positions = {
            name: array[used]
            for name, array in batch.items()
            if array.shape == batch["mask"].shape and name not in ("inputs", "mask", "reset")
        }
        of_positions["count"] = mask.cumsum(axis=1)
        of_positions["holds"] = np.logical_and.accumulate(right | ~mask, axis=1)
        of_rows = {name: array[used] for name, array in batch.items() if array.ndim == 1}
        of_rows["share"] = right.sum(axis=1) / mask.sum(axis=1)
        of_rows["whole"] = (right == mask).all(axis=1)
        of_rows["consecutive"] = mask.sum(axis=1) == end - first
        for name, array in of_positions.items():
            query.setdefault(name, []).append(array[mask])
        for name, array in of_rows.items():
            row.setdefault(name, []).append(array)
    joined = [{n: np.concatenate(parts) for n, parts in each.items()} for each in (query, row)]
    return joined[0], joined[1]


def _by_position(count: np.ndarray, figures: Mapping[str, np.ndarray], holds: np.ndarray) -> list:
    """Means of figures over the scored positions up to the 1st, 2nd, 4th ... of their row, from
    behind the one before, and the share of rows in which all is right up to there."""
    to = np.minimum(2 ** np.ceil(np.log2(count)).astype(int), count.max())
    lines = grouped("to", to, figures, "queries")
    return [
        {**line, "sequence_accuracy": holds[count == line["to"]].mean(), "queries": number}
        for line, number in ((line, line.pop("queries")) for line in lines)
    ]


def by_fact(name: str, values: np.ndarray, figures: Mapping[str, np.ndarray]) -> list:
    """The means of figures of rows for each value of a fact; for each octave of it where there are
    more than MANY."""
    if len(np.unique(values)) <= MANY:
        return grouped(name, values, figures, "rows")
    octaves = np.floor(np.log2(np.maximum(values, 1))).astype(int)
    lines = grouped("octave", octaves, figures, "rows")
    borders = [(values[octaves == n].min(), values[octaves == n].max()) for n in np.unique(octaves)]
    return [
        {name: int(low), "to": int(high)} | {k: v for k, v in line.items() if k != "octave"}
        for line, (low, high) in zip(lines, borders, strict=True)
    ]


def grouped(name: str, keys: np.ndarray, figures: Mapping[str, np.ndarray], unit: str) -> list:
    """The means of figures [N] for each value of keys [N], and their number, called `unit`."""
    values, place = np.unique(keys, return_inverse=True)
    count = np.bincount(place)
    means = {figure: np.bincount(place, given) / count for figure, given in figures.items()}
    return [
        {name: int(v), **{f: mean[i] for f, mean in means.items()}, unit: int(count[i])}
        for i, v in enumerate(values)
    ]


# ---------------------------------------------------------------- what is shown


def table(found: Mapping[str, Any]) -> str:
    """The figures as text: each group's rows under its name, files hardest first."""
    lines = [
        f"{name:<18} {value:.4f}" for name, value in found.items() if not isinstance(value, list)
    ]
    for name, rows in found.items():
        if not isinstance(rows, list):
            continue
        lines += ["", name.replace("_", " ")]
        if name == "by_file":
            rows = sorted(rows, key=lambda row: -row["bits_per_byte"])
            lines[-1] += f" (the {SHOWN} hardest of {len(rows)})" if len(rows) > SHOWN else ""
        figures = [key for key, value in rows[0].items() if isinstance(value, float)]
        lines[-1] = f"{lines[-1]:<32}" + "".join(f"{key.replace('_', ' '):>19}" for key in figures)
        lines[-1] += f"{list(rows[0])[-1]:>11}"
        for row in rows[: SHOWN if name == "by_file" else None]:
            *known, count = row.values()
            label = " - ".join(str(part) for part in known if not isinstance(part, float))
            values = "".join(f"{row[key]:>19.4f}" for key in figures)
            lines.append(f"  {label:<30}{values}{count:>11,}")
    return "\n".join(lines)


def draw(found: Mapping[str, Any], path: str, title: str) -> None:
    """A PNG: bits per byte by context and over the files, or a task's accuracy by distance, by
    position, or by the first of the other tables."""
    figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
    if "by_context" in found:
        left, right = figure.subplots(1, 2, sharey=True)
        rows = found["by_context"]
        left.plot([r["from"] for r in rows], [r["bits_per_byte"] for r in rows], "o-")
        left.set(xlabel="tokens of the document seen", ylabel="bits per byte")
        left.set_xscale("log", base=2)
        files = found.get("by_file", [])
        right.scatter([f["bytes"] for f in files], [f["bits_per_byte"] for f in files], s=12)
        right.set(xscale="log", xlabel="bytes of the file")
        for axes in (left, right):
            axes.axhline(found["bits_per_byte"], color="0.6", linewidth=1)
    else:
        axes = figure.subplots()
        name = next(name for name, value in found.items() if isinstance(value, list))
        key = next(iter(found[name][0]))
        across, up = ([row[f] for row in found[name]] for f in (key, "query_accuracy"))
        axes.plot([float(x) for x in across], up, "o-")
        axes.axhline(found["query_accuracy"], color="0.6", linewidth=1)
        axes.set(ylim=(-0.02, 1.02), xlabel=LABELS.get(key, key), ylabel="query accuracy")
    figure.suptitle(title)
    FigureCanvasAgg(figure).print_png(path)


# ---------------------------------------------------------------- the command


def evaluate(workdir: str, step: int | None = None, length: int = 0, rows: int = 0) -> dict:
    """The figures of a run's checkpoint, by default its latest, on its own held-out data.

    length: tokens of a row, and of the largest expression where rows have one; 0 for that of
    training. A batch has so many rows that it has no more tokens than one of training, at least
    one. rows: 0 for all; otherwise about so many (a whole
    number of batches) rows of text, spread evenly and without figures by file, or the first so many
    examples of a task.

    Raises:
      UserError: no such run or checkpoint, other data than the run's, a length that the task does
        not have, or rows that the model's attention cannot hold.
    """
    step, model, params, meta = generate.load(workdir, step)
    settings, batch = dict(meta["config"]["data"]), meta["config"]["batch"]
    task = settings["name"] not in ("text", "tfds")
    limit = capacity(model.config)
    if limit is not None and length > limit:
        raise config.UserError(f"--length={length}: the model's attention holds {limit} tokens")
    if length:
        settings = lengthened(settings, length, task)
        batch = min(batch, max(1, batch * meta["data"]["length"] // length))
    if rows and task:
        settings["eval_examples"] = rows
    with config.user_errors(f"--length={length}" if length else "data"):
        source = data.make(settings, batch=batch, seed=meta["config"]["seed"])
    for fact, trained in meta["data"].items():
        now = source.fingerprint.get(fact)
        if fact not in MAY_DIFFER and trained != now:
            raise config.UserError(
                f"{workdir} was trained on data whose {fact} is {trained}, here it is {now}; "
                "held-out files may have been seen in training, so evaluate on the same data"
            )
    some = None if task or not rows else math.ceil(rows / batch)
    scored = score_rows(model, params, source, some)
    if source.tokeniser is None:
        assert source.chance is not None
        found = of_task(scored, source.chance)
    else:
        names, sizes = () if some else source.heldout, [*map(len, source.tokeniser.pieces)]
        found = of_text(scored, names, np.array(sizes))
    return {"workdir": workdir, "step": step, "length": source.evaluation_length, **found}


def lengthened(settings: Mapping[str, Any], length: int, task: bool) -> dict[str, Any]:
    """A run's settings of its data, with rows of so many tokens in evaluation; expressions grow
    with their rows.

    Raises UserError for a mixture, whose rows have the lengths of its cells.
    """
    known = tasks.settings(settings["name"]) if task else {"length"}
    longer = {name: length for name in ("length", "max_size") if name in known}
    if not longer:
        raise config.UserError(
            f"--length={length}: a {settings['name']} has the lengths of its cells; leave it out"
        )
    if task:
        return {**settings, "test": {**settings.get("test", {}), **longer}}
    return {**settings, **longer}


def define_flags() -> None:
    """The command's flags; made when it runs, so that other programs may import this module."""
    flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    flags.DEFINE_integer("step", None, "checkpoint to use; the latest when not given")
    flags.DEFINE_integer("length", 0, "tokens of a row; 0: as in training", lower_bound=0)
    flags.DEFINE_integer("rows", 0, "of text or of a task's examples; 0: all", lower_bound=0)
    flags.DEFINE_string("out", "", "file for the figures, a PNG beside it; in the workdir if empty")


@config.exit_on_user_error
def main(argv: Sequence[str]) -> None:
    if argv[1:]:
        raise config.UserError(f"{argv[1]!r} is no flag; flags begin with --")
    logging.set_verbosity(logging.ERROR)  # orbax tells a lot
    given = flags.FLAGS
    found = evaluate(given.workdir, given.step, given.length, given.rows)
    about = {key: found.pop(key) for key in ("workdir", "step", "length")}
    title = f"{about['workdir']}, step {about['step']}, rows of {about['length']} tokens"
    print(f"{title}\n\n{table(found)}\n")
    out = given.out or os.path.join(given.workdir, "evaluation.json")
    picture = os.path.splitext(out)[0] + ".png"
    with config.user_errors(f"--out={out}", OSError):
        metrics.write_json(out, {**about, **found})
        draw(found, picture, title)
    print(f"figures: {out}\nplot:    {picture}")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=functools.partial(config.parse_flags, config=False))
