"""From a training checkpoint to the guide artefact, and the proof that both score alike."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from pgp_lightning.data.collate import Batch
from pgp_lightning.data.module import InstructionData
from pgp_lightning.errors import ConfigError
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.training.run import RECORD, last_checkpoint, read_checkpoint

__all__ = ["export_guide", "load_guide", "verify_guide"]


def load_guide(source: Path) -> tuple[PosteriorGuide, dict[str, Any]]:
    """Rebuild the guide of a checkpoint, in evaluation mode.

    Args:
        source: a run's folder (its last checkpoint is taken) or a checkpoint file.

    Returns:
        The guide, and the checkpoint without its weights.

    Raises:
        ConfigError: if there is no checkpoint, or it was not written by `lightning fit` on a posterior guide.
    """
    path = last_checkpoint(source) if source.is_dir() and source.suffix != ".ckpt" else source
    if not path.exists():
        raise ConfigError(f"expected a run's folder or a checkpoint file, found nothing at {source}")
    checkpoint = read_checkpoint(path)
    try:
        arguments = checkpoint[RECORD]["config"]["model"]["init_args"]["guide"]["init_args"]
        fingerprint = checkpoint["base_fingerprint"]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a checkpoint of `lightning fit` with a posterior guide: no {error}"
        ) from error
    guide = PosteriorGuide(**arguments)
    if guide.base_fingerprint != fingerprint:
        raise ConfigError(f"{path} was trained on another base than {arguments['base']!r} is now")
    weights = {name.removeprefix("guide."): value for name, value in checkpoint.pop("state_dict").items()}
    if weights.keys() != guide.trainable().keys():
        raise ConfigError(
            f"{path} does not hold the weights of this guide: {sorted(weights.keys() ^ guide.trainable().keys())[:3]}"
        )
    guide.load_state_dict(weights, strict=False)
    return guide.eval(), checkpoint


def export_guide(source: Path, folder: Path) -> PosteriorGuide:
    """Write the artefact of a run's guide; a folder that is there is complete.

    Args:
        source: a run's folder or a checkpoint file.
        folder: must not exist.

    Returns:
        The guide, as trained.

    Raises:
        ConfigError: if the folder exists or the source is no run of a posterior guide.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists: choose another folder, or remove it")
    guide, checkpoint = load_guide(source)
    data = checkpoint[RECORD]["config"].get("data", {}).get("init_args", {})
    summary = {"optimiser_steps": checkpoint["global_step"], "manifest": data.get("manifest"), "seed": data.get("seed")}
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        guide.save_pretrained(part, summary)
        part.chmod(0o755)  # mkdtemp's folders are private
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return guide


def verify_guide(source: Path, folder: Path, records: int = 16) -> tuple[int, float]:
    """Compare a checkpoint's scores with the artefact's on the run's own data, of validation if there is some.

    Returns:
        The number of scores compared and their greatest difference.

    Raises:
        ConfigError: if either cannot be loaded.
    """
    trained, checkpoint = load_guide(source)
    exported = PosteriorGuide.from_pretrained(folder)
    data, split = _recorded_data(checkpoint)
    data.prepare_data()
    compared, worst = 0, 0.0
    batch: Batch
    for batch in data.sample(split, records):
        ours, theirs = trained(batch.request), exported(batch.request)
        real = torch.isfinite(ours)
        if not torch.equal(real, torch.isfinite(theirs)):
            raise ConfigError(f"{folder} scores other visual tokens than {source}")
        compared += int(real.sum())
        worst = max(worst, float((ours[real] - theirs[real]).abs().max()))
    return compared, worst


def _recorded_data(checkpoint: dict[str, Any]) -> tuple[InstructionData, str]:
    """Return the data of a checkpoint's run, and the split to look at."""
    # Whoever made the checkpoint may not decide that shell commands run here.
    data = InstructionData(**{**checkpoint[RECORD]["config"]["data"]["init_args"], "allow_pipe": False})
    return data, "val" if "val" in data.read_manifest().splits else "train"
