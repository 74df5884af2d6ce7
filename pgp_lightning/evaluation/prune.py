"""`pgp prune`: one picture and one question, answered with all visual tokens and with those that a guide keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.cost import PruneCost, Schedule, prune_cost
from pgp_lightning.evaluation.guide_cost import guide_flops
from pgp_lightning.evaluation.overlay import draw_heat, draw_kept
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.prefill import KeepAll, Pruner, pruned
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.vlm.family import check_pair
from pgp_lightning.vlm.inputs import generate, prompt_inputs, read_answers
from pgp_lightning.vlm.loading import load_vlm
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import TileGrid, cut_tiles

__all__ = ["Pruned", "open_picture", "prune_picture"]

LARGEST = 64_000_000  # pixels of a picture that is opened


@dataclass(frozen=True)
class Pruned:
    """A question answered twice.

    Attributes:
        full: the answer with all visual tokens.
        answer: the answer with those that were kept.
        keep: bool (M,), what the last decoder layer saw.
        importance: float32 (M,), what the guide says.
        grid: how the picture was tiled.
        tiles_encoded: tiles that passed the answer model's vision tower.
        full_cost: FLOPs of the first.
        cost: FLOPs of the second, the guide's included.
    """

    full: str
    answer: str
    keep: np.ndarray
    importance: np.ndarray
    grid: TileGrid
    tiles_encoded: int
    full_cost: PruneCost
    cost: PruneCost

    def summary(self) -> str:
        """Return answers, tokens and FLOPs as text."""
        kept, count, tiles = int(self.keep.sum()), len(self.keep), self.grid.tiles
        share = self.cost.total / self.full_cost.total
        return (
            f"all tokens   {self.full}\n"
            f"pruned       {self.answer}\n"
            f"tokens       {kept} of {count} visual tokens ({100 * kept / count:.1f} %), "
            f"{self.tiles_encoded} of {tiles} tiles encoded by the answer model\n"
            f"FLOPs        {self.cost.total / 1e9:,.3f} G of {self.full_cost.total / 1e9:,.3f} G "
            f"({100 * share:.0f} %), of which the guide {self.cost.guide / 1e9:,.3f} G"
        )

    def draw(self, image: Image.Image) -> Image.Image:
        """Return the picture with what was kept, and beside it the importance map."""
        kept = draw_kept(image, self.grid, self.keep)
        heat = draw_heat(image, self.grid, self.importance)
        both = Image.new("RGB", (kept.width + heat.width, kept.height), "white")
        both.paste(kept, (0, 0))
        both.paste(heat, (kept.width, 0))
        return both


def open_picture(path: Path) -> Image.Image:
    """Open a picture.

    Raises:
        ConfigError: if the file is no picture, or too large to be one.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > LARGEST:
                raise ConfigError(f"{path} has {image.width} x {image.height} pixels; at most {LARGEST} are opened")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} must be a PNG, JPEG or WebP picture: {error}") from error


def prune_picture(
    image: Image.Image,
    question: str,
    guide: str,
    answer_model: str,
    keep_ratio: float = 0.05,
    layer: int = 0,
    max_new_tokens: int = 64,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> Pruned:
    """Answer a question about a picture with all visual tokens and with those that a guide keeps.

    Args:
        image: the picture.
        question: the question.
        guide: the artefact's folder, or `embedded:NAME`.
        answer_model: the model that is pruned, see `load_vlm`.
        keep_ratio: share of the visual tokens that stay.
        layer: L, the decoder layer before which the others are dropped.
        max_new_tokens: longest answer.
        dtype: of both models; by default bfloat16 with a CUDA device, else float32.

    Raises:
        ConfigError: if a model cannot be loaded, or guide and answer model do not go together.
    """
    if not question.strip():
        raise ConfigError("the question is empty: give it with --question")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    scorer = PosteriorGuide.from_pretrained(guide, dtype=dtype)
    vlm = load_vlm(answer_model, getattr(torch, dtype))
    check_pair(scorer.vlm.processor, vlm.processor)
    scorer.to(device)
    vlm.model.eval().to(device)
    tiles, grid = cut_tiles(image, vlm.processor.rule)
    request = Request([question], torch.from_numpy(tiles), [grid]).to(device)
    inputs = prompt_inputs(vlm, request)
    encoded: list[int] = []

    def answer(pruner: Pruner) -> tuple[str, Schedule, int, int]:
        with pruned(vlm, pruner, inputs, request) as run:
            hook = vlm.projector.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
            try:
                tokens = generate(vlm, inputs, max_new_tokens)
            finally:
                hook.remove()
        seen = tuple(int(mask.sum()) for mask in run.kept)
        return read_answers(vlm, tokens)[0], Schedule(grid.tokens, seen), int(run.slots[0]) - seen[0], tokens.shape[1]

    full, whole, text, steps = answer(KeepAll())
    full_cost = prune_cost(vlm.model.config, whole, tiles=grid.tiles, text=text, new_tokens=steps)
    pruner = Guided(scorer, layer, keep_ratio)
    short, schedule, text, steps = answer(pruner)
    cost = prune_cost(
        vlm.model.config,
        schedule,
        tiles=grid.tiles,
        text=text,
        new_tokens=steps,
        guide=guide_flops(scorer, request)[0] or 0,
        tiles_encoded=encoded[-1],
    )
    assert pruner.keep is not None and pruner.importance is not None
    return Pruned(
        full=full,
        answer=short,
        keep=pruner.keep[0].cpu().numpy(),
        importance=pruner.importance[0].cpu().numpy(),
        grid=grid,
        tiles_encoded=encoded[-1],
        full_cost=full_cost,
        cost=cost,
    )
