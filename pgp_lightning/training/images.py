"""Pictures for TensorBoard: where a guide looks, and what would be kept."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw
from torch import Tensor

from pgp_lightning.errors import ConfigError
from pgp_lightning.selection import keep_top
from pgp_lightning.training.callbacks import event_step
from pgp_lightning.vlm.tiles import TileGrid

if TYPE_CHECKING:
    from pgp_lightning.data.collate import Batch

__all__ = ["ImportanceImages", "draw_importance", "reassemble"]

KEEP_RATIO = 0.11  # of the ratios that validation reports, the one at which most guides still answer
TRUTH = (0, 255, 128)
MARGIN = 4


class ImportanceImages(Callback):
    """Logs the importance maps of the first validation batch as `val/importance/<i>`.

    Args:
        every_n_val: validations from one set of pictures to the next.
        samples: number of pictures.
        size: longer side of a drawn image in pixels.

    Raises:
        ConfigError: if a number is less than 1.
    """

    def __init__(self, every_n_val: int = 1, samples: int = 4, size: int = 448) -> None:
        if min(every_n_val, samples, size) < 1:
            raise ConfigError(
                f"every_n_val, samples and size must be at least 1, got {every_n_val}, {samples} and {size}"
            )
        self.every_n_val, self.samples, self.size = every_n_val, samples, size
        self._validations = 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or not loggers or batch_idx or dataloader_idx:
            return
        self._validations += 1
        if (self._validations - 1) % self.every_n_val:
            return
        # On every process, though one draws: a guide with sharded weights has to be called by all.
        with trainer.precision_plugin.forward_context():
            importance: Tensor = pl_module.guide(batch.request)  # type: ignore[operator]
        if not trainer.is_global_zero:
            return
        for index in range(min(self.samples, len(batch.request))):
            picture = draw_sample(batch, importance, index, self.size)
            for logger in loggers:
                logger.experiment.add_image(f"val/importance/{index}", picture, event_step(trainer), dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        """Return how many validations there were."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations = state_dict["validations"]


def draw_sample(batch: Batch, importance: Tensor, index: int, size: int = 448) -> np.ndarray:
    """Draw one question of a batch: uint8 (H, W, 3); importance is (B, M), -inf on padding."""
    request = batch.request
    image = request.images[index]
    grid, first = request.grids[image], sum(grid.tiles for grid in request.grids[:image])
    kept = keep_top(importance[index : index + 1].float(), KEEP_RATIO)
    relevant = None if request.relevant is None else _values(request.relevant[index], grid).astype(bool)
    return draw_importance(
        request.tiles[first : first + grid.tiles].cpu().numpy(),
        grid,
        _values(importance[index].float(), grid),
        _values(kept[0], grid).astype(bool),
        relevant,
        f"Q: {request.questions[index]}\nA: {batch.answers[index]}",
        size,
    )


def _values(row: Tensor, grid: TileGrid) -> np.ndarray:
    """Return the values of a padded row (M,) that belong to the image's own tokens."""
    return row[: grid.tokens].detach().to("cpu", torch.float32).numpy()


def reassemble(tiles: np.ndarray, grid: TileGrid) -> tuple[np.ndarray, np.ndarray | None]:
    """Put tiles together again.

    Args:
        tiles: uint8 (T, 3, S, S), thumbnail last.
        grid: how they were cut.

    Returns:
        The image, uint8 (rows * S, columns * S, 3), and the thumbnail, (S, S, 3), or None.

    Raises:
        ValueError: if the tiles are not the grid's.
    """
    if len(tiles) != grid.tiles:
        raise ValueError(f"expected the {grid.tiles} tiles of the grid, got {len(tiles)}")
    side = tiles.shape[-1]
    own = tiles[: grid.columns * grid.rows].reshape(grid.rows, grid.columns, 3, side, side)
    image = own.transpose(0, 3, 1, 4, 2).reshape(grid.rows * side, grid.columns * side, 3)
    return image, tiles[-1].transpose(1, 2, 0) if grid.thumbnail else None


