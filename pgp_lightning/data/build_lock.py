"""The lock of a build: one process builds a source, the others wait; a killed one leaves nothing locked."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pgp_lightning.errors import ConfigError

__all__ = ["build_lock"]


@contextmanager
def build_lock(file: Path, on_wait: Callable[[], object]) -> Iterator[bool]:
    """Hold the exclusive lock of a file, which is made if it is not there.

    Args:
        file: the lock's file; who holds the lock may delete it.
        on_wait: called once if another process holds it.

    Yields:
        Whether the lock is held: not if its holder deleted the file while we waited, so look again at what it left.

    Raises:
        ConfigError: if the file system knows no locks.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # the folder is gone: its build was finished between two of our looks
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            raise ConfigError(
                f"{file.parent}: this file system knows no file locks, so two builds could disturb each other: "
                f"build on a local disk and copy the finished folder"
            ) from error
        try:
            held = os.path.samestat(os.fstat(descriptor), file.stat())
        except FileNotFoundError:
            held = False
        yield held
    finally:
        os.close(descriptor)
