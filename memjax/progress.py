"""What a person sees of a run: numbers with units, the progress line or bar, the loss curve."""

import math
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import jax
import numpy as np

from memjax.metrics import read_records

# ---------------------------------------------------------------- numbers for people


def human(number: float) -> str:
    """Three significant digits with a unit: 999, 41.2k, 1.23M, 2.5G. Not a number: 'nan'."""
    if not math.isfinite(number):
        return str(float(number))
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or unit == "T":
            break
        number /= 1000
    digits = 0 if abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    text = f"{number:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + unit


def duration(seconds: float) -> str:
    """'0.4s', '48s', '12m05s', '2h14m', '3d04h'; '?' when it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 1440:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes // 1440}d{minutes % 1440 // 60:02d}h"


def scientific(number: float) -> str:
    """'2.9e-4'; '0' for 0."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def memory(compiled: jax.stages.Compiled) -> str:
    """What a compiled program takes of one device, where its compiler says so."""
    found = compiled.memory_analysis()
    if found is None:
        return ""
    held, free = (human(n) for n in (found.argument_size_in_bytes, found.temp_size_in_bytes))
    return f"; a device holds {held}B of state and batch and needs {free}B of temporary memory"


def _fixed(number: float, digits: int) -> str:
    return f"{number:.{digits}f}" if abs(number) < 1000 else f"{number:.1e}"


_COLUMNS = (
    ("loss", lambda v: f"loss {_fixed(v, 3):>6}"),
    ("bits_per_byte", lambda v: f"{_fixed(v, 3):>5} bits/byte"),
    ("accuracy", lambda v: f"accuracy {100 * v:5.1f}%"),
    ("grad_norm", lambda v: f"grad {_fixed(v, 2):>5}"),
    ("lr", lambda v: f"lr {scientific(v):>6}"),
    ("tokens_per_second", lambda v: f"{human(v):>5} tok/s"),
    ("mfu", lambda v: f"{100 * v:4.1f}% mfu"),
    ("eta", lambda v: f"eta {duration(v):>6}"),
)


def format_line(step: int, steps: int, values: Mapping[str, Any]) -> str:
    """The progress line; only the columns whose key is in `values`, in a fixed order.

    `step 1200/20000   6.0% | loss  3.412 | 4.920 bits/byte | grad  0.81 | lr 2.9e-4 |  412k tok/s`

    `kind` 'eval' replaces the word `step`; a key that ends in `_accuracy` counts as accuracy.
    """
    values = dict(values)
    for key in [k for k in values if k.endswith("_accuracy")]:
        values.setdefault("accuracy", values[key])
    head = "eval" if values.get("kind") == "eval" else "step"
    cells = [f"{head} {step:>{len(str(steps))}}/{steps} {100 * step / max(steps, 1):5.1f}%"]
    cells += [
        show(float(np.asarray(values[key])))
        for key, show in _COLUMNS
        if values.get(key) is not None
    ]
    return " | ".join(cells)


class Progress:
    """A bar in a terminal, aligned lines elsewhere (files, notebooks); nothing off process 0.

    Args:
      steps: the run's length.  step: where it starts.  stream: default stdout.
      bar: force a bar or lines; None asks the stream whether it is a terminal.
    """

    def __init__(
        self, steps: int, step: int = 0, stream: TextIO | None = None, bar: bool | None = None
    ):
        self.steps, self.stream, self._bar = steps, stream or sys.stdout, None
        self.silent = jax.process_index() != 0
        if not self.silent and (self.stream.isatty() if bar is None else bar):
            from tqdm import tqdm

            self._bar = tqdm(
                total=steps,
                initial=step,
                file=self.stream,
                dynamic_ncols=True,
                bar_format="{bar:16} {desc}",
                leave=True,
            )

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows a step: moves the bar, or prints a line. An evaluation is always printed."""
        line = format_line(step, self.steps, values)
        if self._bar is None or values.get("kind") == "eval":
            self.note(line)
        else:
            self._bar.set_description_str(line, refresh=False)
            self._bar.update(step - self._bar.n)

    def note(self, text: str) -> None:
        """Prints a line of its own, above the bar when there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        elif not self.silent:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()


