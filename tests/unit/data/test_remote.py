"""Fetched shards: everything a bad server does is survived or told, and the cache keeps its promises."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from data_world import PictureBuilder

from pgp_lightning.data import remote
from pgp_lightning.data.index import Index, Shard
from pgp_lightning.data.mixture import EpochPlan, Lane, Mixture, SourceOrder, StreamSource
from pgp_lightning.data.remote import ShardCache
from pgp_lightning.data.shards import ShardReader
from pgp_lightning.data.writing import write_source
from pgp_lightning.errors import ConfigError, DataError
from tests.faulty_server import ENDLESS, FAULTS, FaultyServer, Plan


def put(folder: Path, name: str, content: bytes) -> tuple[str, int, str]:
    """Write a file to serve; return its path in the URL, size and SHA-256."""
    (folder / name).write_bytes(content)
    return f"/{name}", len(content), hashlib.sha256(content).hexdigest()


CONTENT = ("short", "wrong", "endless")  # faults of what came, not of its coming
SHORT = 0.5  # a timeout for what comes never; on a loaded machine, what comes may be slower


def cache_at(folder: Path, **settings: Any) -> ShardCache:
    """Return a cache that is quick to try again."""
    return ShardCache(folder, **{"backoff": 0.001, "slowest": 1000, **settings})


def kept(cache: ShardCache) -> list[Path]:
    """Return all files of a cache but its lock."""
    return sorted(path for path in cache.folder.glob("*") if path.name != ".lock")


def age(path: Path, seconds: float) -> None:
    """Let a file have been used some time ago."""
    os.utime(path, (time.time() - seconds,) * 2)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something has happened."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def elsewhere(target: Any, *args: Any) -> Iterator[multiprocessing.process.BaseProcess]:
    """Run a function in another process, which is gone afterwards."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pgp_lightning.data.remote"])  # seconds of imports, once instead of per process
    process = context.Process(target=target, args=args)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def epoch_keys(sources: tuple[StreamSource, ...], cache: ShardCache | None) -> list[str]:
    """Return the keys of an epoch's records in order, lane by lane."""
    mixture = Mixture(sources, lanes=4, batch_size=2, window=10)
    plan, reader = EpochPlan(mixture, 0), ShardReader(8, cache)
    orders = [SourceOrder(source, mixture.seed, number) for number, source in enumerate(sources)]
    keys = []
    for number in range(mixture.lanes):
        lane = Lane(plan, number)
        for _ in range(int(plan.counts[number].sum())):
            source, candidates = lane.take()
            keys += [reader.read(*orders[source].locate(position)).key for position in islice(candidates, 1)]
    return keys


@pytest.mark.parametrize("roomy", [True, False])
def test_an_epoch_from_a_faulty_server_is_the_epoch_from_the_disk(tmp_path: Path, roomy: bool) -> None:
    for name, size in (("large", 50), ("small", 9)):
        write_source(tmp_path / "served" / name, PictureBuilder(name, size), 10, progress=False)
    # Nothing would tell one wrong digit in an index, which is why https is asked for.
    plan = Plan(seed=34, rate=0.6, always={"/large/index.json": "", "/small/index.json": ""})
    with FaultyServer(tmp_path / "served", plan) as server:
        local = tuple(
            StreamSource(folder.name, Index.load(folder).shards) for folder in sorted((tmp_path / "served").iterdir())
        )
        largest = max(shard.bytes for source in local for shard in source.shards)
        limit = 1 << 30 if roomy else 3 * largest
        cache = cache_at(tmp_path / "cache", retries=8, timeout=SHORT, limit_bytes=limit)
        fetched = []
        for source in local:
            url = f"{server.url}/{source.name}"
            cache_folder = tmp_path / "indices" / source.name
            cache.fetch_index(f"{url}/index.json", cache_folder)
            fetched.append(replace(source, shards=Index.load(cache_folder, url).shards))
        keys = epoch_keys(tuple(fetched), cache)
    assert keys == epoch_keys(local, None) and len(set(keys)) == len(keys) == 56  # of 59; 7 rounds of lanes x batch
    assert {fault for _, fault in server.log} == {*FAULTS, ""}
    if roomy:  # nothing is fetched twice: there is no server any more
        assert len(kept(cache)) == 6 and epoch_keys(tuple(fetched), cache) == keys
    else:
        assert sum(path.stat().st_size for path in kept(cache)) <= cache.limit_bytes < 4 * largest


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("drop", "ServerDisconnectedError"),
        ("stall", "bytes came in 0.5 s"),
        ("truncate", "ClientPayloadError"),
        ("500", "status 500"),
        ("503", "status 503"),
        ("trickle", "bytes came in 0.5 s"),
        ("short", "it ended after 300 of 600 bytes"),
        ("wrong", "its SHA-256 is"),
        ("endless", "it sends more than 600 bytes"),
    ],
)
def test_a_shard_that_never_comes_fails_with_its_url_and_the_tries(tmp_path: Path, fault: str, reason: str) -> None:
    (served := tmp_path / "served").mkdir()
    path, size, sha256 = put(served, "a.tar", bytes(range(200)) * 3)
    with FaultyServer(served, Plan(always={path: fault})) as server:
        never = {"timeout": SHORT} if fault in ("stall", "trickle") else {}
        cache = cache_at(tmp_path / "cache", retries=2, **never)
        # Only what came can be wrong; what does not come says nothing of the data.
        with pytest.raises(DataError if fault in CONTENT else ConfigError) as caught:
            cache.fetch(server.url + path, size, sha256)
        assert f"{server.url}/a.tar could not be fetched in 3 tries" in str(caught.value)
        assert reason in str(caught.value)
        repeats = 2 if fault == "drop" else 1  # aiohttp itself asks again when a connection closes without a reply
        assert server.gets(path) == 3 * repeats and kept(cache) == []


