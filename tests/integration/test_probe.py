"""`pgp probe` as users call it: what it finds of guides whose V' do and do not carry the question, and mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from pgp_lightning.evaluation import probe
from pgp_lightning.tools import main
from tests.integration.failing import fails

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few records with four questions each (test), and with one (val)."""
    folder = tmp_path_factory.mktemp("probe")
    build = {"class_path": "pgp_lightning.embedded.records.EmbeddedRecords"}
    splits = {
        split: [{"name": split, "build": build | {"init_args": {"split": split, "family": "objects", **of}}}]
        for split, of in {"test": {"records": 24}, "val": {"records": 3, "turns": 1}, "train": {"records": 9}}.items()
    }
    path = folder / "few.yaml"
    path.write_text(yaml.safe_dump({"name": "few", "licence": "Apache-2.0", "root": str(folder), "splits": splits}))
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "probe_guide", partial(probe.probe_guide, steps=150))


def test_probe_of_an_exported_guide(manifest: Path, tmp_path: Path):
    output = tmp_path / "found.json"
    words = [sys.executable, "-m", "pgp_lightning.tools", "probe", "embedded:pgp_seed0", "--manifest", str(manifest)]
    done = subprocess.run([*words, "--output", str(output)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "guide artefact  embedded:pgp_seed0, " in done.stdout and "96 questions about 24 images\n" in done.stdout
    assert "\nThe visual states carry the question: " in done.stdout and "left out" not in done.stdout
    found = json.loads(output.read_text())
    at = {name: {ratio: value["mean"] for ratio, value in of.items()} for name, of in found["recalls"].items()}
    assert at["scores"]["0.05"] > 0.8 and at["probe"]["0.05"] > at["probe, another question"]["0.05"] + 0.3
    assert at["difference"]["0.05"] == pytest.approx(at["probe"]["0.05"] - at["probe, another question"]["0.05"])
    assert at["random"]["0.2"] == pytest.approx(0.2, abs=0.01)
    assert sum(found["shares"].values()) == pytest.approx(1) and found["shares"]["interaction"] > 0.15
    assert found["overlap"]["the guide's top 5 %"]["mean"] > found["overlap"]["the relevant tokens"]["mean"]
    assert not (manifest.parent / "train").exists()  # only the split that was asked for is built


def test_probe_of_a_base_whose_states_do_not_carry_the_question(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
):
    output = tmp_path / "found.json"
    words = ["probe", "embedded:guide_before_question_blind", "--manifest", str(manifest), "--output", str(output)]
    assert main(words) == 1
    out, found = capsys.readouterr().out, json.loads(output.read_text())
    assert "\nThe visual states do not carry the question: " in out and "model.question_blind" in out
    assert abs(found["recalls"]["difference"]["0.05"]["mean"]) < 0.1 and found["shares"]["interaction"] < 0.01
    assert set(found["recalls"]) == {"probe", "probe, another question", "difference", "random"}
    assert found["overlap"] == {} and found["artefact"] is False
    # The same again is the same.
    assert main(words) == 1 and json.loads(output.read_text()) == found


def test_probe_without_known_relevant_tokens(manifest: Path, capsys: pytest.CaptureFixture[str]):
    # With one tile the world's relevant tokens do not apply, and are dropped.
    for guide, code in {"guide": 0, "guide_before_question_blind": 1}.items():
        words = [f"embedded:{guide}", "--manifest", str(manifest), "--max-tiles", "1", "--images", "6"]
        assert main(["probe", *words]) == code, guide
        out = capsys.readouterr().out
        assert "24 questions about 6 images" in out and "% of the variance of V' is what" in out and "recall" not in out


def test_probe_says_in_one_line_what_is_wrong(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = ["--manifest", str(manifest)]
    cases: list[tuple[list[str], str]] = [
        (["embedded:gone", *data], "embedded:guide_before_question_blind"),
        ([str(tmp_path), *data], "holds neither guide.json"),
        ([str(tmp_path / "gone"), *data], "give a local folder"),
        (["embedded:guide", *data, "--split", "none"], "none"),
        (["embedded:guide", *data, "--split", "val"], "none of 3 records has two different questions"),
        (["embedded:guide", *data, "--images", "1"], "--images must be at least 2"),
        (["embedded:guide", *data, "--max-tiles", "0"], "max_tiles must be at least 1"),
        (["embedded:guide", "--manifest", str(tmp_path / "gone.yaml")], "gone.yaml"),
        (["embedded:guide", *data, "--output", str(tmp_path / "gone" / "x.json")], "in a folder that exists"),
    ]
    for words, expected in cases:
        assert expected in fails(["probe", *words], capsys), words
