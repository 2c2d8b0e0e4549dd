"""Which form of a cell is fastest, as measured: what `implementation=None` goes by.

`forms.json` is written by `python -m memjax.benchmark --record`: platform -> class of the cell ->
"forward" or "both" (forward and backward) -> pairs [tokens, forms, fastest first].
"""

import functools
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

PATH = pathlib.Path(__file__).with_suffix(".json")
DIRECTIONS = ("forward", "both")


@functools.cache
def table() -> Mapping[str, Any]:
    """The measurements that are kept."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def fastest(platform: str, kind: str, length: int, differentiate: bool) -> tuple[str, ...]:
    """The forms of a class of cells, fastest first, at the measured length that is nearest in
    ratio; () when none within a factor of 8 was measured.
    """
    direction = DIRECTIONS[differentiate]
    rows = table().get(platform, {}).get(kind, {}).get(direction, [])
    near = [(abs(math.log(measured / length)), order) for measured, order in rows]
    distance, order = min(near, key=lambda pair: pair[0], default=(math.inf, ()))
    return tuple(order) if distance <= math.log(8) else ()


def updated(old: Mapping[str, Any], platform: str, records: Iterable[Mapping]) -> dict[str, Any]:
    """`old` with the classes of `records` (see `memjax.benchmark.measure`) measured anew."""
    measured: dict[str, Any] = {}
    for record in records:
        for direction, key in zip(DIRECTIONS, ("forward_ms", "both_ms"), strict=True):
            if record[key] is not None:
                lengths = measured.setdefault(record["class"], {}).setdefault(direction, {})
                lengths.setdefault(record["length"], {})[record["form"]] = record[key]
    rows = {
        kind: {
            direction: [[n, sorted(times, key=times.__getitem__)] for n, times in by_length.items()]
            for direction, by_length in directions.items()
        }
        for kind, directions in measured.items()
    }
    return {**old, platform: dict(sorted({**old.get(platform, {}), **rows}.items()))}
