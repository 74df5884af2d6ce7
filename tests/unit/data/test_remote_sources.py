"""Sources that are fetched, as readers, workers and `pgp shards` see them."""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path

import pytest
import yaml
from data_world import PictureBuilder
from topologies import READER

from pgp_lightning.data.index import Index, Shard
from pgp_lightning.data.loader import EvaluationLoader, TrainingLoader
from pgp_lightning.data.mixture import Mixture, StreamSource
from pgp_lightning.data.remote import ShardCache
from pgp_lightning.data.shards import ShardReader, verify_source
from pgp_lightning.data.writing import write_source
from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.tools import main as pgp
from tests.faulty_server import FaultyServer, Plan


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A folder with the source `a` of the split train: 10 records in three shards."""
    write_source(tmp_path / "served" / "train" / "a", PictureBuilder("a", 10), 4, progress=False)
    return tmp_path / "served"


def manifest_of(folder: Path, root: str) -> str:
    """Write a manifest of that source with another root."""
    content = {"name": "far", "licence": "MIT", "root": root, "splits": {"train": [{"name": "a"}]}}
    (folder / "far.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "far.yaml")


def test_damage_in_the_cache_is_named_by_the_url(served: Path, tmp_path: Path) -> None:
    with FaultyServer(served) as server:
        cache = ShardCache(tmp_path / "cache")
        url, shown = server.url.replace("//", "//joe:s3cret@") + "/train/a", f"{server.url}/train/a/a-00002.tar"
        cache.fetch_index(f"{url}/index.json", tmp_path / "index")
        assert verify_source(tmp_path / "index", url, cache).samples == 10
        (kept,) = cache.folder.glob("*-a-00002.tar")
        whole = kept.read_bytes()
        kept.write_bytes(whole.replace(b"q0", b"q9"))
        with pytest.raises(DataError, match=rf"^{shown} has another SHA-256 .*: delete {kept}, and it is"):
            verify_source(tmp_path / "index", url, cache)
        kept.write_bytes(b"x" * len(whole))
        shard = Index.load(tmp_path / "index", url).shards[2]
        with pytest.raises(DataError, match=rf"^{shown} cannot be read as a plain tar"):
            ShardReader(1, cache).read(shard, 0)
        kept.unlink()
        assert ShardReader(1, cache).read(shard, 0).key == "a-0008"


@pytest.mark.parametrize("workers", [0, 1])
def test_settings_that_cannot_fetch_are_said_by_workers_too(tmp_path: Path, workers: int) -> None:
    shard = Shard(tmp_path / "a.tar", 8, 5000, "0" * 64, "https://host/a.tar")
    mixture = Mixture((StreamSource("a", (shard,)),), lanes=1, batch_size=2)
    cache = ShardCache(tmp_path / "cache", limit_bytes=4999)
    loader = TrainingLoader(mixture, READER, 4, workers=workers, cache=cache)
    with pytest.raises(ConfigError, match=r"^https://host/a\.tar has 5000 bytes, .* raise the limit$"):
        next(iter(loader))


def lenient(folder: Path, url: str) -> StreamSource:
    """Return the source as it is fetched, whose damaged shards are replaced."""
    ShardCache(folder / "x").fetch_index(f"{url}/train/a/index.json", folder / "index")
    shards = Index.load(folder / "index", f"{url}/train/a").shards
    return StreamSource("a", shards, allowed_rejects=1.0, on_damage="substitute")


@pytest.mark.parametrize("fault", ["503", "403", "drop", "truncate"])
def test_an_outage_replaces_no_record(served: Path, tmp_path: Path, fault: str) -> None:
    with FaultyServer(served, Plan(always={"/train/a/a-00001.tar": fault, "/train/a/index.json": ""})) as server:
        source = lenient(tmp_path, server.url)
        with pytest.raises(ConfigError, match=r"a-00001\.tar could not be fetched in \d (try|tries)"):
            list(EvaluationLoader((source,), READER, 4, cache=ShardCache(tmp_path / "c", retries=1, backoff=0.001)))


@pytest.mark.parametrize("fault", ["404", "wrong"])
def test_a_shard_that_is_gone_or_wrong_is_replaced(served: Path, tmp_path: Path, fault: str) -> None:
    with FaultyServer(served, Plan(always={"/train/a/a-00001.tar": fault, "/train/a/index.json": ""})) as server:
        source = lenient(tmp_path, server.url)
        cache = ShardCache(tmp_path / "c", retries=1, backoff=0.001)
        rejected = Counter[str]()
        for batch in EvaluationLoader((source,), READER, 4, cache=cache):
            rejected.update(batch.rejected)
    assert rejected == {"a/damaged-shard": 4}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_no_shard_replaces_no_record(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: object) -> tuple[int, str]:
        raise OSError(number, os.strerror(number))

    with FaultyServer(served) as server:
        source = lenient(tmp_path, server.url)
        monkeypatch.setattr(ShardCache, "_receive", full)
        with pytest.raises(ConfigError, match=rf"kept in the shard cache .*{os.strerror(number)}.* machine's"):
            list(EvaluationLoader((source,), READER, 4, cache=ShardCache(tmp_path / "c")))
        with pytest.raises(ConfigError, match="cannot be kept in"):
            ShardCache(tmp_path / "c").fetch_index(f"{server.url}/train/a/index.json", tmp_path / "index")


def test_shards_of_a_url_are_verified_through_the_cache(
    served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FaultyServer(served) as server:
        manifest, cache = manifest_of(tmp_path, server.url), ["--cache", str(tmp_path / "cache")]
        assert pgp(["shards", "verify", manifest, *cache]) == 0
        out = capsys.readouterr().out
        assert f"fetching every shard of {server.url} through {tmp_path}/cache/shards, to check it" in out
        assert "train/a: intact: 10 records in, 10 used, 0 rejected" in out
        assert len(list((tmp_path / "cache/shards").glob("*.tar"))) == 3
        shard = served / "train" / "a" / "a-00001.tar"
        shard.write_bytes(shard.read_bytes()[:-512])
        assert pgp(["shards", "verify", manifest, *cache]) == 0  # what was fetched is what is checked, and used
        for path in (tmp_path / "cache/shards").glob("*.tar"):
            path.unlink()
        # A file server of this machine need not be asked six times.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pgp_lightning.data.remote.time.sleep", lambda seconds: None)
            assert pgp(["shards", "verify", manifest, *cache]) == 1
        assert f"error: {server.url}/train/a/a-00001.tar could not be fetched" in capsys.readouterr().err


def test_shards_are_not_built_at_a_url(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = manifest_of(tmp_path, "https://user:secret@host/x")
    assert pgp(["shards", "build", manifest, "--cache", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err
    assert "cannot be built at https://host/x: give --root a folder" in error and "secret" not in error
    assert not (tmp_path / "cache").exists()
    for gib in ("0", "inf"):
        assert pgp(["shards", "verify", manifest, "--cache-gib", gib]) == 2
        assert "--cache-gib must be above 0" in capsys.readouterr().err


def test_a_pipe_is_verified_if_the_caller_says_so(
    served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["shards", "verify", manifest_of(tmp_path, f"pipe:cat {served}/{{file}}")]
    arguments += ["--cache", str(tmp_path / "cache")]
    assert pgp(arguments) == 2 and "of `pgp shards`: --allow-pipe" in capsys.readouterr().err
    assert pgp([*arguments, "--allow-pipe"]) == 0
