"""A random model of the InternVL family, as small as can be, and requests for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

from pgp_lightning.data.collate import Batch
from pgp_lightning.embedded.pair import build_processor
from pgp_lightning.vlm.processor import Processor
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import TileGrid, TileRule

GOLDEN = Path(__file__).parent / "golden"
RULE = TileRule(tile_size=32, tokens_per_side=2, max_tiles=4)
WIDTH = 48
# 3, 1 and 5 tiles: 12, 4 and 20 visual tokens.
GRIDS = (TileGrid(2, 1, 2, True), TileGrid(1, 1, 2, False), TileGrid(2, 2, 2, True))
QUESTIONS = ("what color is the square", "how many red shapes", "read the blue sign", "is there a white cross")
ANSWERS = ("red", "2", "A B 7", "no")


def golden(name: str) -> list[dict[str, Any]]:
    """Read a file of reference values (tests/golden/README.md says where they come from)."""
    cases: list[dict[str, Any]] = json.loads((GOLDEN / name).read_text(encoding="utf-8"))
    return cases


def golden_object(name: str) -> dict[str, Any]:
    """Read a file of reference values that holds one object."""
    values: dict[str, Any] = json.loads((GOLDEN / name).read_text(encoding="utf-8"))
    return values


def tiny_processor() -> Processor:
    """Return the embedded world's tokenizer with a smaller tile rule."""
    return replace(build_processor("guide"), rule=RULE, max_length=64)


@torch.no_grad()
def enlarge(model: nn.Module) -> None:
    """Draw linear and embedding weights anew, large enough for every part of a small model to matter."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, 1.5 * module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0, 1.0)


def tiny_model(seed: int = 0) -> InternVLForConditionalGeneration:
    """Return a model with two layers in each part and untied embeddings, its weights large enough to matter."""
    processor = tiny_processor()
    vision = InternVLVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        attention_bias=True,
        image_size=(32, 32),
        patch_size=(8, 8),
        layer_scale_init_value=1.0,
    )
    text = Qwen2Config(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=64,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.encode("<IMG_CONTEXT>")[0],
        image_seq_length=RULE.tokens_per_side**2,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    config._attn_implementation = "sdpa"
    model = InternVLForConditionalGeneration(config)
    enlarge(model)
    return model


def save_tiny(folder: Path, seed: int = 0) -> str:
    """Write the model into a folder and return its path, which serves as `base`."""
    tiny_model(seed).save_pretrained(folder)
    tiny_processor().save(folder)
    return str(folder)


def tiny_request(
    questions: tuple[str, ...] = QUESTIONS[:3],
    grids: tuple[TileGrid, ...] = GRIDS,
    images: tuple[int, ...] = (),
    seed: int = 0,
) -> Request:
    """Return questions about images of noise; an image's pixels depend on the seed and its place in GRIDS."""
    tiles = []
    for grid in grids:
        generator = torch.Generator().manual_seed(100 * seed + GRIDS.index(grid))
        tiles.append(torch.randint(0, 256, (grid.tiles, 3, 32, 32), generator=generator, dtype=torch.uint8))
    return Request(list(questions), torch.cat(tiles), list(grids), list(images))


def row_of(request: Request, row: int) -> Request:
    """Return one question of a request with its own image alone."""
    image = request.images[row]
    first = sum(grid.tiles for grid in request.grids[:image])
    grid = request.grids[image]
    tiles = request.tiles[first : first + grid.tiles]
    return Request([request.questions[row]], tiles, [grid], systems=[request.systems[row]])


def tiny_batch(
    request: Request,
    answers: tuple[str, ...] = ANSWERS,
    sources: tuple[str, ...] = ("a", "b", "a", "b"),
    indices: tuple[int, ...] = (10, 11, 12, 13),
    turns: tuple[int, ...] = (0, 0, 0, 0),
) -> Batch:
    """Return a batch of a request, with made-up bookkeeping."""
    rows = len(request)
    return Batch(
        request=request,
        answers=list(answers[:rows]),
        sources=list(sources[:rows]),
        keys=[f"key-{index}" for index in indices[:rows]],
        types=[""] * rows,
        indices=list(indices[:rows]),
        turns=list(turns[:rows]),
    )
