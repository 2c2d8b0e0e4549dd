"""Configs as text: the argument of a config file; flat, as JSON, compared, in a run's folder.

`memjax.config` re-exports all of it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from memjax.errors import UserError, did_you_mean

_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse_arg(arg: str | None, **spec: Any) -> ConfigDict:
    """Reads a config argument such as `'delta_net,steps=10,wide'`.

    Args:
      arg: the text after the colon of `--config=FILE:ARG`; None or '' gives the defaults.
      **spec: one entry per allowed name: either a default, whose type the value must have (bool,
        int, float or str), or `(default, choices)` with the allowed strings, or `(default, type)`,
        or `(default, function)` with one from the text to the value that raises ValueError.

    Items are separated by commas outside of brackets. An item without `=` is True for a bool and
    otherwise the value of the FIRST name of `spec`.

    Returns:
      A ConfigDict with every name of `spec`.

    Raises:
      UserError: unknown name, value not allowed or of the wrong type, or a name given twice.
    """
    rules = {k: v if isinstance(v, tuple) else (v, type(v)) for k, v in spec.items()}
    out = {name: default for name, (default, _) in rules.items()}
    seen = set()
    for item in _split(arg or ""):
        key, equals, text = _partition(item)
        if not equals:
            word = key in rules and rules[key][1] is bool
            key, text = (key, "true") if word else (next(iter(rules), key), item)
        if key not in rules:
            raise UserError(
                f"config argument {key!r} is unknown; allowed: "
                f"{', '.join(rules) or 'none'}.{did_you_mean(key, rules)}"
            )
        if key in seen:
            raise UserError(f"config argument {key!r} is given twice in {arg!r}; give it once.")
        seen.add(key)
        out[key] = _value(key, text, rules[key][1], rules)
    return ConfigDict(out)


def _value(key: str, text: str, allowed: Any, rules: Mapping) -> Any:
    """One argument's text as a value of the type `allowed`, or one of the choices `allowed`."""
    if callable(allowed) and not isinstance(allowed, type):
        try:
            return allowed(text)
        except ValueError as error:
            raise UserError(f"config argument {key}={text!r}: {error}") from None
    if not isinstance(allowed, type):
        choices = [str(c) for c in allowed]
        if text not in choices:
            raise UserError(
                f"config argument {key}={text!r} is not allowed; allowed: "
                f"{', '.join(choices)}.{did_you_mean(text, [*choices, *rules])}"
            )
        return text
    if allowed is bool:
        if text.lower() not in _WORDS:
            raise UserError(f"config argument {key}={text!r}: expected true or false.")
        return _WORDS[text.lower()]
    try:
        return allowed(text)
    except ValueError:
        raise UserError(f"config argument {key}={text!r}: expected {kind_name(allowed)}.") from None


def _split(arg: str) -> list[str]:
    """Splits at commas outside of brackets; drops empty items."""
    items, depth = [""], 0
    for char in arg:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            items.append("")
        else:
            items[-1] += char
    return [item.strip() for item in items if item.strip()]


def _partition(item: str) -> tuple[str, str, str]:
    """`item.partition('=')`, where an equals sign inside brackets does not count."""
    head, equals, tail = item.partition("=")
    return (item, "", "") if set(head) & set("([{") else (head.strip(), equals, tail.strip())


def kind_name(kind: type) -> str:
    """'an int', 'a str'."""
    return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"


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
    raise TypeError(
        f"{value!r} ({type(value).__name__}) cannot be written as JSON; use "
        "None, bool, int, float, str, tuples and dicts of these."
    )


def flatten(config: Mapping | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value, sorted; tuples are values, an empty section is `{}`."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (ConfigDict, Mapping)) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = {} if isinstance(value, (ConfigDict, Mapping)) else value
    return dict(sorted(out.items()))


def to_json(config: Mapping | ConfigDict) -> str:
    """The config as indented JSON with sorted keys and a newline at the end."""
    return json.dumps(plain(config), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """The inverse of `to_json`: lists become tuples. The result is locked."""
    return ConfigDict(_tuples(json.loads(text))).lock()


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def difference(
    old: Mapping | ConfigDict, new: Mapping | ConfigDict, ignore: Sequence[str] = ()
) -> list[str]:
    """One line per field that differs, `'model.dim: 64 -> 128'`; [] when none does.

    `ignore` names fields or sections that may differ, e.g. `('log', 'checkpoint.every')`.
    """
    old, new = flatten(plain(old)), flatten(plain(new))
    missing = object()

    def show(value):
        return "(absent)" if value is missing else repr(value)

    lines = []
    for path in sorted(old.keys() | new.keys()):
        a, b = old.get(path, missing), new.get(path, missing)
        skip = any(path == i or path.startswith(i + ".") for i in ignore)
        if not skip and a != b and show(a) != show(b):
            lines.append(f"{path}: {show(a)} -> {show(b)}")
    return lines


def claim(workdir: str, config: Mapping | ConfigDict, ignore: Sequence[str] = ()) -> None:
    """Writes `workdir/config.json`, or compares with the one that is there.

    Fields in `ignore` may differ; the file then takes the new values.

    Raises:
      UserError: the folder belongs to a run with another config, or cannot be written.
    """
    path = os.path.join(workdir, "config.json")
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as f:
                old = json.load(f)
        except (OSError, ValueError) as err:
            raise UserError(f"{path} cannot be read ({err}); use another --workdir.") from err
        lines = difference(old, config, ignore)
        if lines:
            raise UserError(other_config(f"{workdir} holds a run", lines))
    try:
        os.makedirs(workdir, exist_ok=True)
        write_text(path, to_json(config))
    except OSError as err:
        raise UserError(f"--workdir={workdir} cannot be written: {err.strerror}.") from err


def other_config(what: str, lines: Sequence[str]) -> str:
    """The message for a run whose config differs in `lines`."""
    return (
        "\n  ".join([f"{what} with another config. Fields that differ, there -> now:", *lines])
        + "\nUse another --workdir, or give the fields the values they have there."
    )


def write_text(path: str, text: str) -> None:
    """Writes a file in one step: a reader, or a kill, sees the old text or the new one."""
    part = f"{path}.{os.getpid()}.part"
    with open(part, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
