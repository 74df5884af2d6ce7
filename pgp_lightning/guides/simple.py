"""Controls: guides without a model, which say what a method's figures are worth.

Random and uniform are what a guide has to beat, the oracle is what it cannot, and another question's scores show how
much of a guide is about the question.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pgp_lightning.errors import ConfigError
from pgp_lightning.guides.base import Guide
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import TileGrid

__all__ = ["AnotherQuestion", "OracleGuide", "RandomGuide", "UniformGuide"]


class RandomGuide(Guide):
    """Uniform random importance, the same whenever it is asked: a function of seed, question and image.

    So it does not depend on the batch a question is in, and methods are compared on the same tokens.

    Args:
        seed: draws others.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, request: Request) -> Tensor:
        """Return importance in [0, 1): float32 (B, M), -inf on padding."""
        tiles = request.tiles.cpu().split([grid.tiles for grid in request.grids])
        images = [hashlib.sha256(part.contiguous().numpy().tobytes()).digest() for part in tiles]
        rows = []
        for question, image, count in zip(request.questions, request.images, request.counts, strict=True):
            digest = hashlib.sha256(f"{self.seed} {question} ".encode() + images[image]).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            rows.append(torch.rand(count, generator=generator))
        return _pad(rows, request)


class UniformGuide(Guide):
    """A uniform grid: the top k, for every k, is spread over the image whatever it shows.

    Tiles take turns, the thumbnail last, so that their numbers of kept tokens differ by at most one; all of them give
    the same cell at the same turn, so that a whole number of turns is one regular pattern over the image. Cells of a
    tile, and tiles of a turn, come in farthest-point order (`_spread`).
    """

    def forward(self, request: Request) -> Tensor:
        """Return importance in (0, 1]: float32 (B, M), -inf on padding."""
        return _pad([_uniform(request.grids[image]) for image in request.images], request)


class OracleGuide(Guide):
    """The relevant tokens first, where the truth is known, the others in a `RandomGuide`'s order.

    Args:
        seed: of the random order.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.random = RandomGuide(seed)

    def forward(self, request: Request) -> Tensor:
        """Return importance: float32 (B, M), at least 1 on relevant tokens, below 1 on others, -inf on padding.

        Raises:
            ConfigError: if the request does not say which tokens are relevant, or of another number of tokens.
        """
        if request.relevant is None:
            raise ConfigError("the oracle needs request.relevant: use data that says which tokens are relevant")
        importance: Tensor = self.random(request)
        if request.relevant.shape != importance.shape:
            raise ConfigError(
                f"request.relevant must be {tuple(importance.shape)}, one value a visual token, "
                f"got {tuple(request.relevant.shape)}"
            )
        return importance + request.relevant.to(importance.device, importance.dtype)


class AnotherQuestion(Guide):
    """Asks a guide about the same image with a question about another one: what stays is not about the question.

    Args:
        guide: asked with `request.other_questions`; it is not told which tokens are relevant.
    """

    def __init__(self, guide: Guide) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, request: Request) -> Tensor:
        """Return the guide's importance: float32 (B, M), -inf on padding.

        Raises:
            ConfigError: if the request has no other questions, or not one for each of its own.
        """
        others = request.other_questions
        if others is None or len(others) != len(request):
            found = "none" if others is None else f"{len(others)} of them"
            raise ConfigError(f"request.other_questions must hold {len(request)} questions, got {found}")
        importance: Tensor = self.guide(replace(request, questions=others, relevant=None, other_questions=None))
        return importance


def _pad(rows: list[Tensor], request: Request) -> Tensor:
    """Put rows of importance (M_b,) into a batch on the request's device."""
    return pad_sequence(rows, batch_first=True, padding_value=-torch.inf).to(request.tiles.device)


@lru_cache(maxsize=256)
def _uniform(grid: TileGrid) -> Tensor:
    """Return the uniform grid's importance for an image: float32 (M,)."""
    turns = _spread(grid.tokens_per_side, grid.tokens_per_side)
    tiles = _spread(grid.rows, grid.columns)
    if grid.thumbnail:
        tiles = torch.cat([tiles, tiles.new_tensor([len(tiles)])])
    order = (tiles * len(turns) + turns[:, None]).flatten()
    importance = torch.empty(grid.tokens)
    importance[order] = 1 - torch.arange(grid.tokens) / grid.tokens
    return importance


@lru_cache(maxsize=256)
def _spread(rows: int, columns: int) -> Tensor:
    """Order the cells of a raster so that the first k, for every k, lie evenly: int64 (rows * columns,).

    Farthest-point order: the next cell is the one farthest from all before it, which keeps the least distance of the
    first k within a factor of two of the best there is for k. Of equally far ones it is the one with the least sum of
    1 / distance² to those before, or raster order would fill the top first. Distances are those of a torus: else
    corners and edges came first. It starts a third in from each side, where each finer grid that follows from it is
    nearly centred. With a side that is a power of two, 4, 16, 64, ... cells are regular grids.
    """
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], dim=1)
    apart = (places[:, None] - places).abs()
    squares = torch.minimum(apart, torch.tensor([rows, columns]) - apart).square().sum(dim=2)
    nearest = torch.full((len(places),), rows**2 + columns**2)
    crowding = torch.zeros(len(places), dtype=torch.float64)
    order, cell = list[int](), rows // 3 * columns + columns // 3
    for _ in range(len(places)):
        order.append(cell)
        nearest = torch.minimum(nearest, squares[cell])
        # Rounded, so that equal sums in another order stay equal and the lower cell wins everywhere.
        crowding += 1 / squares[cell].clamp(min=1)
        farthest = (nearest == nearest.max()).nonzero().flatten()
        cell = int(farthest[crowding[farthest].round(decimals=9).argmin()])
    return torch.tensor(order)
