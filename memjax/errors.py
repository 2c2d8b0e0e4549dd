"""Errors that are meant for the user, how a program shows them, and exit codes. Imports nothing of
memjax."""

import contextlib
import difflib
import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

# Exit codes beside 0, 1 (a defect) and 2 (a mistake of the user).
DIVERGED = 3  # of a run whose loss is not finite: the same command would end so again
UNFINISHED = 75  # EX_TEMPFAIL, of an interrupted run: the same command continues it


class UserError(ValueError):
    """A mistake that the user can correct. A program prints the message alone and exits with 2.

    Only this class is treated so: any other exception, a plain ValueError too, is a defect and
    keeps its traceback. Code that calls a library function which raises `ValueError` for a bad
    setting wraps the call in `user_errors`.
    """


@contextlib.contextmanager
def user_errors(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions of `kinds` (default: ValueError) into `UserError('what: message')`.

    A `UserError` passes as it is; with `what` empty only the message is kept.
    """
    kinds = kinds or (ValueError,)
    try:
        yield
    except UserError:
        raise
    except kinds as err:
        text = err.args[0] if isinstance(err, KeyError) and err.args else err
        raise UserError(f"{what}: {text}" if what else str(text)) from err


def exit_on_user_error(main: Callable) -> Callable:
    """Decorates a `main`: a `UserError` is printed alone to stderr, then exit code 2."""

    @functools.wraps(main)
    def guarded(*args):
        try:
            return main(*args)
        except UserError as err:
            die(err)

    return guarded


def die(err: Exception) -> NoReturn:
    """Prints `error: message` to stderr and exits with 2."""
    sys.stdout.flush()
    print(f"error: {err}", file=sys.stderr, flush=True)
    sys.exit(2)


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """ " Did you mean 'x'?" with a leading space for the nearest allowed name, or ''."""
    near = difflib.get_close_matches(str(name), [str(a) for a in allowed], 1, 0.55)
    return f" Did you mean {near[0]!r}?" if near else ""


def optional(package: str, what: str, do: str) -> Any:
    """Imports an optional package for `what`; UserError with what to `do` when it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as err:
        raise UserError(
            f"{what} needs the package {package}, which is not installed; {do}"
        ) from err
