"""Configs: files, the command line, and comparison.

A config file defines `get_config()` or `get_config(arg)` and returns an `ml_collections.ConfigDict`
with typed defaults. The command line names the file and changes fields:

    --config=configs/mqar.py:delta_net,seed=1 --config.optim.lr=3e-4 --config.model.dim=128

What follows the colon is the config argument; `parse_arg` reads it. `parse_flags` is given to
`absl.app.run` and answers every mistake with one message and exit code 2. In Python, `load` does
the same without a command line and raises `UserError`.

Importing this module defines no flag, so that config files may import it.
"""

import ast
import contextlib
import difflib
import functools
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from memjax.config_text import (
    claim,
    difference,
    flatten,
    from_json,
    kind_name,
    other_config,
    parse_arg,
    plain,
    to_json,
    write_text,
)
from memjax.errors import UserError, did_you_mean, die, exit_on_user_error, user_errors

__all__ = [
    "UserError",
    "claim",
    "did_you_mean",
    "difference",
    "exit_on_user_error",
    "flatten",
    "from_json",
    "load",
    "other_config",
    "parse_arg",
    "parse_flags",
    "plain",
    "to_json",
    "user_errors",
    "write_text",
]

_FLAG = re.compile(r"--?(?P<no>no)?config(?:\.(?P<path>[^=]*))?(?:=(?P<value>.*))?$", re.DOTALL)
_MISSING = (
    "--config is missing; write --config=FILE.py or --config=FILE.py:ARGUMENT, "
    "for example --config=configs/quickstart.py"
)


# ---------------------------------------------------------------- config files


