"""Stage one of the embedded pair: a vision tower that names colour, form and glyph at every visual token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import InternVLForConditionalGeneration

from pgp_lightning.embedded.stages import run_stage
from pgp_lightning.embedded.world import RULE, SPLITS, WORLD_VERSION, Scene
from pgp_lightning.vlm.internvl import InternVL
from pgp_lightning.vlm.tiles import cut_tiles

__all__ = ["scene_tiles", "shuffled_features", "train_tower"]

# Classes of the three labels, "nothing" included.
_CLASSES = (9, 14, 21)
_FORMS = 7  # labels of shapes and signs; a bar's height follows
_BAR_WEIGHT = 3.0


def scene_tiles(scene: Scene) -> Tensor:
    """Cut a scene as a user's picture would be: uint8 (5, 3, 128, 128)."""
    return torch.from_numpy(cut_tiles(Image.fromarray(scene.image), RULE)[0])


def shuffled_features(model: InternVLForConditionalGeneration, tiles: Tensor) -> Tensor:
    """Run the vision tower and pixel shuffle, before the projector: uint8 (T, 3, S, S) to (T, n, 4C)."""
    hidden = model.model.vision_tower(pixel_values=InternVL.normalise(tiles)).last_hidden_state[:, 1:]
    side = int(hidden.shape[1] ** 0.5)
    shuffled = model.model.pixel_shuffle(hidden.reshape(len(hidden), side, side, -1), 0.5)
    return torch.as_tensor(shuffled).flatten(1, 2)


class _Namer(nn.Module):
    """The tower with a small head for each label, thrown away afterwards."""

    def __init__(self, model: InternVLForConditionalGeneration) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        width = int(model.model.multi_modal_projector.layer_norm.weight.numel())
        self.trunk = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 128), nn.GELU())
        self.heads = nn.ModuleList(nn.Linear(128, classes) for classes in _CLASSES)


def train_tower(
    model: InternVLForConditionalGeneration, folder: Path, *, steps: int, seed: int, scenes_per_step: int = 6
) -> None:
    """Train the model's vision tower in place on crowded scenes with dense labels."""
    namer = _Namer(model)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        # Scenes of this stage are numbered through, so none is seen twice.
        numbers = range(step * scenes_per_step, (step + 1) * scenes_per_step)
        scenes = [
            Scene(np.random.default_rng([WORLD_VERSION, SPLITS["tower"], i]), crowded=i % 4 != 0) for i in numbers
        ]
        tiles = torch.cat([scene_tiles(scene) for scene in scenes])
        labels = torch.from_numpy(np.concatenate([scene.token_labels() for scene in scenes]))
        with torch.autocast("cpu", torch.bfloat16):
            hidden = namer.trunk(shuffled_features(model, tiles)).flatten(0, 1)
        # A bar's height is the one label that no token sees by itself: the letter below the bar has to look up.
        bar = labels[:, 1] > _FORMS
        weight = torch.where(labels.any(dim=1), 1.0, 0.1) + _BAR_WEIGHT * bar
        weight = weight / weight.sum()
        total, figures = torch.zeros(()), {}
        thumbnail = torch.arange(len(labels)) % 320 >= 256
        for name, head, target in zip(("colour", "form", "glyph"), namer.heads, labels.T, strict=True):
            logits = head(hidden.float())
            total = total + (functional.cross_entropy(logits, target, reduction="none") * weight).sum()
            hit = (logits.argmax(-1) == target).float()
            figures[name] = hit[(target > 0) & ~thumbnail].mean().item()
            figures[f"{name}_thumbnail"] = hit[(target > 0) & thumbnail].mean().item()
            if name == "form":
                figures["height"] = hit[bar & ~thumbnail].mean().item()
        return total, {"loss": total.item(), **figures}

    run_stage("tower", folder, namer, loss, steps=steps, learning_rate=2e-3, seed=seed)
