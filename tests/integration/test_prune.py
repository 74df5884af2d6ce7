"""`pgp prune` as users call it: what it prints and draws, and mistakes in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pgp_lightning.embedded.world import draw_scene
from pgp_lightning.evaluation.cost import Schedule, prune_cost
from pgp_lightning.evaluation.flops import posterior_flops
from pgp_lightning.evaluation.prune import open_picture, prune_picture
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.tools import main
from pgp_lightning.vlm.loading import load_vlm
from tests.integration.failing import fails
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A picture, a question about it, and the answer."""
    drawn = draw_scene("test", 3)
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    Image.fromarray(drawn.image).save(path)
    return path, drawn.questions[0].text, drawn.questions[0].answer


def test_prune_on_a_picture(scene: tuple[Path, str, str], tmp_path: Path):
    path, question, answer = scene
    output = tmp_path / "kept.png"
    words = [sys.executable, "-m", "pgp_lightning.tools", "prune", "--image", str(path), "--question", question]
    done = subprocess.run([*words, "--output", str(output)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split(maxsplit=1) == ["question", question]
    assert lines[1].split(maxsplit=2) == ["all", "tokens", answer] and lines[2].split() == ["pruned", answer]
    assert "16 of 320 visual tokens (5.0 %)" in lines[3] and "of 5 tiles encoded" in lines[3]
    assert lines[4].startswith("FLOPs") and "of which the guide" in lines[4] and str(output) in lines[5]
    with Image.open(output) as picture:
        assert picture.format == "PNG" and picture.width > picture.height > 100
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ([], "16 of 320 visual tokens (5.0 %)"),
        (["--layer", "2", "--keep-ratio", "0.2"], "64 of 320 visual tokens (20.0 %), 5 of 5 tiles"),
        (["--keep-ratio", "1", "--guide", "embedded:pgp_seed1"], "320 of 320 visual tokens (100.0 %), 5 of 5 tiles"),
    ],
)
def test_prune_on_a_scene(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], tokens: str):
    output = tmp_path / "kept.JPG"
    assert main(["prune", "--scene", "3", "--output", str(output), *options]) == 0
    out = capsys.readouterr().out
    assert tokens in out and draw_scene("test", 3).questions[0].text in out and output.stat().st_size > 1000


@pytest.mark.parametrize("layer", [0, 2])
def test_prune_counts_what_ran(scene: tuple[Path, str, str], layer: int):
    path, question, answer = scene
    found = prune_picture(open_picture(path), question, "embedded:pgp_seed0", "embedded:answer_model", layer=layer)
    assert found.full == answer and found.grid.tiles == 5 and found.keep.sum() == 16
    assert found.importance[found.keep].min() >= found.importance[~found.keep].max()
    encoded = 5 if layer else int(found.keep.reshape(5, 64).any(axis=1).sum())
    assert found.tiles_encoded == encoded and (encoded < 5) == (layer == 0)
    vlm, base = load_vlm("embedded:answer_model"), load_vlm("embedded:guide")
    prompt = vlm.processor.prompt(question, None, "image_first")
    steps = {"text": len(prompt.before) + len(prompt.after), "new_tokens": len(answer.split()) + 1, "tiles": 5}
    assert found.full_cost == prune_cost(vlm.model.config, Schedule(320, (320,) * 4), **steps)
    assert found.answer == answer
    before = len(base.processor.prompt(question, None, "question_first").before)
    guide = posterior_flops(base.model.config, 5, before, lora_rank=32)
    schedule = Schedule(320, (320,) * layer + (16,) * (4 - layer))
    assert found.cost == prune_cost(vlm.model.config, schedule, guide=guide, tiles_encoded=encoded, **steps)


def test_prune_says_in_one_line_what_is_wrong(
    scene: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path, question, _ = scene
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes(path.read_bytes()[:600])
    torch.manual_seed(0)
    PosteriorGuide(save_tiny(tmp_path / "tiny"), lora_rank=2).save_pretrained(tmp_path / "guide")
    quantised = Path(save_tiny(tmp_path / "quantised"))
    config = json.loads((quantised / "config.json").read_text()) | {"quantization_config": {"quant_method": "novel"}}
    (quantised / "config.json").write_text(json.dumps(config))
    at, ask, drawn = ["--image", str(path)], ["--question", question], ["--scene", "3"]
    cases: list[tuple[list[str], str]] = [
        (["--image", str(tmp_path / "text.png"), *ask], "text.png must be a PNG, JPEG or WebP picture"),
        (["--image", str(tmp_path / "half.png"), *ask], "half.png must be a PNG, JPEG or WebP picture"),
        (["--image", str(tmp_path / "gone.png"), *ask], "gone.png"),
        (["--image", str(tmp_path), *ask], "must be a PNG, JPEG or WebP picture"),
        ([*at, "--question", "  "], "the question is empty"),
        ([*at, "--question", ""], "give --image and --question, or --scene"),
        (at, "give --image and --question, or --scene"),
        (ask, "give --image and --question, or --scene"),
        ([*at, "--question", "what <IMG_CONTEXT> is"], "stands for an image's visual tokens: leave it out"),
        ([*at, "--question", "red " * 4000], "slots and the model was made for 448, beyond which it answers noise"),
        ([*drawn, "--answer-model", str(quantised)], "is quantised (novel) and cannot be loaded here: Unknown"),
        (["--scene", "-1"], "--scene must be at least 0, got -1"),
        ([*drawn, "--layer", "4"], "cannot prune before layer 4: the model has the layers 0 to 3"),
        ([*drawn, "--layer", "-1"], "layer must be at least 0"),
        ([*drawn, "--keep-ratio", "1.5"], "must be in (0, 1], got 1.5"),
        ([*drawn, "--keep-ratio", "0"], "must be in (0, 1], got 0.0"),
        ([*drawn, "--keep-ratio", "nan"], "must be in (0, 1], got nan"),
        ([*drawn, "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        ([*drawn, "--guide", str(tmp_path / "guide")], "tile_size is 32 for the guide and 128 for the answer model"),
        ([*drawn, "--answer-model", str(tmp_path / "tiny")], "tile_size is 128 for the guide and 32 for the answer"),
        ([*drawn, "--guide", str(tmp_path)], "holds no guide"),
        ([*drawn, "--answer-model", "embedded:gone"], "no model at 'embedded:gone'"),
    ]
    output = tmp_path / "kept.png"
    for words, expected in cases:
        assert expected in fails(["prune", *words, "--output", str(output)], capsys), words
        assert not output.exists()
    for wrong in ("kept.foo", "kept", "gone/kept.png"):
        line = fails(["prune", *drawn, "--output", str(tmp_path / wrong)], capsys)
        assert "--output must be a PNG, JPEG or WebP file in a folder that exists" in line and wrong in line
