"""Prune a model in your own code: one `with`, and `generate` as always.

    python examples/prune_with_generate.py                      # a scene of the embedded world
    python examples/prune_with_generate.py picture.png "what color is the circle" --keep-ratio 0.11

With real models give --guide the folder of an exported guide, --answer-model a folder or a name on the hub, and on a
CUDA device --dtype bfloat16.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from pgp_lightning.embedded.world import draw_scene
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.prefill import pruned
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.vlm.inputs import prompt_inputs
from pgp_lightning.vlm.loading import load_vlm
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import cut_tiles


def main() -> None:
    """Answer a question with all visual tokens, then with few."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, nargs="?")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--guide", default="embedded:pgp_seed0")
    parser.add_argument("--answer-model", default="embedded:answer_model")
    parser.add_argument("--keep-ratio", type=float, default=0.05)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args()
    if given.picture and given.question:
        image, question = Image.open(given.picture).convert("RGB"), given.question
    else:
        scene = draw_scene("test", 7)
        image, question = Image.fromarray(scene.image), scene.questions[0].text

    device = "cuda" if torch.cuda.is_available() else "cpu"
    answer_model = load_vlm(given.answer_model, getattr(torch, given.dtype))
    guide = PosteriorGuide.from_pretrained(given.guide, dtype=given.dtype).to(device)
    answer_model.model.to(device)
    tokenizer, stop = answer_model.processor.tokenizer, answer_model.processor.stop_id

    # What guide and answer model share is the question and the tiles; each builds its own prompt of them.
    tiles, grid = cut_tiles(image, answer_model.processor.rule)
    request = Request([question], torch.from_numpy(tiles), [grid]).to(device)
    inputs = prompt_inputs(answer_model, request)
    settings = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": stop, "pad_token_id": stop}

    model = answer_model.model  # transformers' own class, before, inside and after the `with`
    full = model.generate(**inputs, **settings)
    with pruned(model, Guided(guide, layer=0, keep_ratio=given.keep_ratio), inputs, request) as run:
        short = model.generate(**inputs, **settings)

    prompt = inputs["input_ids"].shape[1]
    print(f"question: {question}")
    print(f"all {grid.tokens} visual tokens: {tokenizer.decode(full[0, prompt:], skip_special_tokens=True)}")
    kept = int(run.kept[-1].sum())
    print(f"{kept} visual tokens: {tokenizer.decode(short[0, prompt:], skip_special_tokens=True)}")
    print(f"prompt slots in each layer's cache: {[int(count[0]) for count in run.slots]}")


if __name__ == "__main__":
    main()