def draw_importance(
    tiles: np.ndarray,
    grid: TileGrid,
    importance: np.ndarray,
    kept: np.ndarray,
    relevant: np.ndarray | None = None,
    text: str = "",
    size: int = 448,
) -> np.ndarray:
    """Draw the importance of visual tokens over the image, and below it what is kept of the image.

    The tokens of the tiles are drawn on the left, those of the thumbnail, if there is one, on the right; the true
    tokens are outlined in green.

    Args:
        tiles: uint8 (T, 3, S, S), thumbnail last.
        grid: how the image was tiled, with M visual tokens.
        importance: float (M,), finite.
        kept: bool (M,).
        relevant: bool (M,), the tokens that matter, where that is known.
        text: what is written above.
        size: longer side of the image as drawn, in pixels.

    Returns:
        uint8 (H, W, 3).
    """
    low, high = float(importance.min()), float(importance.max())
    heat = grid.untile((importance - low) / max(high - low, 1e-12))
    keep = grid.untile(kept)
    truth = (None, None) if relevant is None else grid.untile(relevant)
    longer = max(grid.columns, grid.rows)
    shape = (max(1, size * grid.columns // longer), max(1, size * grid.rows // longer))
    rows: list[list[Image.Image]] = [[], []]
    for part, pixels in enumerate(reassemble(tiles, grid)):
        values, mask = heat[part], keep[part]
        if pixels is None or values is None or mask is None:
            continue
        # The thumbnail is square whatever the image; drawn like the image it is easier to compare.
        base = Image.fromarray(np.ascontiguousarray(pixels)).resize(shape)
        rows[0].append(_outline(_overlay(base, values), truth[part]))
        rows[1].append(_outline(_dim(base, mask), truth[part]))
    return np.asarray(_page(rows, text))


def _spread(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """Give each token's value to the pixels it covers: float32 (height, width)."""
    plane = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(plane.resize(image.size, Image.Resampling.NEAREST))


def _overlay(image: Image.Image, values: np.ndarray) -> Image.Image:
    """Lay values in [0, 1] over a grey copy of the image: the higher, the more opaque, from blue over red to yellow."""
    value = _spread(values, image)[..., None]
    colour = np.concatenate([np.clip(2 * value, 0, 1), np.clip(2 * value - 1, 0, 1), np.clip(1 - 2 * value, 0, 1)], -1)
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32)
    opacity = 0.25 + 0.5 * value
    return Image.fromarray((grey * (1 - opacity) + 255 * colour * opacity).astype(np.uint8))


def _dim(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """Darken what is not kept."""
    share = np.where(_spread(mask, image)[..., None] > 0.5, 1.0, 0.2)
    return Image.fromarray((np.asarray(image) * share).astype(np.uint8))


def _outline(image: Image.Image, truth: np.ndarray | None) -> Image.Image:
    """Draw the border of the true tokens' area."""
    if truth is None:
        return image
    draw = ImageDraw.Draw(image)
    rows, columns = truth.shape
    inside = np.pad(truth.astype(bool), 1)
    for row, column in zip(*np.nonzero(truth), strict=True):
        left, right = column * image.width / columns, (column + 1) * image.width / columns - 1
        top, bottom = row * image.height / rows, (row + 1) * image.height / rows - 1
        sides = (
            (inside[row, column + 1], (left, top, right, top)),
            (inside[row + 2, column + 1], (left, bottom, right, bottom)),
            (inside[row + 1, column], (left, top, left, bottom)),
            (inside[row + 1, column + 2], (right, top, right, bottom)),
        )
        for covered, line in sides:
            if not covered:
                draw.line(line, fill=TRUTH, width=2)
    return image


def _page(rows: list[list[Image.Image]], text: str) -> Image.Image:
    """Set rows of images under a text."""
    width = max(sum(image.width + MARGIN for image in row) for row in rows) + MARGIN
    # The built-in font has no other characters, and 6 pixels for each.
    plain = text.encode("latin-1", "replace").decode("latin-1")
    lines = [part for line in plain.splitlines() for part in textwrap.wrap(line, max(8, width // 7))]
    head = 14 * len(lines) + MARGIN
    height = head + sum(max(image.height for image in row) + MARGIN for row in rows)
    page = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(page).multiline_text((MARGIN, 1), "\n".join(lines), fill="black", spacing=3)
    top = head
    for row in rows:
        left = MARGIN
        for image in row:
            page.paste(image, (left, top))
            left += image.width + MARGIN
        top += max(image.height for image in row) + MARGIN
    return page
