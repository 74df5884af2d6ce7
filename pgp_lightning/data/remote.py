"""Shards from elsewhere: fetched when first read, checked, shared by all processes, kept within a limit.

A shard is one file of the cache, named by its SHA-256. File locks (flock) say what goes on with it, and vanish with
the process that holds them: whoever fetches a shard has its `.part` file exclusively, whoever reads it has the shard
shared, and only a file that nobody has may be evicted. A part takes up its promised size from the start, so the sum
of sizes in the folder never exceeds the limit, whatever is being fetched at the moment.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from pgp_lightning.data.index import INDEX_FILE
from pgp_lightning.data.roots import file_name, public_file, root_url
from pgp_lightning.data.transfer import Interrupted, arriving, source
from pgp_lightning.errors import ConfigError, DataError

__all__ = ["INDEX_LIMIT_BYTES", "ShardCache"]

INDEX_LIMIT_BYTES = 256 << 20

_log = logging.getLogger(__name__)
_LONGEST_WAIT = 300.0
_RECENT = 60.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardCache:
    """A folder of fetched shards, for any number of processes of one machine.

    Args:
        folder: where the shards are kept; on a local disk, and nothing else in it.
        limit_bytes: greatest sum of their sizes, those being fetched included.
        retries: tries after the first.
        timeout: seconds without data, or with less than `slowest` bytes a second, after which a try is given up.
        allow_pipe: fetch `pipe:COMMAND` URLs, which run a shell command.
        backoff: seconds of the first wait between tries; each further one is twice as long, up to five minutes.
        slowest: bytes per second, on average over `timeout`, that a connection must bring.
        seed: of the waits' jitter.

    Raises:
        ConfigError: if a number is out of its range.
    """

    folder: Path
    limit_bytes: int = 100 << 30
    retries: int = 5
    timeout: float = 60.0
    allow_pipe: bool = False
    backoff: float = 1.0
    slowest: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("limit_bytes", 1), ("retries", 0), ("backoff", 0), ("slowest", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"shard cache: {name} must be at least {low}, got {getattr(self, name)}")
        if not self.timeout > 0:
            raise ConfigError(f"shard cache: timeout must be above 0, got {self.timeout}")

    def fetch(self, url: str, size: int, sha256: str) -> Path:
        """Return the path of a shard, fetched if need be; it may be evicted later, so readers use `hold`.

        Raises:
            ConfigError: if the URL may not be fetched, a package is missing for it, the limit is too small, the cache's
                disk fails, or network or server do until the last try.
            DataError: if there is no such shard, or it is not as promised.
        """
        with self.hold(url, size, sha256) as path:
            return path

    @contextmanager
    def hold(self, url: str, size: int, sha256: str) -> Iterator[Path]:
        """Give the path of a shard, fetched if need be, which is not evicted before the block ends.

        Args:
            url: where it comes from.
            size: its bytes.
            sha256: its SHA-256 in hexadecimal digits.

        Raises:
            ConfigError: if the URL may not be fetched, a package is missing for it, the limit is too small, the cache's
                disk fails, or network or server do until the last try.
            DataError: if there is no such shard, or it is not as promised.
        """
        self._check(url)
        if not _SHA256.fullmatch(sha256):
            raise DataError(f"{public_file(url)}: expected a SHA-256 of 64 hexadecimal digits, got {sha256!r}")
        if not 1 <= size <= self.limit_bytes:
            raise ConfigError(
                f"{public_file(url)} has {size} bytes, which the shard cache {self.folder} with its limit of "
                f"{self.limit_bytes} cannot take: raise the limit"
            )
        path = self.folder / f"{sha256}-{file_name(url)}"
        try:
            while (file := _shared(path, size)) is None:
                self._fetch(path, url, size, sha256)
        except OSError as error:
            raise _no_place(url, f"the shard cache {self.folder}", error) from error
        with file:
            yield path

    def fetch_index(self, url: str, folder: Path) -> Path:
        """Fetch a remote source's index.json into a local folder, in place of one that is there; return its path.

        Args:
            url: the index's URL.
            folder: where it is put, when it is complete.

        Raises:
            ConfigError: if the URL may not be fetched, a package is missing for it, the disk fails, or network or
                server do until the last try.
            DataError: if there is no index, or it is no JSON, or has more than 256 MiB.
        """
        self._check(url)
        target = folder / INDEX_FILE
        part = folder / f".{INDEX_FILE}.{uuid.uuid4().hex}.part"

        def receive(file: IO[bytes]) -> None:
            file.truncate(0)
            self._receive(url, file, INDEX_LIMIT_BYTES)
            file.seek(0)
            try:
                json.load(file)
            except (ValueError, RecursionError) as error:
                raise Interrupted(f"it is not JSON: {type(error).__name__}", fault=DataError) from error

        try:
            folder.mkdir(parents=True, exist_ok=True)
            with part.open("x+b") as file:
                self._try(url, file, receive)
                os.fsync(file.fileno())
            part.replace(target)
        except OSError as error:
            raise _no_place(url, str(folder), error) from error
        finally:
            part.unlink(missing_ok=True)
        return target

    def _check(self, url: str) -> None:
        """Refuse URLs that the manifest would refuse; those of shards come from a manifest, but perhaps not today's."""
        if url.startswith("pipe:"):
            if not self.allow_pipe:
                raise ConfigError(f"{public_file(url)} runs a shell command: look at it, then set data.allow_pipe=true")
            return
        try:
            found = root_url(url)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if found is None:
            raise ConfigError(f"expected the URL of a shard, got the path {url!r}")

    def _fetch(self, path: Path, url: str, size: int, sha256: str) -> None:
        """Fetch a shard, or wait until another process has."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            _lock(file, fcntl.LOCK_EX)
            if not _is_at(file, part):
                return  # while we waited it became a shard, was given up, or was evicted
            if (found := _shared(path, size)) is not None:
                found.close()
                part.unlink()
                return
            try:
                self._reserve(file, part, size, url)
                self._try(url, file, lambda target: self._receive_shard(url, target, size, sha256))
                os.fsync(file.fileno())
                with self._guard():  # whoever adds up sizes meets the file under one of its names
                    part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _try(self, url: str, file: IO[bytes], receive: Callable[[IO[bytes]], None]) -> None:
        """Receive a file, again and again.

        Raises:
            ConfigError: if the last try failed, too, or trying again is of no use.
            DataError: the same, if it is certain that the file is not there or not as promised.
        """
        waits = _waits(f"{self.seed} {os.getpid()} {url}", self.backoff)
        for tries in range(1, self.retries + 2):
            file.seek(0)
            try:
                receive(file)
                file.flush()
                return
            except Interrupted as error:
                if error.final or tries > self.retries:
                    again = "tries" if tries > 1 else "try"
                    # Not "from error": a traceback would show URLs as they are, with credentials.
                    raise error.fault(
                        f"{public_file(url)} could not be fetched in {tries} {again}, the last failed because {error}: "
                        f"check the address, the access rights and the network; what was fetched before is kept"
                    ) from None
                wait = min(max(next(waits), error.wait), _LONGEST_WAIT)
                _log.info("%s: try %d failed because %s; next in %.1f s", public_file(url), tries, error, wait)
                time.sleep(wait)

    def _receive(self, url: str, file: IO[bytes], limit: int) -> tuple[int, str]:
        """Write what comes from a URL, but no more than a limit, and return its size and SHA-256."""
        digest, got = hashlib.sha256(), 0
        with source(url, self.timeout) as opener, closing(arriving(opener, url, self.timeout, self.slowest)) as chunks:
            for chunk in chunks:
                got += len(chunk)
                if got > limit:
                    raise Interrupted(f"it sends more than {limit} bytes", fault=DataError)
                file.write(chunk)
                digest.update(chunk)
        return got, digest.hexdigest()

    def _receive_shard(self, url: str, file: IO[bytes], size: int, sha256: str) -> None:
        """Receive a shard and check it against its promise."""
        got, digest = self._receive(url, file, size)
        if got != size:
            raise Interrupted(f"it ended after {got} of {size} bytes", fault=DataError)
        if digest != sha256:
            raise Interrupted(f"its SHA-256 is {digest}, {INDEX_FILE} promises {sha256}", fault=DataError)

    def _reserve(self, file: IO[bytes], part: Path, size: int, url: str) -> None:
        """Evict until there is room for a shard, and take it by giving the part its size.

        What cannot be evicted is being read, for milliseconds, or fetched, which ends by itself: so we wait, as long as
        something happens.
        """
        seen, since = None, time.monotonic()
        while True:
            with self._guard():
                files = sorted(self._files(part))
                total = sum(entry[1] for entry in files)
                for _, used, path in files:
                    if total + size > self.limit_bytes and self._evict(path):
                        total -= used
                if total + size <= self.limit_bytes:
                    file.truncate(size)
                    return
            if files != seen:
                seen, since = files, time.monotonic()
            if time.monotonic() - since > self.timeout:
                raise ConfigError(
                    f"{public_file(url)} of {size} bytes finds no room in the shard cache {self.folder}: {total} of "
                    f"{self.limit_bytes} bytes are in use and were for {self.timeout:g} s: raise the limit"
                )
            time.sleep(0.05)

    def _files(self, own: Path) -> Iterator[tuple[int, int, Path]]:
        """Yield time of last use, size and path of all shards and parts but one."""
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if _SHA256.match(path.name) and path != own:
                    status = path.stat()
                    yield status.st_mtime_ns, status.st_size, path

    def _evict(self, path: Path) -> bool:
        """Remove a shard, or the part of a process that was killed, unless somebody has it."""
        try:
            with path.open("r+b") as file:  # for writing: NFS gives an exclusive lock to no other
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                idle = time.time() - os.fstat(file.fileno()).st_mtime
                path.unlink()
        except FileNotFoundError:
            return True
        except (BlockingIOError, PermissionError):
            return False
        if idle < _RECENT and path.suffix != ".part":
            _warn_of_turnover(self.folder, self.limit_bytes)
        return True

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Let one process at a time add up and change what is in the folder."""
        with (self.folder / ".lock").open("ab") as file:
            _lock(file, fcntl.LOCK_EX)
            yield


