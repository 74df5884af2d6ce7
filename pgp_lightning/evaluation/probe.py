"""Do a guide's visual states V' carry the question? Measured before a training that depends on it.

A bottleneck scores visual token i by a posterior that it reads from V'_i, the guide's last hidden state at the visual
slot with the question in front of the image. It can rank tokens by the question only if V' differs with the question,
and not alike at every token.

Two measures. One needs no labels: for each image the analysis of variance of its (question x token) table of V'. One
needs data that says which tokens are relevant: a probe trained on the truth of half of the images, tested on the other
half, under the question itself and under another question of the same image.

What was measured on 400 test scenes of the embedded world (`data_manifests/embedded.yaml`, seed 0):

    guide                                   interaction   probe at 5 %   another question's V'   gap
    embedded:guide                              .130          .973               .204            .769
    embedded:pgp_seed0                          .215          .976               .196            .779
    embedded:guide_before_question_blind        .001          .343               .336            .006
    random weights                              .053          .370               .320            .050

A third measure was tried and left out: whether a token's state tells which of two questions was asked. Random weights
do well at it (.90; .96 and .55 for the two guides), for a shift that all tokens share tells it, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from pgp_lightning.data.collate import Batch
from pgp_lightning.data.loader import EvaluationLoader
from pgp_lightning.data.manifest import Manifest
from pgp_lightning.data.module import InstructionData
from pgp_lightning.data.writing import build_source
from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.probe_report import RATIOS, Findings, Recalls, verdict
from pgp_lightning.evaluation.scoring import Interval, paired_bootstrap
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.guides.probing import (
    chance_recall,
    jaccard,
    least_alike,
    sample_tokens,
    train_probe,
    variance_shares,
)
from pgp_lightning.selection import keep_top, recall
from pgp_lightning.vlm.loading import packaged

__all__ = ["probe_guide"]

QUESTIONS = 8  # of an image, the first different ones
TOKENS = 64  # of a question that the probe is trained on
TRAINING_ROWS = 2000  # questions whose states are kept for training the probe; with TOKENS and d it bounds the memory
LEAST_IMAGES = 8  # with known relevant tokens in each half, for the probe to be worth training


def probe_guide(
    guide: str,
    manifest: str = "data_manifests/embedded.yaml",
    split: str = "test",
    root: str | None = None,
    images: int = 400,
    max_tiles: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    seed: int = 0,
    steps: int = 1500,
) -> Findings:
    """Measure whether a guide's V' carry the question.

    One image at a time goes through the guide. Kept are at most 2,000 questions (or one of every image) x 64 tokens x d
    in the guide's dtype, for the probe: 460 MB in float32 at d = 896, and four times that while it is being trained.

    Args:
        guide: a base model, or an exported guide: `embedded:NAME`, a folder, or (a base) a repository on the hub.
        manifest: says where questions with images are.
        split: of the manifest.
        root: folder of the shards, in place of the manifest's.
        images: how many records to look at; those with at least two different questions are used.
        max_tiles: greatest number of tiles of an image, the thumbnail apart; by default the base model's.
        dtype: of the guide; by default bfloat16 with CUDA, else float32.
        seed: of the halves, the probe and the intervals.
        steps: of the probe's training.

    Raises:
        ConfigError: if there is no such guide, base, manifest or split, or no image with two questions.
        DataError: if shards are missing or damaged.
    """
    if images < 2:
        raise ConfigError(f"--images must be at least 2, one for each half, got {images}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    artefact = is_artefact(guide)
    sources = Manifest.load(manifest, root).sources(split)
    model = (
        PosteriorGuide.from_pretrained(guide, dtype=dtype)
        if artefact
        else PosteriorGuide(guide, lora_rank=0, dtype=dtype)
    )
    model = model.to(device).eval()
    for source in sources:
        build_source(source)
    data = InstructionData(manifest, model.vlm.base, turns="all", root=root, max_tiles=max_tiles, seed=seed)
    look = _Look(model, data.sample(split, images, batch_size=1), device, artefact, seed)
    measured = look.measure(steps)
    return Findings(guide, artefact, model.vlm.base, str(device), dtype, f"{manifest}, {split}", **measured)


def is_artefact(guide: str) -> bool:
    """Say whether a name is that of an exported guide, or of a base model.

    Raises:
        ConfigError: if the package has neither under that name, or a folder holds neither.
    """
    if not guide.startswith("embedded:"):
        folder = Path(guide)
        if folder.is_dir() and not any((folder / name).is_file() for name in ("guide.json", "config.json")):
            raise ConfigError(f"{guide} holds neither guide.json, as an exported guide, nor config.json, as a model")
        return (folder / "guide.json").is_file()
    reasons = []
    kinds: tuple[Literal["guides", "models"], ...] = ("guides", "models")
    for kind in kinds:
        try:
            packaged(guide, kind)
            return kind == "guides"
        except ConfigError as error:
            reasons.append(str(error))
    raise ConfigError("; ".join(reasons))


@dataclass
class _Image:
    """What the guide makes of one image: V' (Q, m, d) and scores (Q, m) where the guide is, the truth on the CPU."""

    number: int
    states: Tensor
    scores: Tensor
    relevant: Tensor | None


