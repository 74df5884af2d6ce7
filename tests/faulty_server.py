"""An HTTP server on the loopback that serves a folder badly, by a seeded plan: the same faults in every run."""

from __future__ import annotations

import io
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# What may happen to a GET; HEAD is always answered honestly.
FAULTS = (
    "drop",  # the connection closes without a reply
    "stall",  # half the body, then silence
    "truncate",  # half the body of the announced length
    "short",  # half the body, without an announced length: nothing on the wire says that something is missing
    "500",
    "503",  # with Retry-After
    "wrong",  # one byte is another
    "trickle",  # one byte at a time
)
ENDLESS = 64 << 20  # bytes: who takes so many has no limit, and the disk has one
RARE = ("endless", "404", "403", "301")  # only where a plan names them: these do not pass


@dataclass(frozen=True)
class Plan:
    """Which requests fail, and how.

    Args:
        seed: of the choice.
        rate: share of the requests that fail.
        kinds: faults to choose from.
        most: greatest number of faults in a row for one path, so that patience is always rewarded.
        always: path -> the fault that all its requests meet.
        location: where a 301 points to.
    """

    seed: int = 0
    rate: float = 0.0
    kinds: tuple[str, ...] = FAULTS
    most: int = 3
    always: Mapping[str, str] = field(default_factory=dict)
    location: str = ""

    def fault(self, path: str, number: int) -> str:
        """Return the fault of a path's number-th request, "" for none: a pure function of the plan."""
        if path in self.always:
            return self.always[path]
        draws = [random.Random(f"{self.seed} {path} {n}") for n in range(number + 1)]
        faults = [draw.choice(self.kinds) if draw.random() < self.rate else "" for draw in draws]
        row = 0
        for n, fault in enumerate(faults):
            row = row + 1 if fault else 0
            if row > self.most:
                faults[n], row = "", 0
        return faults[number]


class FaultyServer:
    """Serves a folder by a plan, for the time of a `with` block.

    `log` has (path, fault) of every GET in order, `sent` the bytes of bodies that left per path, `busy` how many GETs
    are being answered, `authorised` the Authorization headers that came. While `gate` is cleared, GETs wait; `look` is
    called before every piece of a body.
    """

    retry_after = "0"

    def __init__(self, folder: Path, plan: Plan | None = None) -> None:
        self.folder, self.plan = folder, plan or Plan()
        self.log: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.busy = 0
        self.look: Callable[[], None] = lambda: None
        self.authorised: list[str | None] = []
        self.closing, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.guard = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def gets(self, path: str) -> int:
        """Return how often a path was asked for."""
        return sum(asked == path for asked, _ in self.log)

    def next_fault(self, path: str) -> str:
        """Return and log what happens to the next GET of a path."""
        with self.guard:
            fault = self.plan.fault(path, self.gets(path))
            self.log.append((path, fault))
            return fault

    def _handler(self, *args: Any) -> _Handler:
        return _Handler(self, *args)

    def __enter__(self) -> FaultyServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, owner: FaultyServer, *args: Any) -> None:
        self.owner = owner
        super().__init__(*args, directory=str(owner.folder))

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        content = self._content()
        if content is None:
            self._error(404)
        else:
            self._head(200, len(content), {"Accept-Ranges": "bytes"})

    def do_GET(self) -> None:
        with self.owner.guard:
            self.owner.busy += 1
        try:
            self._get()
        finally:
            with self.owner.guard:
                self.owner.busy -= 1

    def _get(self) -> None:
        self.close_connection = True
        path = self.path.partition("?")[0]
        self.owner.authorised.append(self.headers.get("Authorization"))
        fault, content = self.owner.next_fault(path), self._content()
        self.owner.gate.wait(60)
        if fault == "drop":
            return
        if fault == "301":
            self._head(301, 0, {"Location": self.owner.plan.location})
        elif fault.isdigit():
            self._error(int(fault))
        elif content is None:
            self._error(404)
        elif fault:
            self._fail(path, fault, content)
        else:
            self._serve(path, content)

    def _serve(self, path: str, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._head(200, len(content), {"Accept-Ranges": "bytes"})
        else:
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            self._head(206, last + 1 - first, {"Content-Range": f"bytes {first}-{last}/{len(content)}"})
            content = content[first : last + 1]
        self._send(path, content)

    def _fail(self, path: str, fault: str, content: bytes) -> None:
        half = content[: len(content) // 2]
        if fault == "wrong":
            self._head(200, len(content))
            self._send(path, half + bytes([content[len(half)] ^ 1]) + content[len(half) + 1 :])
        elif fault in ("stall", "truncate"):
            self._head(200, len(content))
            self._send(path, half)
            if fault == "stall":
                self.owner.closing.wait(60)
        elif fault == "short":
            self._head(200, None)
            self._send(path, half)
        elif fault == "trickle":
            self._head(200, len(content))
            for byte in content:
                if self.owner.closing.wait(0.02) or not self._send(path, bytes([byte])):
                    break
        elif fault == "endless":
            self._head(200, None)
            while self.owner.sent[path] < ENDLESS and self._send(path, bytes(1 << 16)):
                pass
        else:
            raise AssertionError(f"unknown fault {fault!r}")

    def _content(self) -> bytes | None:
        file = Path(self.translate_path(self.path))
        return file.read_bytes() if file.is_file() else None

    def _head(self, status: int, length: int | None, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _error(self, status: int) -> None:
        self._head(status, 0, {"Retry-After": self.owner.retry_after} if status == 503 else None)

    def _send(self, path: str, data: bytes) -> bool:
        """Send a piece of a body; False when nobody listens any more."""
        buffer = io.BytesIO(data)
        try:
            while piece := buffer.read(1 << 14):
                self.owner.look()
                self.wfile.write(piece)
                with self.owner.guard:
                    self.owner.sent[path] += len(piece)
        except OSError:
            return False
        return True
