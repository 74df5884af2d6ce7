"""Score the visual tokens of one picture with an exported guide and draw what would be kept.

    python examples/score_one_image.py guide picture.png "what color is the circle" kept.png

Without a picture at hand, `--scene 7` draws one of the embedded world and asks it a question of its own.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from pgp_lightning.embedded.world import draw_scene
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.selection import keep_top
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import cut_tiles


def main() -> None:
    """Parse the arguments, score, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("guide", type=Path, help="folder that `pgp export` wrote")
    parser.add_argument("picture", type=Path, nargs="?")
    parser.add_argument("question", nargs="?")
    parser.add_argument("output", type=Path, nargs="?", default=Path("kept.png"))
    parser.add_argument("--scene", type=int, help="a scene of the embedded world in place of a picture")
    parser.add_argument("--keep-ratio", type=float, default=0.11)
    given = parser.parse_args()
    if given.scene is not None:
        scene = draw_scene("test", given.scene)
        image, question = Image.fromarray(scene.image), scene.questions[0].text
    elif given.picture and given.question:
        image, question = Image.open(given.picture).convert("RGB"), given.question
    else:
        parser.error("give a picture and a question, or --scene NUMBER")

    guide = PosteriorGuide.from_pretrained(given.guide)
    tiles, grid = cut_tiles(image, guide.vlm.processor.rule)
    importance = guide(Request([question], torch.from_numpy(tiles), [grid]))
    kept = keep_top(importance, ratio=given.keep_ratio)[0].numpy()

    shade = Image.new("L", image.size, 180)
    draw = ImageDraw.Draw(shade)
    for left, top, right, bottom in grid.rectangles()[kept] * np.tile(image.size, 2):
        draw.rectangle((left, top, right - 1, bottom - 1), fill=0)
    Image.composite(Image.new("RGB", image.size), image, shade).save(given.output)
    print(f"{question}: {kept.sum()} of {len(kept)} visual tokens kept, drawn to {given.output}")


if __name__ == "__main__":
    main()
