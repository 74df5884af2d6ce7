"""What a guide and an answer model share: questions, and images as tiles."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pgp_lightning.vlm.tiles import TileGrid

__all__ = ["Request"]


@dataclass
class Request:
    """A batch of B questions about I images; a question names its image, so turns of one image share its tiles.

    Prompt slots are no part of it: guide and answer model have their own tokenizers and templates.

    Args:
        questions: B question strings, without image placeholders.
        tiles: uint8 (T, 3, S, S), the images' tiles one image after the other, each thumbnail last.
        grids: how each of the I images was tiled; their tile counts sum to T.
        images: the image of each question, B indices below I; by default question b asks about image b.
        relevant: bool (B, M), the visual tokens that matter, padded with False (only where the truth is known).
        other_questions: B questions about other images, for controls.
        systems: B texts of the system block, empty for none; None, the default, stands for the chat format's own.

    Raises:
        ValueError: if counts disagree.
    """

    questions: list[str]
    tiles: Tensor
    grids: list[TileGrid]
    images: list[int] = field(default_factory=list)
    relevant: Tensor | None = None
    other_questions: list[str] | None = None
    systems: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.images:
            self.images = list(range(len(self.questions)))
        if not self.systems:
            self.systems = [None] * len(self.questions)
        if len(self.systems) != len(self.questions):
            raise ValueError(f"{len(self.questions)} questions need a system text or None each, got {self.systems}")
        if len(self.images) != len(self.questions) or not all(0 <= i < len(self.grids) for i in self.images):
            raise ValueError(
                f"{len(self.questions)} questions need an index each into {len(self.grids)} images, got {self.images}"
            )
        expected = sum(grid.tiles for grid in self.grids)
        if self.tiles.dtype != torch.uint8 or self.tiles.ndim != 4 or len(self.tiles) != expected:
            raise ValueError(
                f"expected uint8 tiles of shape ({expected}, 3, S, S), got {self.tiles.dtype} {tuple(self.tiles.shape)}"
            )

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def counts(self) -> list[int]:
        """Number of visual tokens of each question's image."""
        return [self.grids[i].tokens for i in self.images]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Request:
        """Return the request with its tensors on a device."""
        relevant = None if self.relevant is None else self.relevant.to(device, non_blocking=non_blocking)
        return replace(self, tiles=self.tiles.to(device, non_blocking=non_blocking), relevant=relevant)
