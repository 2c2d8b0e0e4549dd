"""Configs as text: flat, as JSON, compared, in a run's folder. `memjax.config` re-exports it."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from memjax.errors import UserError


def plain(value: Any) -> Any:
    """The value as JSON has it: sections become dicts, tuples lists, numpy scalars numbers.

    Raises:
      TypeError: a value that JSON cannot hold.
    """
    if isinstance(value, (ConfigDict, Mapping)):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f'{value!r} ({type(value).__name__}) cannot be written as JSON; use '
                    'None, bool, int, float, str, tuples and dicts of these.')


def flatten(config: Mapping | ConfigDict, prefix: str = '') -> dict[str, Any]:
    """Dotted path -> value, sorted; tuples are values, an empty section is `{}`."""
    out = {}
    for key, value in config.items():
        if isinstance(value, (ConfigDict, Mapping)) and value:
            out |= flatten(value, f'{prefix}{key}.')
        else:
            out[f'{prefix}{key}'] = {} if isinstance(value, (ConfigDict, Mapping)) else value
    return dict(sorted(out.items()))


def to_json(config: Mapping | ConfigDict) -> str:
    """The config as indented JSON with sorted keys and a newline at the end."""
    return json.dumps(plain(config), indent=2, sort_keys=True) + '\n'


def from_json(text: str) -> ConfigDict:
    """The inverse of `to_json`: lists become tuples. The result is locked."""
    return ConfigDict(_tuples(json.loads(text))).lock()


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def difference(old: Mapping | ConfigDict, new: Mapping | ConfigDict,
               ignore: Sequence[str] = ()) -> list[str]:
    """One line per field that differs, `'model.dim: 64 -> 128'`; [] when none does.

    `ignore` names fields or sections that may differ, e.g. `('log', 'checkpoint.every')`.
    """
    old, new = flatten(plain(old)), flatten(plain(new))
    missing = object()

    def show(value):
        return '(absent)' if value is missing else repr(value)

    lines = []
    for path in sorted(old.keys() | new.keys()):
        a, b = old.get(path, missing), new.get(path, missing)
        skip = any(path == i or path.startswith(i + '.') for i in ignore)
        if not skip and a != b and show(a) != show(b):
            lines.append(f'{path}: {show(a)} -> {show(b)}')
    return lines


def claim(workdir: str, config: Mapping | ConfigDict, ignore: Sequence[str] = ()) -> None:
    """Writes `workdir/config.json`, or compares with the one that is there.

    Fields in `ignore` may differ; the file then takes the new values.

    Raises:
      UserError: the folder belongs to a run with another config, or cannot be written.
    """
    path = os.path.join(workdir, 'config.json')
    if os.path.exists(path):
        try:
            with open(path, encoding='utf-8') as f:
                old = json.load(f)
        except (OSError, ValueError) as err:
            raise UserError(f'{path} cannot be read ({err}); use another --workdir.') from err
        lines = difference(old, config, ignore)
        if lines:
            raise UserError(other_config(f'{workdir} holds a run', lines))
    try:
        os.makedirs(workdir, exist_ok=True)
        write_text(path, to_json(config))
    except OSError as err:
        raise UserError(f'--workdir={workdir} cannot be written: {err.strerror}.') from err


def other_config(what: str, lines: Sequence[str]) -> str:
    """The message for a run whose config differs in `lines`."""
    return '\n  '.join([f'{what} with another config. Fields that differ, there -> now:', *lines]
                       ) + '\nUse another --workdir, or give the fields the values they have there.'


def write_text(path: str, text: str) -> None:
    """Writes a file in one step: a reader, or a kill, sees the old text or the new one."""
    part = f'{path}.{os.getpid()}.part'
    with open(part, 'w', encoding='utf-8') as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
