"""Reading files of a machine that fails for a moment: what is no such file, and what is no property of the data.

A read that fails for any other reason than that there is no such file (a disk, a network, permissions, too many open
files) is tried again, and then stops what reads. Counted as a fault of the record, it would stay in finished shards.
The same goes for a file that is missing together with all others: of a mount that drops an empty folder stays, or none.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pgp_lightning.errors import ConfigError

__all__ = ["is_missing", "patiently", "refuse_lack_of_memory"]

Result = TypeVar("Result")

_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_PAUSES = (0.1, 0.5, 2.0)  # seconds before each further try


def is_missing(error: OSError) -> bool:
    """Say whether an error means that there is no such file, however often one looks."""
    return error.errno in _MISSING


def patiently(path: Path, read: Callable[[], Result], folders: Sequence[Path] = ()) -> Result:
    """Return what a function reads from a file, called again where the machine fails.

    Args:
        path: what is read, for messages.
        read: raises OSError.
        folders: where such files lie; that one is missing is believed only while these are there and hold anything.

    Raises:
        OSError: if there is no such file.
        ConfigError: if the machine fails again and again.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except OSError as error:
            lost = next(filter(_is_lost, folders), None) if is_missing(error) else None
            if is_missing(error) and lost is None:
                raise
            if pause is None:
                why = f"the folder {lost} is gone or empty" if lost else error.strerror or error
                raise ConfigError(
                    f"{path} cannot be read, tried {len(_PAUSES) + 1} times: {why}. That is the "
                    f"machine's fault (disk, network, permissions, open files), so no record is left out for it: mend "
                    f"it and start again; a build keeps its finished shards, a run its checkpoints"
                ) from error
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _is_lost(folder: Path) -> bool:
    """Say whether a folder is gone or empty."""
    try:
        with os.scandir(folder) as entries:  # not a list: there may be millions
            return next(entries, None) is None
    except PermissionError:  # files may be readable where the folder is not
        return False
    except OSError:
        return True


def refuse_lack_of_memory(error: Exception) -> None:
    """Look at what a decoder of images raised.

    Raises:
        MemoryError: if it had no memory, which Pillow reports as OSError like damage.
    """
    if isinstance(error, OSError) and "out of memory" in str(error):
        raise MemoryError(str(error)) from error
