import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pgp_lightning.embedded import train_guides
from pgp_lightning.embedded.world import draw_scene
from pgp_lightning.guides.posterior import PosteriorGuide
from tests.integration.small_run import small_config, write_config, write_manifest

ROOT = Path(__file__).parents[2]


EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(example):
    assert len(example.read_text(encoding="utf-8").splitlines()) < 80


def test_score_one_image_draws_what_is_kept(run_script, tmp_path):
    PosteriorGuide(base="embedded:guide").save_pretrained(tmp_path / "guide")
    scene = draw_scene("test", 7)
    Image.fromarray(scene.image).save(tmp_path / "picture.png")
    output = tmp_path / "kept.png"
    given = tmp_path / "guide", tmp_path / "picture.png", scene.questions[0].text, output
    printed = run_script(EXAMPLES / "score_one_image.py", *given)
    assert "35 of 320 visual tokens kept" in printed
    drawn = np.asarray(Image.open(output))
    assert drawn.shape == scene.image.shape
    unchanged = (drawn == scene.image).all(axis=-1).mean()
    assert 0.02 < unchanged < 0.5  # most of the picture is dimmed, the kept places are as they were


def test_prune_with_generate_answers_twice(run_script):
    scene = draw_scene("test", 7)
    answer = scene.questions[0].answer
    printed = run_script(EXAMPLES / "prune_with_generate.py")
    assert f"all 320 visual tokens: {answer}" in printed and f"16 visual tokens: {answer}" in printed
    slots = json.loads(printed.rpartition("cache: ")[2])
    assert len(slots) == 4 and len(set(slots)) == 1 and 16 < slots[0] < 40


def test_a_pruner_of_your_own_is_compared_with_the_controls(run_script, tmp_path):
    manifest = write_manifest(tmp_path, tmp_path / "shards")
    printed = run_script(EXAMPLES / "a_pruner_of_your_own.py", "--images", 2, "--manifest", manifest)
    rows = {line.split("|")[1].strip(): line for line in printed.splitlines() if line.startswith("| ")}
    assert {"full", "longest", "oracle", "uniform", "random"} <= rows.keys()
    assert "8 questions about 2 records" in printed


def test_the_shipped_guides_are_made_by_a_script(tmp_path, monkeypatch, capfd):
    config = write_config(tmp_path, small_config(write_manifest(tmp_path, tmp_path / "shards"), steps=2))
    made = ["train_guides", "--folder", str(tmp_path / "out"), "--config", str(config), "--seeds", "5"]
    monkeypatch.setattr("sys.argv", made)
    train_guides.main()
    assert "verified" in capfd.readouterr().out
    facts = json.loads((tmp_path / "out" / "pgp_seed5" / "guide.json").read_text(encoding="utf-8"))
    assert facts["training"]["seed"] == 5 and facts["training"]["optimiser_steps"] == 2
    train_guides.main()
    assert not capfd.readouterr().out  # it is there
