"""Scenes as the language stages read them: frozen-tower features, token labels and tokenised questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from transformers import InternVLForConditionalGeneration

from pgp_lightning.embedded.tower import scene_tiles, shuffled_features
from pgp_lightning.embedded.world import GRID, TYPES, draw_scene
from pgp_lightning.vlm.processor import Processor

__all__ = ["Corpus", "Item", "pick"]


@dataclass(frozen=True)
class Item:
    """One question of a scene: index of its type, token ids, and the visual tokens that matter (bool (320,))."""

    type: int
    question: list[int]
    answer: list[int]
    relevant: np.ndarray


class Corpus:
    """The first `count` scenes of a split.

    The tower is frozen from its own stage on, so its output is computed once and kept in a file: float16
    (count, 320, 256), with `labels` int8 (count, 320, 3) and `items`, the questions of each scene.

    Args:
        split: which scenes.
        count: how many.
        folder: where the features are kept.
        model: holds the trained tower.
        processor: tokenises.
    """

    def __init__(
        self, split: str, count: int, folder: Path, model: InternVLForConditionalGeneration, processor: Processor
    ) -> None:
        path = folder / f"features_{split}_{count}.npy"
        shape = (count, GRID.tokens, int(model.model.multi_modal_projector.layer_norm.weight.numel()))
        cached = path.exists()
        part = path.with_suffix(".part")
        features = None if cached else np.lib.format.open_memmap(part, "w+", np.float16, shape)
        self.labels = np.zeros((count, GRID.tokens, 3), dtype=np.int8)
        self.items: list[list[Item]] = []
        words: dict[str, list[int]] = {}

        def encode(text: str) -> list[int]:
            if text not in words:
                words[text] = processor.encode(text)
            return words[text]

        for first in track(range(0, count, 16), description=f"scenes of {split}"):
            scenes = [draw_scene(split, i) for i in range(first, min(first + 16, count))]
            for i, scene in enumerate(scenes, start=first):
                self.labels[i] = scene.token_labels()
                self.items.append(
                    [
                        Item(TYPES.index(q.type), encode(q.text), encode(f"{q.answer}<|im_end|>"), scene.relevant(q))
                        for q in scene.questions
                    ]
                )
            if features is not None:
                tiles = torch.cat([scene_tiles(scene) for scene in scenes])
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    hidden = shuffled_features(model, tiles).unflatten(0, (len(scenes), -1)).flatten(1, 2)
                features[first : first + len(scenes)] = hidden.half().numpy()
        if features is not None:
            features.flush()
            part.rename(path)
        self.features = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.items)


def pick(
    items: list[Item], count: int, rng: np.random.Generator, weights: dict[int, float] | None = None
) -> list[Item]:
    """Draw up to `count` different questions of a scene, types first, so that rare types are as frequent as common.

    Args:
        items: the scene's questions.
        count: how many to draw.
        rng: draws.
        weights: how much likelier than the others some types are.
    """
    by_type: dict[int, list[Item]] = {}
    for item in items:
        by_type.setdefault(item.type, []).append(item)
    chosen: list[Item] = []
    while len(chosen) < count and by_type:
        kinds = list(by_type)
        if weights:
            share = np.array([weights.get(kind, 1.0) for kind in kinds])
            kind = kinds[int(rng.choice(len(kinds), p=share / share.sum()))]
        else:
            kind = kinds[int(rng.integers(len(kinds)))]
        chosen.append(by_type[kind].pop(int(rng.integers(len(by_type[kind])))))
        if not by_type[kind]:
            del by_type[kind]
    return chosen