def report(summary: dict[str, Any], workdir: str) -> str:
    """What a finished run says at its end."""
    lines = [""]
    key = "bits_per_byte" if "bits_per_byte" in summary else "query_accuracy"
    unit = "held-out bits per byte" if key == "bits_per_byte" else "query accuracy"
    rows = {**summary["baselines"], "this model": summary[key]}
    lines.append(f"{unit}:")
    for name, value in sorted(rows.items(), key=lambda row: -row[1]):
        lines.append(f"  {name:<12} {value:.4f}" + ("  <-" if name == "this model" else ""))
    if "sample" in summary:
        lines += ["", "a sample, from the start of a document:", "", summary["sample"]]
    lines += [
        "",
        (
            f"{summary['steps']} steps in {duration(summary['seconds'])}, "
            f"{human(summary['tokens_per_second'])} tokens/s, "
            f"{human(summary['parameters'])} parameters"
        ),
        f"loss curve: {os.path.join(workdir, 'loss.png')}",
        f"figures:    {os.path.join(workdir, 'summary.json')}",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------- the loss curve

_UNITS = {"loss": "loss (nats per token)", "bits_per_byte": "bits per byte"}


def plot_loss(
    records: str,
    png: str,
    baselines: Mapping[str, float] | None = None,
    *,
    key: str | None = None,
    log_x: bool = False,
    title: str = "",
) -> str | None:
    """Draws the loss curve of a run: training (raw and smoothed), evaluations, baselines.

    Args:
      records: path of `metrics.jsonl`.
      png: path of the picture; replaced in one step.
      baselines: name -> height of a horizontal line, in the unit of `key`.
      key: what to draw; default `bits_per_byte` where the records have it, else `loss`.
      log_x: a logarithmic step axis.

    Returns:
      `png`, or None when there is no record to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_records(records)
    if key is None:
        key = "bits_per_byte" if any(r.get("bits_per_byte") is not None for r in rows) else "loss"
    train, evals = (
        np.array(
            [(r["step"], r[key]) for r in rows if r.get("kind") == kind and r.get(key) is not None],
            float,
        )
        for kind in ("train", "eval")
    )
    if not len(train) and not len(evals):
        return None
    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if len(train):
        axes.plot(*train.T, color="#1f77b4", alpha=0.25, linewidth=0.8, label="training")
        axes.plot(
            train[:, 0],
            _smooth(train[:, 1]),
            color="#1f77b4",
            linewidth=1.8,
            label="training, smoothed",
        )
    if len(evals):
        axes.plot(
            *evals.T, color="#d62728", marker="o", markersize=4, linewidth=1.2, label="held out"
        )
    if log_x:
        axes.set_xscale("log")
    _draw_baselines(axes, baselines or {})
    axes.set_xlabel("training step")
    axes.set_ylabel(_UNITS.get(key, f"{key} (fraction)" if "accuracy" in key else key))
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(framealpha=1, edgecolor="none")
    part = f"{png}.{os.getpid()}.part"
    figure.savefig(part, format="png")
    os.replace(part, png)
    return png


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of a fortieth of the curve up to each point, near the beginning of the last fifth."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    begin = end - np.clip(end // 5, 1, max(1, len(values) // 40))
    return (total[end] - total[begin]) / (end - begin)


def _draw_baselines(axes: Any, baselines: Mapping[str, float]) -> None:
    """Dashed lines, named at the right edge; names that would overlap are moved apart."""
    for height in baselines.values():
        axes.axhline(height, color="0.35", linestyle="--", linewidth=1)
    low, high = axes.get_ylim()
    free = -math.inf
    for name, height in sorted(baselines.items(), key=lambda item: item[1]):
        free = max(height, free + 0.045 * (high - low))
        axes.annotate(
            f"{name} {height:.3g}",
            (1.01, free),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
            color="0.25",
            annotation_clip=False,
        )
