"""Locks of files and folders against other processes, released when their holder ends."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from memjax.errors import UserError


def lock(file: TextIO, wait: bool) -> bool:
    """Locks a file until every process that was given it has closed it; False if it is locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as err:
        if err.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return True  # a file system without locks
    return True


@contextmanager
def alone(workdir: str) -> Iterator[None]:
    """While no other training runs in the workdir, which is made when it is absent.

    Raises:
      UserError: another one does, or the folder cannot be written.
    """
    try:
        os.makedirs(workdir, exist_ok=True)
        file = open(os.path.join(workdir, ".lock"), "a", encoding="utf-8")
    except OSError as err:
        raise UserError(f"--workdir={workdir} cannot be written: {err.strerror}.") from err
    with file:
        if not lock(file, wait=False):
            raise UserError(
                f"--workdir={workdir}: another training runs there; wait until it has ended, or "
                "use another --workdir."
            )
        yield
