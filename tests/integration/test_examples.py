import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pgp_lightning.embedded.world import draw_scene
from pgp_lightning.guides.posterior import PosteriorGuide

ROOT = Path(__file__).parents[2]


def test_score_one_image_draws_what_is_kept(tmp_path):
    PosteriorGuide(base="embedded:guide").save_pretrained(tmp_path / "guide")
    scene = draw_scene("test", 7)
    Image.fromarray(scene.image).save(tmp_path / "picture.png")
    output = tmp_path / "kept.png"
    arguments = [tmp_path / "guide", tmp_path / "picture.png", scene.questions[0].text, output]
    script = [sys.executable, "examples/score_one_image.py", *arguments]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "35 of 320 visual tokens kept" in done.stdout
    drawn = np.asarray(Image.open(output))
    assert drawn.shape == scene.image.shape
    unchanged = (drawn == scene.image).all(axis=-1).mean()
    assert 0.02 < unchanged < 0.5  # most of the picture is dimmed, the kept places are as they were
