"""One try to read a file from elsewhere, as a stream of chunks that ends, or fails in bounded time.

fsspec's file systems differ in their timeouts, and some have none. So the stream is read in a thread of its own, and
whoever waits for it gives up when too little comes, however the connection behaves.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import IO, Any
from urllib.parse import unquote

import fsspec

from pgp_lightning.data.roots import public, root_url
from pgp_lightning.errors import ConfigError, DataError

__all__ = ["Interrupted", "Opener", "arriving", "source"]

Opener = Callable[[], IO[bytes]]

_CHUNK = 1 << 20
_AHEAD = 4
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
# Asking again does not help: there is no such file, or no right to it, which a token that has expired loses for all.
_GONE, _FORBIDDEN = (404, 410), (401, 403)


class Interrupted(Exception):
    """A try that failed.

    Args:
        reason: what happened, without credentials.
        final: whether another try is of no use.
        wait: seconds the server asks to wait before the next try.
        fault: the error that it is if no further try comes: DataError if something else came than was promised, or it
            is certain that nothing is there; ConfigError if that cannot be told of a network, server or command.
    """

    def __init__(
        self,
        reason: str,
        final: bool = False,
        wait: float = 0.0,
        fault: type[ConfigError] | type[DataError] = ConfigError,
    ) -> None:
        super().__init__(reason)
        self.final, self.wait, self.fault = final, wait, fault


@contextmanager
def source(url: str, timeout: float) -> Iterator[Opener]:
    """Give what opens a URL; a `pipe:` command runs during the block, and must have succeeded at its end.

    Raises:
        ConfigError: if a package is missing for the URL's scheme.
        Interrupted: at the end of the block, if the command fails.
    """
    if not url.startswith("pipe:"):
        system = _file_system(url.partition(":")[0], timeout, os.getpid())
        yield partial(_open, system, url)
        return
    process = subprocess.Popen(
        ["/bin/sh", "-c", url.removeprefix("pipe:")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,  # so that what the shell starts ends with it
    )
    assert process.stdout is not None
    try:
        stream: IO[bytes] = process.stdout
        yield lambda: stream
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Interrupted(f"the command was still running {timeout:g} s after its last byte") from None
        if status:
            raise Interrupted(f"the command ended with status {status}")
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def arriving(opener: Opener, url: str, timeout: float, slowest: float) -> Generator[bytes, None, None]:
    """Yield the chunks of a stream; the time their receiver takes does not count.

    Args:
        opener: what opens the stream.
        url: where it leads to, whose credentials are kept out of messages.
        timeout: seconds of waiting in which `slowest` bytes a second, and at least one, must come.
        slowest: bytes per second.

    Raises:
        ConfigError: if the server leads to a URL that is not allowed.
        Interrupted: if the stream breaks, or is too slow.
    """
    chunks: queue.Queue[bytes | Exception] = queue.Queue(_AHEAD)
    abandoned = threading.Event()

    def put(item: bytes | Exception) -> None:
        while not abandoned.is_set():
            with suppress(queue.Full):
                chunks.put(item, timeout=0.1)
                return

    def pump() -> None:
        try:
            with opener() as stream:
                while (chunk := stream.read(_CHUNK)) and not abandoned.is_set():
                    put(chunk)
            put(b"")
        except Exception as error:
            put(error)

    threading.Thread(target=pump, name="shard transfer", daemon=True).start()
    waited, got = 0.0, 0
    try:
        while True:
            start = time.monotonic()
            try:
                item = chunks.get(timeout=max(0.0, timeout - waited))
            except queue.Empty:
                raise Interrupted(f"only {got} bytes came in {timeout:g} s") from None
            waited += time.monotonic() - start
            if isinstance(item, ConfigError):
                raise item
            if isinstance(item, Exception):
                raise _explained(item, url)
            if not item:
                return
            got += len(item)
            if got >= slowest * timeout:
                waited, got = 0.0, 0
            yield item
    finally:
        abandoned.set()


@lru_cache
def _file_system(scheme: str, timeout: float, process: int) -> fsspec.AbstractFileSystem:
    """Return what opens a scheme's files, one per process: connections and threads do not survive a fork.

    Raises:
        ConfigError: if its package is missing.
    """
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout),
            "headers": {"Accept-Encoding": "identity"},
            "auto_decompress": False,  # a body is what was promised, and nothing to inflate
            "trust_env": True,  # proxies, and passwords in ~/.netrc instead of URLs
        }
    try:
        return fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError as error:
        raise ConfigError(
            f"{scheme}:// needs the package {_PACKAGES.get(scheme, scheme)} ({error}): "
            f"pip install 'pgp-lightning[remote]'"
        ) from error


def _open(system: fsspec.AbstractFileSystem, url: str) -> IO[bytes]:
    """Open a URL for reading from its beginning, in one request where the file system can."""
    scheme = url.partition(":")[0]
    stream: Any
    if scheme in ("http", "https"):
        # Any size: with one, fsspec does not ask for it, which would turn every kind of failure into "not found".
        stream = system.open(url, "rb", block_size=0, size=1)
        if stream.r.history:
            try:
                root_url(str(stream.r.url.with_query(None).with_fragment(None)))
            except ValueError as error:
                stream.close()
                raise ConfigError(f"{public(url)} redirects to an address that is not allowed: {error}") from error
    elif scheme == "hf":
        stream = system.open(url, "rb", block_size=0)
    else:
        stream = system.open(url, "rb")
    opened: IO[bytes] = stream
    return opened


def _explained(error: Exception, url: str) -> Interrupted:
    """Return a file system's error as one of ours, with the status of HTTP and without credentials."""
    response = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    headers = getattr(error, "headers", None) or getattr(response, "headers", None) or {}
    gone = isinstance(error, FileNotFoundError) or status in _GONE
    final = gone or isinstance(error, PermissionError) or status in _FORBIDDEN
    if status:
        reason = f"the server answers with status {status}"
    elif isinstance(error, FileNotFoundError):
        reason = "there is no such file"
    else:
        told = re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>)]+", lambda found: public(found.group()), str(error))
        reason = f"{type(error).__name__}: {told}" if told and not _secrets(url, told) else type(error).__name__
    asked = headers.get("Retry-After", "")
    wait = float(asked) if re.fullmatch(r"\d{1,6}", asked) else 0.0
    return Interrupted(reason, final, wait, DataError if gone else ConfigError)


def _secrets(url: str, text: str) -> bool:
    """Whether a text has the user or the password of a URL in it."""
    authority = url.partition("://")[2].partition("/")[0]
    words = authority.rpartition("@")[0].split(":")
    return any(word and (word in text or unquote(word) in text) for word in words)