@pytest.mark.parametrize(
    ("fault", "kind", "reason"),
    [("404", DataError, "no such file"), ("410", DataError, "status 410"), ("403", ConfigError, "status 403")],
)
def test_what_will_not_change_is_not_tried_again(
    tmp_path: Path, fault: str, kind: type[Exception], reason: str
) -> None:
    with FaultyServer(tmp_path, Plan(always={"/a.tar": fault})) as server:
        with pytest.raises(kind, match=rf"in 1 try, the last failed because .*{reason}"):
            cache_at(tmp_path / "cache").fetch(f"{server.url}/a.tar", 5, "0" * 64)
        assert server.gets("/a.tar") == 1


def test_an_endless_body_is_cut_off_and_leaves_the_disk_alone(tmp_path: Path) -> None:
    (served := tmp_path / "served").mkdir()
    path, size, sha256 = put(served, "a.tar", bytes(10_000))
    sizes: list[int] = []
    with FaultyServer(served, Plan(always={path: "endless"})) as server:
        cache = cache_at(tmp_path / "cache", retries=1)

        def look() -> None:
            with suppress(FileNotFoundError):  # given up meanwhile
                sizes.extend(part.stat().st_size for part in cache.folder.glob("*.part"))

        server.look = look
        with pytest.raises(DataError, match=r"in 2 tries, .* sends more than 10000 bytes"):
            cache.fetch(server.url + path, size, sha256)
        wait_for(lambda: not server.busy)  # it sends no more, for nobody listens
        assert server.sent[path] < ENDLESS  # what left is in buffers
    # The second try began with what the first had left, so a look at its end is among these for certain.
    assert server.gets(path) == 2 and set(sizes) == {10_000}


def test_waits_double_within_their_jitter_and_follow_the_seed() -> None:
    waits = list(islice(remote._waits("a", 1.0), 12))
    assert waits == list(islice(remote._waits("a", 1.0), 12)) != list(islice(remote._waits("b", 1.0), 12))
    for number, wait in enumerate(waits):
        full = min(300.0, 2.0**number)
        assert full / 2 <= wait <= full


def test_the_server_may_ask_for_a_longer_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    monkeypatch.setattr(FaultyServer, "retry_after", "7")
    with FaultyServer(tmp_path, Plan(always={"/a.tar": "503"})) as server, pytest.raises(ConfigError, match="2 tries"):
        cache_at(tmp_path / "cache", retries=1).fetch(f"{server.url}/a.tar", 5, "0" * 64)
    assert 7.0 in slept


def test_processes_that_want_a_shard_at_once_fetch_it_once(tmp_path: Path) -> None:
    (served := tmp_path / "served").mkdir()
    shard = put(served, "a.tar", os.urandom(200_000))
    with FaultyServer(served) as server:
        arguments = (server.url + shard[0], *shard[1:])
        cache = cache_at(tmp_path / "cache")
        server.gate.clear()
        with elsewhere(cache.fetch, *arguments) as process:
            wait_for(lambda: server.gets("/a.tar") == 1)
            threading.Timer(0.3, server.gate.set).start()  # time enough for a second request, were there one
            assert cache.fetch(*arguments).read_bytes() == (served / "a.tar").read_bytes()
            process.join()
            assert process.exitcode == 0 and server.log == [("/a.tar", "")]


