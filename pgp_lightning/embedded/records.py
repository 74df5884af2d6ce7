"""The embedded world as instruction records: what the shards of `data_manifests/embedded.yaml` are made of."""

from __future__ import annotations

import io
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from pgp_lightning.embedded.world import CANVAS, GRID, SPLITS, WORLD_VERSION, Question, Scene, draw_scene
from pgp_lightning.errors import ConfigError

__all__ = ["EmbeddedRecords"]

Family = Literal["objects", "counting", "reading"]
FAMILIES: dict[Family, tuple[str, ...]] = {
    "objects": ("color_of_shape", "shape_of_color", "char_in", "color_of_char"),
    "counting": ("count_color", "count_shape", "exists"),
    "reading": ("sign", "bar"),
}
_CANDIDATES = 16  # scenes that a record may choose from; one nearly always has enough questions of its family


class EmbeddedRecords:
    """Records of one family of questions: a scene and several of its questions as turns.

    Args:
        split: which scenes: train, val or test; scenes of different splits and families never coincide.
        family: objects (attributes of one object), counting (and existence), or reading (signs and bars).
        records: how many.
        turns: question turns of a record, of different types as far as the scene has them.

    Raises:
        ConfigError: if there is no such split or family, or a number is not positive.
    """

    def __init__(self, split: str, family: Family, records: int, turns: int = 4) -> None:
        if split not in SPLITS or family not in FAMILIES:
            raise ConfigError(
                f"expected a split among {', '.join(SPLITS)} and a family among {', '.join(get_args(Family))}, "
                f"got {split!r} and {family!r}"
            )
        if records < 1 or turns < 1:
            raise ConfigError(f"records and turns must be at least 1, got {records} and {turns}")
        self.split, self.family, self.records, self.turns = split, family, records, turns

    def __len__(self) -> int:
        return self.records

    def identity(self) -> dict[str, Any]:
        """Return all that the records depend on."""
        return {"world": WORLD_VERSION, **vars(self)}

    def __getitem__(self, index: int) -> tuple[str, bytes, str, dict[str, Any]]:
        """Return key, PNG, extension and record."""
        scene, chosen = self._choose(index)
        key = f"{self.split}-{self.family}-{index:06d}"
        picture = io.BytesIO()
        Image.fromarray(scene.image).save(picture, "PNG")
        turns = [
            {
                "question": question.text,
                "answer": question.answer,
                "type": question.type,
                "relevant": np.flatnonzero(scene.relevant(question)).tolist(),
            }
            for question in chosen
        ]
        # `relevant` counts the tokens of this world's own tiling; a guide that tiles otherwise leaves it out.
        record = {"id": key, "width": CANVAS, "height": CANVAS, "tokens": GRID.tokens, "turns": turns}
        return key, picture.getvalue(), "png", record

    def scene(self, index: int) -> Scene:
        """Draw the scene of a record again, with all that is known of it."""
        return self._choose(index)[0]

    def _choose(self, index: int) -> tuple[Scene, list[Question]]:
        """Take the first candidate scene with enough questions, and of these as many types as there are."""
        if not 0 <= index < self.records:
            raise IndexError(index)
        lane = list(FAMILIES).index(self.family)
        best: tuple[Scene, list[Question]] | None = None
        for candidate in range(_CANDIDATES):
            number = (index * _CANDIDATES + candidate) * len(FAMILIES) + lane
            scene = draw_scene(self.split, number)
            questions = [q for q in scene.questions if q.type in FAMILIES[self.family]]
            rng = np.random.default_rng([WORLD_VERSION, SPLITS[self.split], number, 1])
            by_type = [
                list(rng.permutation(np.array([q for q in questions if q.type == kind], dtype=object)))
                for kind in rng.permutation(FAMILIES[self.family])
            ]
            dealt = [q for depth in range(len(questions)) for group in by_type for q in group[depth : depth + 1]]
            if best is None or len(dealt) > len(best[1]):
                best = scene, dealt[: self.turns]
            if len(dealt) >= self.turns and all(by_type):
                break
        assert best is not None
        return best
