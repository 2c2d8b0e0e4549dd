"""What a run records: metrics on disk and to other services, read late, and its speeds.

A record is one JSON object per line of `metrics.jsonl`: `step` (int, steps finished), `time` (unix
seconds), `kind` ('train' or 'eval') and numbers such as `loss` (nats a token), `bits_per_byte`,
`accuracy` (fraction), `grad_norm`, `lr`, `tokens_per_second`. A number that is not finite is null.

So that a killed run leaves no record missing or doubled, the training loop does, at a step that
saves a checkpoint: read the late metrics (`Late.flush`), write them, evaluate and write, then save;
and a resumed run opens `Metrics` with the restored step, which drops the records after it.
"""

import json
import math
import os
import time
import uuid
from collections import deque
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any, TextIO

import jax
import numpy as np

from memjax.config_text import plain, write_text
from memjax.errors import optional

# ---------------------------------------------------------------- records


def read_records(path: str) -> list[dict[str, Any]]:
    """The records of a jsonl file in file order; a half-written line is left out."""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as f:
        return [r for r in map(_record, f) if r is not None]


def read_last(path: str) -> dict[str, Any] | None:
    """The last whole record of a jsonl file, without reading all of it; None before the first."""
    if not os.path.exists(path):
        return None
    with open(path, "rb") as f:
        f.seek(max(0, os.path.getsize(path) - 10_000))
        records = [record for record in map(_record, f) if record]
    return records[-1] if records else None


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(record, dict)
    return record if whole and isinstance(record.get("step"), int) else None


class Jsonl:
    """Appends records to a file. A half-written last line, left by a kill, is dropped first."""

    def __init__(self, path: str):
        self.path = path
        self._file = self._opened()
        if not _ends_whole(path):
            self.truncate_after(None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one record; it is with the operating system when this returns (a kill keeps it).

        `values`: numbers (Python, numpy or JAX scalars) and strings; `kind` is 'train' by default.
        """
        record = {"step": int(step), "time": round(time.time(), 3), "kind": "train"}
        record |= {key: _number(value) for key, value in values.items()}
        self._file.write(json.dumps(record) + "\n")

    def truncate_after(self, step: int | None) -> int:
        """Drops the records of later steps than `step` (None: of none), and half-written lines.

        The file is replaced in one step: a kill leaves the old one or the new one.

        Returns:
          How many lines were dropped.
        """
        self.close()
        kept, lines = [], 0
        with open(self.path, "rb") as f:
            for line in f:
                lines += 1
                record = _record(line)
                if record is not None and (step is None or record["step"] <= step):
                    kept.append(line.decode())
        if len(kept) < lines:
            write_text(self.path, "".join(kept))
        self._file = self._opened()
        return lines - len(kept)

    def flush(self) -> None:
        """Waits until the records are on the disk (call it before a checkpoint)."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _opened(self) -> TextIO:
        return open(self.path, "a", encoding="utf-8", buffering=1)


def _ends_whole(path: str) -> bool:
    with open(path, "rb") as f:
        if f.seek(0, os.SEEK_END) == 0:
            return True
        f.seek(-1, os.SEEK_END)
        return f.read(1) == b"\n"


def _number(value: Any) -> Any:
    if isinstance(value, str) or value is None:
        return value
    value = np.asarray(value).item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str, values: Mapping[str, Any]) -> None:
    """Writes a JSON file such as `summary.json` in one step; numbers that are not finite are null.

    Keys keep their order. Arrays of one element count as numbers.
    """

    def scalar(value):
        if isinstance(value, Mapping):
            return {k: scalar(v) for k, v in value.items()}
        one = isinstance(value, (np.ndarray, jax.Array)) and value.size == 1
        return np.asarray(value).item() if one else value

    write_text(path, json.dumps(_finite(plain(scalar(values))), indent=2) + "\n")


# ---------------------------------------------------------------- writers


class Metrics:
    """All writers of a run: `metrics.jsonl` always, TensorBoard and W&B when asked for.

    Args:
      workdir: the run's folder; it is made when it does not exist.
      restored: the step that the run resumes from: later records are dropped. None: a new run,
        all records are dropped.
      tensorboard: also write event files to `workdir/tensorboard` (needs tensorboardX).
      wandb: also log to Weights & Biases (needs wandb); a resumed run continues its W&B run.
      config: the run's config, shown by W&B.

    On all processes but the first it writes nothing.

    Raises:
      UserError: a package that was asked for is not installed.
    """

    def __init__(
        self,
        workdir: str,
        restored: int | None = None,
        *,
        tensorboard: bool = False,
        wandb: bool = False,
        config: Any = None,
    ):
        self.writers: list[Any] = []
        if jax.process_index() != 0:
            return
        os.makedirs(workdir, exist_ok=True)
        extra: list[Any] = []
        if tensorboard:
            extra.append(TensorBoard(workdir, restored))
        if wandb:
            extra.append(Wandb(workdir, config))
        jsonl = Jsonl(os.path.join(workdir, "metrics.jsonl"))
        jsonl.truncate_after(-1 if restored is None else restored)
        self.writers = [jsonl, *extra]

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for writer in self.writers:
            writer.write(step, values)

    def flush(self) -> None:
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