def test_a_killed_process_leaves_nothing_that_harms(tmp_path: Path) -> None:
    (served := tmp_path / "served").mkdir()
    path, size, sha256 = put(served, "a.tar", os.urandom(50_000))
    other, other_size, other_sha = put(served, "b.tar", os.urandom(50_000))
    with FaultyServer(served, Plan(always={path: "stall"})) as server:
        slow = cache_at(tmp_path / "cache", limit_bytes=99_999)
        with elsewhere(slow.fetch, server.url + path, size, sha256) as process:
            wait_for(lambda: server.sent[path] >= size // 2)
            part = next(slow.folder.glob("*.part"))
            assert part.stat().st_size == size  # its room is taken from the start
            with pytest.raises(ConfigError, match="finds no room"):
                cache_at(slow.folder, timeout=SHORT, limit_bytes=99_999).fetch(
                    server.url + other, other_size, other_sha
                )
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
        cache_at(slow.folder, limit_bytes=99_999).fetch(server.url + other, other_size, other_sha)
        assert [file.name for file in kept(slow)] == [f"{other_sha}-b.tar"]
    with FaultyServer(served) as server:
        assert (
            cache_at(slow.folder).fetch(server.url + path, size, sha256).read_bytes() == (served / "a.tar").read_bytes()
        )


def test_the_least_recently_used_goes_first_but_never_what_is_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (served := tmp_path / "served").mkdir()
    files = [put(served, f"{name}.tar", name.encode() * 1000) for name in "abcd"]
    with FaultyServer(served) as server:
        cache = cache_at(tmp_path / "cache", limit_bytes=3000)
        a, b, c, d = ((server.url + path, size, sha256) for path, size, sha256 in files)
        with cache.hold(*a) as held:
            for seconds, shard in ((300, b), (200, c)):
                age(cache.fetch(*shard), seconds)
            age(held, 400)
            cache.fetch(*d)
            assert held.read_bytes() == b"a" * 1000
            assert [path.name[65:] for path in sorted(kept(cache), key=lambda path: path.name[65:])] == [
                "a.tar", "c.tar", "d.tar",
            ]  # fmt: skip
        assert not caplog.records
        for path in kept(cache):
            age(path, 10)
        with caplog.at_level(logging.WARNING):
            cache.fetch(*b)
        assert "raise the limit" in caplog.text
        with (
            cache.hold(*a),
            cache.hold(*b),
            cache.hold(*c),
            pytest.raises(ConfigError, match="3000 of 3000 bytes are in"),
        ):
            cache_at(cache.folder, timeout=SHORT, limit_bytes=3000).fetch(*d)
        assert sum(path.stat().st_size for path in kept(cache)) == 3000
        with pytest.raises(ConfigError, match="raise the limit"):
            cache.fetch(a[0], 3001, a[2])


def test_a_shard_of_another_size_is_fetched_again(tmp_path: Path) -> None:
    (served := tmp_path / "served").mkdir()
    path, size, sha256 = put(served, "a.tar", b"a" * 1000)
    with FaultyServer(served) as server:
        cache = cache_at(tmp_path / "cache")
        cache.fetch(server.url + path, size, sha256).write_bytes(b"cut")
        assert cache.fetch(server.url + path, size, sha256).read_bytes() == b"a" * 1000
        assert server.gets(path) == 2


@pytest.mark.parametrize("fault", ["wrong", "404", "drop", "short"])
def test_credentials_are_sent_and_never_told(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    (served := tmp_path / "served").mkdir()
    path, size, sha256 = put(served, "a.tar", b"a" * 100)
    caplog.set_level(logging.INFO, "pgp_lightning")
    with FaultyServer(served, Plan(always={path: fault})) as server:
        url = server.url.replace("//", "//joe:s3cr%40t@") + path
        with pytest.raises(ConfigError if fault == "drop" else DataError) as caught:
            cache_at(tmp_path / "cache", retries=1).fetch(url, size, sha256)
        assert server.authorised[0] == "Basic am9lOnMzY3JAdA=="
    assert f"{server.url}/a.tar" in str(caught.value) and caught.value.__suppress_context__
    for secret in ("joe", "s3cr", "am9lOnMzY3JAdA"):
        assert secret not in str(caught.value) + caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "url", ["ftp://host/a.tar", "http://example.org/a.tar", "simplecache::https://host/a.tar", "a.tar", "s3:/a.tar"]
)
def test_other_urls_are_refused_before_anything_is_opened(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"expected|http is for this machine"):
        cache_at(tmp_path / "cache", allow_pipe=True).fetch(url, 5, "0" * 64)
    assert not (tmp_path / "cache").exists()


def test_a_redirection_leads_nowhere_else_either(tmp_path: Path) -> None:
    (served := tmp_path / "served").mkdir()
    path, size, sha256 = put(served, "b.tar", b"b" * 100)
    cache = cache_at(tmp_path / "cache")
    with FaultyServer(served) as target:
        plan = Plan(always={"/a.tar": "301"}, location=target.url + path)
        with FaultyServer(served, plan) as server:
            assert cache.fetch(f"{server.url}/a.tar", size, sha256).read_bytes() == b"b" * 100
        plan = replace(plan, location=plan.location.replace("127.0.0.1", "0.0.0.0"))  # answers, but is no loopback name
        with FaultyServer(served, plan) as server, pytest.raises(ConfigError, match="redirects to an address that is"):
            cache.fetch(f"{server.url}/a.tar", size, sha256[::-1])
        assert target.gets(path) == 2 and [file.name for file in kept(cache)] == [f"{sha256}-a.tar"]


def test_a_promised_sha256_cannot_point_out_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="64 hexadecimal digits"):
        cache_at(tmp_path / "cache").fetch("https://host/a.tar", 5, "../../a")


