"""A control of the embedded world: every object is in sight, whichever of them the question is about.

What a perfect detector of objects recalls is the least that a guide has to beat before its map can be said to be about
the question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache

import torch
from PIL import Image
from torch import Tensor

from pgp_lightning.data.manifest import Manifest, Source
from pgp_lightning.data.writing import make_builder
from pgp_lightning.embedded.records import EmbeddedRecords, Family
from pgp_lightning.embedded.world import GRID, RELEVANT_SHARE, RULE, per_token
from pgp_lightning.errors import ConfigError
from pgp_lightning.guides.base import Guide
from pgp_lightning.guides.simple import RandomGuide
from pgp_lightning.vlm.request import Request

__all__ = ["ObjectMap"]


class ObjectMap(Guide):
    """The tokens that show objects, signs or bars first, the others after them, each in a `RandomGuide`'s order.

    A request does not say what its picture shows, so the scenes are drawn again (at first use, some ten milliseconds
    each) and found by their tiles.

    Args:
        manifest: a YAML file with sources that `EmbeddedRecords` builds; others in it are not looked at.
        split: the split that is asked about.
        seed: of the random order.

    Raises:
        ConfigError: if there is no such manifest, split or source.
    """

    def __init__(self, manifest: str = "data_manifests/embedded.yaml", split: str = "test", seed: int = 0) -> None:
        super().__init__()
        self.manifest, self.split = manifest, split
        self.random = RandomGuide(seed)
        # Arguments, not scenes: two maps of the same scenes are alike (evaluation/resume.py) and share the drawn ones.
        builders = [make_builder(source) for source in Manifest.load(manifest).sources(split) if _is_ours(source)]
        self._sources = tuple(
            (one.split, one.family, one.records, one.turns) for one in builders if isinstance(one, EmbeddedRecords)
        )
        if not self._sources:
            raise ConfigError(
                f"{manifest}: no source of split {split!r} is built by {_OURS}, so nothing says what its pictures show"
            )

    def forward(self, request: Request) -> Tensor:
        """Return importance: float32 (B, M), at least 1 on tokens that show an entity, below 1 on others.

        Raises:
            ConfigError: if a picture is none of the split's, or was tiled otherwise.
        """
        importance: Tensor = self.random(request)
        return importance + self.objects(request).to(importance.dtype)

    def objects(self, request: Request) -> Tensor:
        """Return which visual tokens show an entity, by the measure of relevant ones: bool (B, M).

        Raises:
            ConfigError: if a picture is none of the split's, or was tiled otherwise.
        """
        tiles = request.tiles.cpu().split([grid.tiles for grid in request.grids])
        # Images that no question is about any more may be of any kind.
        found = {image: self._shown(tiles[image], request, image) for image in set(request.images)}
        # Every picture that is found has the world's own grid, so there is no padding.
        return torch.stack([found[image] for image in request.images]).to(request.tiles.device)

    def _shown(self, tiles: Tensor, request: Request, image: int) -> Tensor:
        digest = _digest(tiles)
        shown = next((known[digest] for known in map(_scenes, self._sources) if digest in known), None)
        if shown is None or request.grids[image] != GRID:
            asked = request.questions[request.images.index(image)]
            raise ConfigError(
                f"the picture that {asked!r} is asked about is no scene of split {self.split!r} of {self.manifest} in "
                f"{GRID.tiles} tiles of {RULE.tile_size} pixels with {RULE.tokens_per_side**2} tokens each: give the "
                "object map the manifest and split that are evaluated, and tile by embedded:guide"
            )
        return shown


_OURS = f"{EmbeddedRecords.__module__}.{EmbeddedRecords.__qualname__}"


def _is_ours(source: Source) -> bool:
    # By name, so that no other source's builder is constructed.
    return source.build is not None and source.build.class_path == _OURS


@cache
def _scenes(source: tuple[str, Family, int, int]) -> Mapping[bytes, Tensor]:
    """Draw a source's scenes: tiles' hash to which tokens show an entity, bool (320,)."""
    records = EmbeddedRecords(*source)
    known = {}
    for index in range(len(records)):
        scene = records.scene(index)
        tiles, _ = RULE.cut(Image.fromarray(scene.image))
        known[_digest(torch.from_numpy(tiles))] = torch.from_numpy(
            per_token(scene.owner >= 0).mean(axis=1) >= RELEVANT_SHARE
        )
    return known


def _digest(tiles: Tensor) -> bytes:
    """Hash the tiles of one picture, uint8 (T, 3, S, S)."""
    return hashlib.sha256(tiles.contiguous().numpy().tobytes()).digest()