class _Look:
    """Goes through the images twice: to train the probe on one half, then to test it on the other."""

    def __init__(
        self, guide: PosteriorGuide, loader: EvaluationLoader, device: torch.device, artefact: bool, seed: int
    ) -> None:
        self.guide, self.loader, self.device, self.artefact, self.seed = guide, loader, device, artefact, seed
        generator = torch.Generator().manual_seed(seed)
        self.first_half = set(torch.randperm(len(loader), generator=generator)[: len(loader) // 2].tolist())
        self.shares: list[Tensor] = []
        self.questions = self.single = self.seen = 0
        self.recalls: dict[str, dict[float, list[float]]] = {}
        self.recalled: list[int] = []  # the image of each question in `recalls`
        self.overlap: dict[str, list[tuple[float, int]]] = {}

    def measure(self, steps: int) -> dict[str, Any]:
        """Return the fields of `Findings` that are measured."""
        probe = self._train(steps)
        for image in self._images(first_half=False):
            if probe is not None:
                self._recall(image, probe)
        if not self.shares:
            raise ConfigError(
                f"none of {len(self.loader)} records has two different questions about its image, without which "
                "nothing can be said: use a manifest with such records (turns), or raise --images"
            )
        left_out = {"with fewer than two different questions": self.single, "unusable": len(self.loader) - self.seen}
        shares = torch.stack(self.shares).mean(dim=0).tolist()
        recalls: Recalls = {
            name: {f"{ratio:g}": self._interval(values, self.recalled) for ratio, values in of.items()}
            for name, of in self.recalls.items()
            if len(set(self.recalled)) >= LEAST_IMAGES
        }
        carries, notes = verdict(shares[2], recalls)
        return {
            "images": len(self.shares),
            "questions": self.questions,
            "left_out": left_out,
            "shares": dict(zip(("token", "question", "interaction"), shares, strict=True)),
            "recalls": recalls,
            "overlap": {name: self._interval(*zip(*of, strict=True)) for name, of in self.overlap.items() if of},
            "carries": carries,
            "notes": notes,
        }

    @torch.no_grad()
    def _images(self, first_half: bool) -> Iterator[_Image]:
        """Yield the usable images of a half, and note what needs no probe."""
        console = Console(stderr=True)
        batches = track(
            enumerate(self.loader),
            f"V' of {'the first' if first_half else 'the other'} half",
            total=len(self.loader),
            console=console,
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        for number, batch in batches:
            if (number in self.first_half) != first_half:
                continue
            self.seen += 1
            rows = different(batch)
            if len(rows) < 2 or batch.request.grids[0].tokens < 2:
                self.single += 1
                continue
            image = self._read(number, batch.select(rows).to(self.device))
            self.questions += len(rows)
            self.shares.append(variance_shares(image.states))
            self._overlap(image)
            yield image

    def _read(self, number: int, batch: Batch) -> _Image:
        request = batch.request
        found = self.guide.bottleneck_pass(request, self.guide.visual_tokens(request))
        relevant = None if request.relevant is None else request.relevant.cpu()
        return _Image(number, found.states, found.divergence.cpu(), relevant)

    def _train(self, steps: int) -> nn.Module | None:
        """Train the probe on the first half; None if the truth of too few images is known."""
        generator = torch.Generator().manual_seed(self.seed)
        most = max(1, TRAINING_ROWS // max(1, len(self.first_half)))
        states, relevant, known = [], [], 0
        for image in self._images(first_half=True):
            rows = [] if image.relevant is None else image.relevant.any(dim=1).nonzero().flatten().tolist()[:most]
            if image.relevant is None or not rows:
                continue
            known += 1
            truth = image.relevant[rows]
            at = sample_tokens(truth, TOKENS, generator)
            chosen = image.states[rows].cpu()
            states.append(chosen.gather(1, at[..., None].expand(-1, -1, chosen.shape[-1])))
            relevant.append(truth.gather(1, at))
        if known < LEAST_IMAGES:
            return None
        sample = torch.cat(states)
        # Channels of large models differ in scale by orders of magnitude.
        flat = sample.flatten(0, 1).float()
        scale = _Standardise(flat.mean(dim=0), flat.std(dim=0).clamp_min(1e-6))
        probe = train_probe(scale(sample.float()).to(sample.dtype), torch.cat(relevant), steps, self.seed, self.device)
        return nn.Sequential(scale.to(self.device), probe)

    @torch.no_grad()
    def _recall(self, image: _Image, probe: nn.Module) -> None:
        """Note recalls of an image of the second half, if it has two questions whose relevant tokens differ."""
        if image.relevant is None:
            return
        rows = image.relevant.any(dim=1).nonzero().flatten()
        truth = image.relevant[rows]
        if len(truth.unique(dim=0)) < 2:
            return
        other = least_alike(truth)
        found = {"probe": probe(image.states[rows.to(self.device)].float()).squeeze(-1).cpu()}
        if self.artefact:
            found["scores"] = image.scores[rows]
        for name, scores in found.items():
            for ratio in RATIOS:
                own, others = recall(scores, truth, ratio), recall(scores[other], truth, ratio)
                self._note(name, ratio, own)
                self._note(f"{name}, another question", ratio, others)
                if name == "probe":
                    self._note("difference", ratio, own - others)
                    self._note("random", ratio, chance_recall(truth, ratio))
        self.recalled += [image.number] * len(rows)

    def _note(self, name: str, ratio: float, values: Tensor) -> None:
        self.recalls.setdefault(name, {}).setdefault(ratio, []).extend(values.tolist())

    def _overlap(self, image: _Image) -> None:
        """Note how alike the answers to all pairs of an image's questions are."""
        if not self.artefact:
            return
        first, second = torch.triu_indices(len(image.scores), len(image.scores), offset=1)
        masks = {"the guide's top 5 %": keep_top(image.scores, RATIOS[0])}
        if image.relevant is not None:
            known = image.relevant.any(dim=1)
            both = known[first] & known[second]
            first, second = first[both], second[both]
            masks["the relevant tokens"] = image.relevant
        for name, mask in masks.items():
            of_pairs = jaccard(mask[first], mask[second]).tolist()
            self.overlap.setdefault(name, []).extend((value, image.number) for value in of_pairs)

    def _interval(self, values: Sequence[float], images: Sequence[int]) -> Interval:
        return paired_bootstrap(values, images, seed=self.seed)


class _Standardise(nn.Module):
    """Subtracts a mean (d,) and divides by a deviation (d,)."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, states: Tensor) -> Tensor:
        """Return the states (..., d), standardised."""
        standardised: Tensor = (states - self.mean) / self.deviation
        return standardised


def different(batch: Batch) -> list[int]:
    """Return the rows of the first different questions of a batch of one image, at most `QUESTIONS`."""
    first = {question: row for row, question in reversed(list(enumerate(batch.request.questions)))}
    return sorted(first.values())[:QUESTIONS]