def test_a_command_runs_only_if_the_caller_says_so(tmp_path: Path) -> None:
    path, size, sha256 = put(tmp_path, "a.tar", b"a" * 100)
    url = f"pipe:touch {tmp_path}/ran; cat {tmp_path}{path}"
    with pytest.raises(ConfigError, match="allow_pipe=true"):
        cache_at(tmp_path / "cache").fetch(url, size, sha256)
    assert not (tmp_path / "ran").exists()
    assert cache_at(tmp_path / "cache", allow_pipe=True).fetch(url, size, sha256).read_bytes() == b"a" * 100
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo s3cret; exit 3 # a.tar", "the command ended with status 3"),
        ("sleep 600; echo s3cret a.tar", "only 0 bytes came in 0.5 s"),
        ("exec >&-; sleep 600; echo s3cret a.tar", "still running 0.5 s after its last byte"),
        ("yes s3cret a.tar", "sends more than 100 bytes"),
    ],
)
def test_a_command_that_fails_is_told_without_its_arguments(tmp_path: Path, command: str, reason: str) -> None:
    start, never = time.monotonic(), {"timeout": SHORT} if "sleep" in command else {}
    with pytest.raises(DataError if "yes" in command else ConfigError, match=reason) as caught:
        cache_at(tmp_path / "cache", allow_pipe=True, retries=1, **never).fetch(f"pipe:{command}", 100, "0" * 64)
    assert "a.tar could not be fetched in 2 tries" in str(caught.value) and "s3cret" not in str(caught.value)
    assert time.monotonic() - start < 300  # what it started is not waited for


def test_a_file_url_is_read_through_fsspec(tmp_path: Path) -> None:
    path, size, sha256 = put(tmp_path, "a.tar", b"a" * 100)
    assert cache_at(tmp_path / "cache").fetch(f"file://{tmp_path}{path}", size, sha256).read_bytes() == b"a" * 100


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(tmp_path: Path, scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)  # whether it is installed or not
    with pytest.raises(ConfigError, match=rf"needs the package {package} .*pgp-lightning\[remote\]"):
        cache_at(tmp_path / "cache").fetch(f"{scheme}://bucket/a.tar", 5, "0" * 64)
    assert kept(cache_at(tmp_path / "cache")) == []


def test_an_index_is_replaced_only_by_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (served := tmp_path / "served").mkdir()
    put(served, "index.json", json.dumps({"version": 1, "text": "x" * 500}).encode())
    (folder := tmp_path / "kept").mkdir()
    old = folder / "index.json"
    old.write_text("old")
    for fault, reason in (("short", "it is not JSON"), ("endless", "sends more than 600 bytes")):
        monkeypatch.setattr(remote, "INDEX_LIMIT_BYTES", 600)
        with FaultyServer(served, Plan(always={"/index.json": fault})) as server:
            with pytest.raises(DataError, match=rf"/index.json could not be fetched in 2 tries, .*{reason}"):
                cache_at(tmp_path / "cache", retries=1).fetch_index(f"{server.url}/index.json", folder)
            assert [path.name for path in folder.iterdir()] == ["index.json"] and old.read_text() == "old"
    with FaultyServer(served) as server:
        assert cache_at(tmp_path / "cache").fetch_index(f"{server.url}/index.json", folder) == old
    assert old.read_bytes() == (served / "index.json").read_bytes()


def test_a_shard_to_fetch_needs_a_cache(tmp_path: Path) -> None:
    shard = Shard(tmp_path / "a.tar", 1, 5, "0" * 64, "https://host/a.tar")
    with pytest.raises(RuntimeError, match="no cache"):
        ShardReader(1).read(shard, 0)


@pytest.mark.parametrize("settings", [{"limit_bytes": 0}, {"retries": -1}, {"timeout": 0}, {"timeout": float("nan")}])
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(settings))} must be"):
        ShardCache(tmp_path, **settings)
