"""What is seen of a sweep while it runs: a few lines that are drawn again in a terminal, a line for
each trial that ends elsewhere."""

import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import TextIO

from memjax import progress, results
from memjax.metrics import read_last

# Figures by which trials are compared where a search does not name one, and whether more is better.
GOALS = {"query_accuracy": True, "bits_per_byte": False, "loss": False}


class Table:
    """Counts a sweep's trials and remembers the best one.

    rows: of the trials that are in the results, by name.  total: how many there are with them.
    goal: figure -> whether more is better; the first one that a row has counts.
    """

    def __init__(
        self,
        rows: Mapping[str, results.Row],
        total: int,
        goal: Mapping[str, bool] | None = None,
        stream: TextIO | None = None,
    ):
        self.total, self.goal, self.stream = total, goal or GOALS, stream or sys.stdout
        self.known = self.done = len(rows)
        self.began = time.monotonic()
        self.best: tuple[float, str, results.Row] | None = None
        for name, row in rows.items():
            self._compare(name, row)
        self.live = self.stream.isatty()
        self.period = 1.0 if self.live else None  # seconds between two looks at the runs
        self.lines: list[str] = []  # below the last note
        self.drawn = 0
        self.lock = threading.RLock()

    def note(self, text: str) -> None:
        """Prints a line that stays, above the others."""
        with self.lock:
            self._erase()
            print(text, file=self.stream, flush=True)
            self._draw()

    def ended(self, name: str, row: results.Row | None) -> None:
        """Tells of a trial that has ended, None for one that failed."""
        with self.lock:
            self.done += 1
            if row:
                self._compare(name, row)
            told = [f"{name}: {self._told(row)}", *self._overall()]
            self.note(f"[{self.done - self.known}/{self.total - self.known}] {'; '.join(told)}")

    def show(self, running: Mapping[str, str]) -> None:
        """Draws how far the running trials are, in a terminal."""
        with self.lock:
            self._erase()
            self.lines = []
            if self.live and running:
                counts = f"{self.done} of {self.total} done, {len(running)} running"
                width = max(map(len, running))
                self.lines = ["; ".join([counts, *self._overall()])]
                self.lines += [f"  {name:<{width}}  {line}" for name, line in running.items()]
            self._draw()

    def _overall(self) -> Iterable[str]:
        if self.best:
            yield f"best {self.best[1]}, {self._told(self.best[2], seconds=False)}"
        ended = self.done - self.known
        if ended and self.done < self.total:
            left = (time.monotonic() - self.began) / ended * (self.total - self.done)
            yield f"{progress.duration(left)} left"

    def _compare(self, name: str, row: results.Row) -> None:
        figure = self._figure(row)
        if figure and math.isfinite(row[figure]):
            score = row[figure] if self.goal[figure] else -row[figure]
            if self.best is None or score > self.best[0]:
                self.best = score, name, row

    def _figure(self, row: results.Row) -> str | None:
        return next((name for name in self.goal if name in row), None)

    def _told(self, row: results.Row | None, seconds: bool = True) -> str:
        if row is None:
            return "failed, see its .log"
        if "failure" in row:
            return f"failed: {row['failure']}"
        figure = self._figure(row)
        told = f"{figure.replace('_', ' ')} {row[figure]:.4f}" if figure else "done"
        return f"{told} in {row['seconds']:.0f} s" if seconds else told

    def _erase(self) -> None:
        if self.drawn:
            self.stream.write(f"\x1b[{self.drawn}F\x1b[J")
        self.drawn = 0

    def _draw(self) -> None:
        size = shutil.get_terminal_size()
        room = max(2, size.lines - 1)
        lines = self.lines
        if len(lines) > room:
            lines = [*lines[: room - 1], f"  and {len(lines) - room + 1} more"]
        for line in lines:
            self.stream.write(line[: size.columns - 1] + "\n")
        self.stream.flush()
        self.drawn = len(lines)


def progress_of(workdir: str, steps: int) -> str:
    """How far a run is, by the last line of its metrics."""
    record = read_last(os.path.join(workdir, "metrics.jsonl"))
    return progress.format_line(record["step"], steps, record) if record else "begins"