def load(source: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Loads `'configs/x.py'` or `'configs/x.py:argument'` and changes fields.

    Args:
      source: path of the config file, with its argument after a colon.
      overrides: dotted path -> value, e.g. `{'model.dim': 128}`.

    Returns:
      The locked ConfigDict.

    Raises:
      UserError: no such file, a file that raises or has no `get_config`, an argument it does not
        take, an unknown field, or a value of another type.
    """
    file, colon, arg = source.partition(":")
    config = _call(_import(file), file, arg if colon else None).lock()
    for path, value in (overrides or {}).items():
        _check_path(config, path, f"config.{path}")
        parent, _, key = path.rpartition(".")
        node = _node(config, parent) if parent else config
        try:
            node[key] = value
        except (TypeError, ValueError):
            raise UserError(
                f"config.{path}={value!r}: expected {_kind(node, key)}, "
                f"got {kind_name(type(value))}."
            ) from None
    return config


def _import(file: str):
    """Runs a config file as a module of its own."""
    if not os.path.isfile(file):
        raise UserError(f"--config={file}: {_no_such_file(file)}")
    name = "_memjax_config_" + re.sub(r"\W", "_", os.path.abspath(file))
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={file}: not a Python file (its name must end in .py).")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _raised_in(file):
            spec.loader.exec_module(module)
    finally:
        sys.modules.pop(name, None)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(
            f"--config={file}: the file has no function get_config; "
            "define get_config() or get_config(arg) that returns a ConfigDict."
        )
    return module


def _call(module: Any, file: str, arg: str | None) -> ConfigDict:
    """`module.get_config`, with the argument when one was given."""
    args = () if arg is None else (arg,)
    signature = inspect.signature(module.get_config)
    try:
        signature.bind(*args)
    except TypeError:
        if arg is None:
            raise UserError(
                f"--config={file}: its get_config needs an argument; "
                f"write --config={file}:ARGUMENT."
            ) from None
        raise UserError(
            f"--config={file}:{arg}: its get_config takes no argument; write --config={file}."
        ) from None
    with _raised_in(file if arg is None else f"{file}:{arg}"):
        config = module.get_config(*args)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={file}: get_config must return an ml_collections.ConfigDict, "
            f"it returned {kind_name(type(config))}."
        )
    for path in flatten(config):
        for name in path.split("."):
            if hasattr(ConfigDict, name):  # which is what ml_collections would find there
                raise UserError(
                    f"--config={file}: {path} has the name of a method of ConfigDict, so that no "
                    f"flag could set it; name the field otherwise, for example {name + '_'!r}."
                )
    return config


@contextlib.contextmanager
def _raised_in(source: str) -> Iterator[None]:
    """Names the config file and the line for whatever it raises."""
    try:
        yield
    except UserError as err:
        raise UserError(f"--config={source}: {err}") from err
    except Exception as err:
        file = os.path.abspath(source.partition(":")[0])
        lines = [
            f.lineno
            for f in traceback.extract_tb(err.__traceback__)
            if os.path.abspath(f.filename) == file
        ]
        line = err.lineno if isinstance(err, SyntaxError) else (lines or [None])[-1]
        where = f", line {line}" if line else ""
        text = err.msg if isinstance(err, SyntaxError) else err
        raise UserError(
            f"--config={source}: the config file raised {type(err).__name__}{where}: {text}"
        ) from err


def _no_such_file(file: str) -> str:
    """Why there is no such file, with near names or the folder's config files."""
    folder, name = os.path.split(file)
    if not os.path.isdir(folder or "."):
        above, last = os.path.split(folder)
        near = difflib.get_close_matches(
            last,
            [e.name for e in os.scandir(above or ".") if e.is_dir()]
            if os.path.isdir(above or ".")
            else [],
            1,
        )
        hint = f" Did you mean {os.path.join(above, near[0], name)!r}?" if near else ""
        return f"no such folder {folder!r} (looked in {os.getcwd()}).{hint}"
    names = sorted(
        n for n in os.listdir(folder or ".") if n.endswith(".py") and not n.startswith("_")
    )
    stems = {n[:-3]: n for n in names}
    near = difflib.get_close_matches(name.removesuffix(".py"), stems, 1, 0.55)
    hint = f" Did you mean {os.path.join(folder, stems[near[0]])!r}?" if near else ""
    return f"no such file; {folder or 'this folder'} has {', '.join(names) or 'no .py file'}.{hint}"


# ---------------------------------------------------------------- the command line


def parse_flags(
    argv: Sequence[str], *, config: bool = True, flag_values: flags.FlagValues = flags.FLAGS
) -> list[str]:
    """Parses a command line: `app.run(main, flags_parser=parse_flags)`.

    Defines the flag `--config` (read it in `main` as `flags.FLAGS.config`, a locked ConfigDict) and
    parses all flags. Any mistake is printed to stderr as one message, then exit code 2.

    Args:
      argv: the command line with the program's name first.
      config: False for a program without a `--config` flag.
      flag_values: where the flags live.

    Returns:
      The arguments that are no flags, with the program's name first.
    """
    try:
        return _parse(list(argv), config, flag_values)
    except UserError as err:
        die(err)


def _parse(argv: list[str], with_config: bool, values: flags.FlagValues) -> list[str]:
    config = None
    if with_config:
        for name in [n for n in values if n == "config" or n.startswith("config.")]:
            delattr(values, name)  # left by an earlier call in the same process
        try:
            argv = [*argv[:1], *values.read_flags_from_files(argv[1:], force_gnu=False)]
        except flags.Error as err:
            raise UserError(str(err)) from None
        source, changes = _given(argv[1:])
        if source == "":
            raise UserError(_MISSING)
        if source is not None:
            config = load(source)
            for path, text in changes:
                _check_path(config, path, f"--config.{path}")
                _check_text(config, path, text)
        config_flags.DEFINE_config_file(
            "config",
            help_string="config file, with its argument after a colon; change a field "
            "with --config.section.field=value",
            flag_values=values,
            sys_argv=argv,
        )
    try:
        rest = values(argv)
    except (AttributeError, KeyError, ValueError, TypeError, SyntaxError, flags.Error) as err:
        raise UserError(_explain(err, config)) from err
    if with_config and values["config"].value is None:
        raise UserError(_MISSING)
    return rest


def _given(args: Sequence[str]) -> tuple[str | None, list[tuple[str, str]]]:
    """The config file, and (path, text) of the changed fields, as the command line gives them."""
    source, changes = None, []
    for i, arg in enumerate(args):
        if arg == "--":
            break
        match = _FLAG.match(arg)
        if not match:
            continue
        value = match["value"] if match["value"] is not None else "".join(args[i + 1 : i + 2])
        if match["path"] is not None:
            if source is None:
                raise UserError(f"{arg} comes before --config=FILE; give --config first.")
            changes.append((match["path"], value))
        elif not match["no"]:
            if source is not None:
                raise UserError(f"--config is given twice ({source} and {arg}); give it once.")
            source = value
    return source, changes


def _check_path(config: ConfigDict, path: str, shown: str) -> None:
    """Raises a UserError when `path` ('model.dim') names no field that can be set."""
    if "[" in path:
        raise UserError(f"{shown}: an element cannot be set alone; set the whole field.")
    parts = path.split(".")
    for i, part in enumerate(parts):
        parent = ".".join(parts[:i])
        node = _node(config, parent) if parent else config
        if not isinstance(node, ConfigDict):
            raise UserError(
                f"{shown}: {parent} is a field ({kind_name(type(node))}), not a section."
            )
        if part not in node:
            rest = ".".join(parts[i + 1 :])
            raise UserError(f"{shown}: {_no_such_field(config, node, parent, part, rest)}")
    if isinstance(node[parts[-1]], list):
        raise UserError(f"{shown}: a list cannot be set; make it a tuple in the config file.")
    if node.get_type(parts[-1]) is type(None):
        raise UserError(
            f"{shown}: the config sets this field to None without a type; write "
            "config_dict.placeholder(float), or the type it has, in the config file."
        )


def _check_text(config: ConfigDict, path: str, text: str) -> None:
    """Raises a UserError for what absl and ml_collections would take and turn into nonsense."""
    value = _node(config, path)
    if isinstance(value, tuple):
        example = "('a', 'b')" if not value else repr(value)
        if not isinstance(_literal(text), tuple):
            raise UserError(
                f"--config.{path}={text}: expected a tuple, written as in "
                f'--config.{path}="{example}".'
            )
    if isinstance(value, ConfigDict):
        if not isinstance(_literal(text), dict):
            raise UserError(
                f"--config.{path}={text}: {path} is a section; set one of its fields: "
                f"{', '.join(sorted(value)) or 'it has none'}."
            )
        fields = [k for k, v in value.items() if not isinstance(v, ConfigDict)]
        if fields:  # the dict would drop every field that it does not name
            raise UserError(
                f"--config.{path}: set the fields of this section one by one: "
                f"{', '.join(sorted(fields))}."
            )


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


def _no_such_field(config: ConfigDict, node: ConfigDict, parent: str, part: str, rest: str) -> str:
    prefix = f"{parent}." if parent else ""
    near = difflib.get_close_matches(part, list(node), 1, 0.55)
    if near:
        tail = "" if not rest else f".{rest}"
        hint = f" Did you mean --config.{prefix}{near[0]}{tail}?"
    elif parent and not node:
        hint = f' An empty section is set as a whole: --config.{parent}="{{{part!r}: ...}}".'
    else:
        name = (rest or part).rpartition(".")[2]
        leaves = [p for p in flatten(config) if p.rpartition(".")[2] == name]
        hint = f" Did you mean --config.{leaves[0]}?" if leaves else ""
    what = f"config has no section {prefix}{part!s}" if rest else "no such field"
    return f"{what}; fields of {parent or 'config'}: {', '.join(sorted(node)) or 'none'}.{hint}"


def _explain(err: Exception, config: ConfigDict | None) -> str:
    """The message of a parsing error, with the expected type when a config field is at fault."""
    text = str(err.args[0] if err.args else err).replace("\n", " ")
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", text)
    if config is None or match is None:
        return text
    parent, _, key = match[1].rpartition(".")
    node = _node(config, parent) if parent else config
    return f"--config.{match[1]}={match[2]}: expected {_kind(node, key)} (now {node[key]!r})."


def _node(config: ConfigDict, path: str) -> Any:
    return functools.reduce(lambda node, key: node[key], path.split("."), config)


def _kind(node: ConfigDict, key: str) -> str:
    return "a section" if isinstance(node[key], ConfigDict) else kind_name(node.get_type(key))