def _no_place(url: str, where: str, error: OSError) -> ConfigError:
    """Return the error about a disk that does not take a file."""
    return ConfigError(
        f"{public_file(url)} cannot be kept in {where}: {error}. That is the machine's fault, so no record is left out "
        f"for it: make room or mend it, and start again"
    )


@lru_cache  # once per process
def _warn_of_turnover(folder: Path, limit_bytes: int) -> None:
    _log.warning(
        "%s: a shard is evicted that was read in the last %.0f s: what is read in turn exceeds the limit of %d bytes, "
        "so shards are fetched again and again; raise the limit",
        folder,
        _RECENT,
        limit_bytes,
    )


def _shared(path: Path, size: int) -> IO[bytes] | None:
    """Open a shard so that it is not evicted before it is closed; None if it is not there, or of another size."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    try:
        _lock(file, fcntl.LOCK_SH)
        status = os.fstat(file.fileno())
        if _is_at(file, path) and status.st_size == size:
            if time.time() - status.st_mtime > 1:
                with contextlib.suppress(PermissionError):  # another user's
                    os.utime(path)  # last use, for eviction; not every disk records when a file is read
            return file
    except BaseException:
        file.close()
        raise
    file.close()
    return None


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is the one that a path names now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes], kind: int) -> None:
    try:
        fcntl.flock(file, kind)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise ConfigError(
                f"{Path(file.name).parent} lies on a disk without file locks ({error.strerror}), which the shard cache "
                f"needs: choose a folder on a local disk"
            ) from error
        raise


def _waits(seed: str, first: float) -> Iterator[float]:
    """Yield seconds between tries: doubling, each with a jitter of half its length, so that processes spread out."""
    generator = random.Random(seed)
    while True:
        yield min(first, _LONGEST_WAIT) * (0.5 + generator.random() / 2)
        first *= 2
