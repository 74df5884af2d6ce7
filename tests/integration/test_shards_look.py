"""`pgp shards stats` and `pgp shards show` as users call them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from pgp_lightning.tools import main as pgp
from tests.html_reader import Page

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded world in small: two sources of 12 and 7 records."""
    folder = tmp_path_factory.mktemp("look")
    build = {"class_path": "pgp_lightning.embedded.records.EmbeddedRecords", "samples_per_shard": 5}
    of = {"objects": 12, "reading": 7}
    sources = [
        {"name": name, "build": build | {"init_args": {"split": "train", "family": name, "records": count}}}
        for name, count in of.items()
    ]
    path = folder / "two.yaml"
    splits = {"train": sources, "val": [{"name": "none"}]}
    path.write_text(yaml.safe_dump({"name": "two", "licence": "MIT", "root": str(folder / "data"), "splits": splits}))
    assert pgp(["shards", "stats", str(path)]) == 2  # nothing is built by looking
    assert not (folder / "data").exists()
    splits.pop("val")
    path.write_text(yaml.safe_dump({"name": "two", "licence": "MIT", "root": str(folder / "data"), "splits": splits}))
    assert pgp(["shards", "build", str(path)]) == 0
    return path


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pgp_lightning.tools", "shards", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_stats_with_a_base_and_everything_written(manifest: Path, tmp_path: Path):
    outputs = [tmp_path / f"found.{suffix}" for suffix in ("html", "png", "json")]
    done = run("stats", manifest, "--base", "embedded:guide", "--records", 10, "--output", *outputs)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "the first 10 records of each source, 17 of 19; tiles of 128 px, at most 4" in done.stdout
    assert "prompt slots of a turn" in done.stdout and "all sources" in done.stdout
    found = json.loads(outputs[2].read_text())
    assert {name: (part["records"], part["samples"]) for name, part in found["sources"].items()} == {
        "objects": (10, 12),
        "reading": (7, 7),
    }
    # Scenes of 256 pixels are four tiles of 128 and a thumbnail, 64 tokens each.
    assert found["all"]["visual_tokens"]["max"] == 320 and found["all"]["slots"]["percentiles"]["5"] > 320
    assert found["max_length"] == 448 and found["over_length"] == 0
    assert found["sources"]["objects"]["share"] == pytest.approx(12 / 19)
    assert len(Page(outputs[0].read_text()).all("svg")) == 9
    with Image.open(outputs[1]) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 5


def test_show_with_a_page(manifest: Path, tmp_path: Path):
    done = run("show", manifest, "--records", 3, "--source", "objects", "--output", tmp_path / "show.html")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("objects/train-objects-0000") == 3 and "relevant tokens of 320" in done.stdout
    page = Page((tmp_path / "show.html").read_text())
    assert len(page.all("img")) == 3 and page.all("img")[0]["width"] == "256"


def test_an_unknown_source_is_answered_with_those_there_are(manifest: Path):
    done = run("show", manifest, "--source", "objetcs")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"error: {manifest}: split 'train' has no source 'objetcs': it has objects, reading\n"


def test_draws_are_seeded_and_keys_found(manifest: Path, capsys: pytest.CaptureFixture[str]):
    said = []
    for words in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--records", "99"]):
        assert pgp(["shards", "show", str(manifest), *words]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    every = [line.split()[0] for line in said[3].splitlines() if line.startswith(("objects/", "reading/"))]
    assert every == [
        f"{name}/train-{name}-{n:06d}" for name, count in (("objects", 12), ("reading", 7)) for n in range(count)
    ]
    assert pgp(["shards", "show", str(manifest), "--key", "train-reading-000006", "--base", "embedded:guide"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("reading/train-reading-000006 256 × 256 PNG, ") and "2 × 2 tiles and a thumbnail" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stats", "--output", "x.csv"], "--output must be a .html or .png or .json file in a folder that exists"),
        (["show", "--output", "x.png"], "--output must be a .html file in a folder that exists, got x.png"),
        (["show", "--records", "0"], "--records must be at least 1"),
        (["show", "--key", "nobody"], "no record has the key 'nobody' in objects, reading"),
        (["stats", "--records", "0"], "records must be at least 1"),
        (["stats", "--split", "val"], "splits.val is missing: the manifest has train"),
    ],
)
def test_mistakes(manifest: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert pgp(["shards", words[0], str(manifest), *words[1:]]) == 2
    assert said in capsys.readouterr().err
