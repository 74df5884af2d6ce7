"""Reading files of a machine that fails for a moment: what is no such file, and what is no property of the data.

A read that fails for any other reason than that there is no such file (a disk, a network, permissions, too many open
files) is tried again, and then stops what reads. Counted as a fault of the record, it would stay in finished shards.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pgp_lightning.errors import ConfigError

__all__ = ["is_missing", "patiently", "refuse_lack_of_memory", "refuse_lost_folder"]

Result = TypeVar("Result")

_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_PAUSES = (0.1, 0.5, 2.0)  # seconds before each further try


def is_missing(error: OSError) -> bool:
    """Say whether an error means that there is no such file, however often one looks."""
    return error.errno in _MISSING


def patiently(path: Path, read: Callable[[], Result]) -> Result:
    """Return what a function reads from a file, called again where the machine fails.

    Args:
        path: what is read, for messages.
        read: raises OSError.

    Raises:
        OSError: if there is no such file.
        ConfigError: if the machine fails again and again.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except OSError as error:
            if is_missing(error):
                raise
            if pause is None:
                raise ConfigError(
                    f"{path} cannot be read, tried {len(_PAUSES) + 1} times: {error.strerror or error}. That is the "
                    f"machine's fault (disk, network, permissions, open files), so no record is left out for it: mend "
                    f"it and start again; a build keeps its finished shards, a run its checkpoints"
                ) from error
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def refuse_lost_folder(path: Path, *folders: Path) -> None:
    """Look at where a file is missing.

    Args:
        path: the file, for the message.
        folders: where such files lie; they were there.

    Raises:
        ConfigError: if one of the folders is gone, so that nothing can be said of the file.
    """
    if lost := next((folder for folder in folders if not folder.is_dir()), None):
        raise ConfigError(
            f"{path} cannot be read, because the folder {lost} is gone, or no folder any more. That is the machine's "
            f"fault (a mount, a network), so no record is left out for it: mend it and start again; a build keeps its "
            f"finished shards, a run its checkpoints"
        )


def refuse_lack_of_memory(error: Exception) -> None:
    """Look at what a decoder of images raised.

    Raises:
        MemoryError: if it had no memory, which Pillow reports as OSError like damage.
    """
    if isinstance(error, OSError) and "out of memory" in str(error):
        raise MemoryError(str(error)) from error