class TensorBoard:
    """Event files in `workdir/tensorboard`, through tensorboardX (no TensorFlow)."""

    def __init__(self, workdir: str, restored: int | None = None):
        module = _logger("tensorboardX", "config.log.tensorboard")
        purge = None if restored is None else restored + 1
        self._writer = module.SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=purge)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in _scalars(values).items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A Weights & Biases run; its id is kept in `workdir/wandb_id`, so that a resume continues."""

    def __init__(self, workdir: str, config: Any = None):
        module = _logger("wandb", "config.log.wandb")
        path = os.path.join(workdir, "wandb_id")
        if not os.path.exists(path):
            write_text(path, uuid.uuid4().hex[:8])
        with open(path, encoding="utf-8") as f:
            name = f.read().strip()
        self._run = module.init(
            project="memjax",
            id=name,
            resume="allow",
            dir=workdir,
            name=os.path.basename(os.path.abspath(workdir)),
            config=None if config is None else plain(config),
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(_scalars(values), step=step)

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self) -> None:
        self._run.finish()


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    kind = values.get("kind", "train")
    return {
        f"{kind}/{k}": float(np.asarray(v))
        for k, v in values.items()
        if not isinstance(v, str) and v is not None
    }


def _logger(package: str, flag: str) -> Any:
    do = f"run `pip install {package}`, or leave {flag} at False."
    return optional(package, f"{flag}=True", do)


# ---------------------------------------------------------------- reading late, and time


class Late:
    """Hands metrics back one step late, so that the host never waits for the step in flight."""

    def __init__(self):
        self._kept: tuple[int, Mapping[str, Any]] | None = None

    def push(self, step: int, metrics: Mapping[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """Keeps this step's device metrics; returns (step, Python numbers) of the one before."""
        out = self.flush()
        self._kept = (step, metrics)
        return out

    def flush(self) -> tuple[int, dict[str, Any]] | None:
        """Waits for the kept step and returns it, or None; nothing is kept afterwards."""
        kept, self._kept = self._kept, None
        if kept is None:
            return None
        values = jax.device_get(dict(kept[1]))
        return kept[0], {k: np.asarray(v).item() for k, v in values.items()}


class Clock:
    """Time spent in training steps, without compilation, evaluation and checkpoints.

    It starts paused. `start()` after the first step has compiled; `tick(tokens)` at the end of each
    step; `with clock.paused(wait_for=state):` around everything else. `state()` goes into the
    checkpoint and `Clock(**meta['clock'])` continues from it.

    Attributes:
      spent: seconds, over all restarts.  steps, tokens: what was done in that time.
    """

    def __init__(self, spent: float = 0.0, steps: int = 0, tokens: int = 0, window: int = 50):
        self.spent, self.steps, self.tokens = float(spent), int(steps), int(tokens)
        self._recent: deque[tuple[float, int]] = deque(maxlen=window)
        self._mark: float | None = None

    def start(self) -> None:
        """The next step starts now."""
        self._mark = time.perf_counter()

    def tick(self, tokens: int = 0) -> None:
        """A step of this many tokens has ended. While paused it only starts the clock."""
        now = time.perf_counter()
        if self._mark is not None:
            self._recent.append((now - self._mark, tokens))
            self.spent += now - self._mark
            self.steps += 1
            self.tokens += tokens
        self._mark = now

    @contextmanager
    def paused(self, wait_for: Any = None):
        """Leaves out what happens inside. `wait_for`: arrays of the step in flight; the time until
        they are ready still counts, because it is the step's."""
        running = self._mark is not None
        if self._mark is not None:
            jax.block_until_ready(wait_for)
            self.spent += (late := time.perf_counter() - self._mark)
            if self._recent:
                self._recent[-1] = (self._recent[-1][0] + late, self._recent[-1][1])
        self._mark = None
        try:
            yield
        finally:
            if running:
                self.start()

    def tokens_per_second(self) -> float:
        """Over the last steps (`window`); 0 before the first tick."""
        return self._per_second(sum(tokens for _, tokens in self._recent))

    def steps_per_second(self) -> float:
        """Over the last steps (`window`); 0 before the first tick."""
        return self._per_second(len(self._recent))

    def eta(self, steps: int) -> float:
        """Seconds that `steps` more steps take at the recent speed; infinite before a tick."""
        speed = self.steps_per_second()
        return steps / speed if speed else math.inf

    def mean_tokens_per_second(self) -> float:
        """Over the whole run with its restarts."""
        return self.tokens / self.spent if self.spent else 0.0

    def state(self) -> dict[str, Any]:
        return {"spent": self.spent, "steps": self.steps, "tokens": self.tokens}

    def _per_second(self, amount: float) -> float:
        seconds = sum(s for s, _ in self._recent)
        return amount / seconds if seconds else 0.0
