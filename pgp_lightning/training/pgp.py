"""Training of posterior-guided pruning: the two-pass step as a LightningModule (Fig. 2, Eq. 5)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pgp_lightning.bottleneck import Posterior
from pgp_lightning.data.collate import Batch
from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.guides.posterior import BottleneckPass, PosteriorGuide, Reconstruction, Subset
from pgp_lightning.objective import Average, divergence_loss, objective, reconstruction_loss
from pgp_lightning.selection import recall
from pgp_lightning.training.means import Means
from pgp_lightning.training.sharded import gathers_for, shard_guide

__all__ = ["PGP", "StepRecord"]

RATIOS = (5, 11, 20)
# Streams of random numbers that must not be the same ones.
_NOISE, _SUBSET, _BLIND, _CONTROL = range(4)


class StepRecord(NamedTuple):
    """What callbacks may look at after a step; detached."""

    batch: Batch
    divergence: Tensor
    """float32 (B, m)."""
    mask: Tensor
    """bool (B, m)."""
    posterior: Posterior
    visual: Tensor
    """V, (B, m, d)."""
    states: Tensor
    """V', (B, m, d)."""
    latents: Tensor
    """Z, (B, m, d)."""


class PGP(pl.LightningModule):
    """Trains a posterior guide.

    Args:
        guide: small VLM, adapter and bottleneck.
        learning_rate: peak of AdamW's warm-up and cosine schedule.
        weight_decay: on matrices only; biases, norms and the prior are left alone.
        warmup_fraction: share of the optimiser steps in which the learning rate rises.
        final_fraction: share of the peak at which the cosine ends.
        average: how the reconstruction term is averaged: over the micro-batch's tokens, over samples, or with
            InternVL2.5's square weighting; sets the effective beta.
        visual_token_share: share of each sample's visual tokens, drawn at random, that takes part in both passes
            of a training step (1 is the paper's; less is cheaper). Validation always uses all.
        question_blind: share of steps whose second pass leaves the question out (ours; 0 is the paper's).
        seed: key of the latents' noise and of token subsets, with each sample's place in the data order.
    """

    def __init__(
        self,
        guide: PosteriorGuide,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.01,
        warmup_fraction: float = 0.03,
        final_fraction: float = 0.05,
        average: Average = "token",
        visual_token_share: float = 1.0,
        question_blind: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        shares = {
            "warmup_fraction": warmup_fraction,
            "final_fraction": final_fraction,
            "question_blind": question_blind,
        }
        for name, value in {**shares, "visual_token_share": visual_token_share}.items():
            if not 0 <= value <= 1 or (name == "visual_token_share" and value == 0):
                raise ConfigError(f"model.{name} must be a share in [0, 1] that leaves something, got {value}")
        if not 0 < learning_rate < math.inf:
            raise ConfigError(f"model.learning_rate must be positive, got {learning_rate}")
        if not 0 <= weight_decay < math.inf:
            raise ConfigError(f"model.weight_decay must be at least 0, got {weight_decay}")
        self.guide = guide
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup_fraction, self.final_fraction = warmup_fraction, final_fraction
        self.average: Average = average
        self.visual_token_share, self.question_blind, self.seed = visual_token_share, question_blind, seed
        self.beta: float | None = None
        self.last: StepRecord | None = None
        self.passes_ended: float | None = None
        self.means = torch.nn.ModuleDict()
        # Checkpoints hold what is trained; the frozen base comes from where it came from.
        self.strict_loading = False

    def setup(self, stage: str) -> None:
        """Prepare the means and check that data and guide tile alike.

        Raises:
            ConfigError: if the data was prepared for another model.
        """
        data = getattr(self.trainer, "datamodule", None)
        reader = getattr(data, "reader", None)
        if reader is not None and reader.processor.rule != self.guide.vlm.processor.rule:
            raise ConfigError(
                f"data.base and the guide's base must tile alike: {reader.processor.rule} and "
                f"{self.guide.vlm.processor.rule}; set both to the same model"
            )
        for split in ("train", "val", "test"):
            sources = data.source_names(split) if data is not None else []
            tags = ["loss", "kl", "reconstruction", "beta"]
            tags += [f"{term}/{source}" for term in ("kl", "reconstruction") for source in sources]
            if split != "train":
                tags += ["reconstruction_accuracy", *(f"recall@{p}" for p in RATIOS)]
            if split == "test":
                tags += [f"recall@{p}/{control}" for p in RATIOS for control in ("another_question", "random")]
            self.means[f"{split}_means"] = Means(tags)

    def configure_model(self) -> None:
        """Deal the weights to the processes, where the strategy leaves that to the module (FSDP2)."""
        if isinstance(strategy := self.trainer.strategy, ModelParallelStrategy):
            shard_guide(self.guide, strategy.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Let the guide reach its prior, which its divergence reads outside of the bottleneck's forward pass."""
        bottleneck = self.guide.bottleneck
        gathers_for(self.guide, [bottleneck.prior_mean, bottleneck.prior_log_variance])

    # The two passes

    def passes(self, batch: Batch, subset: Subset | None, blind: bool) -> tuple[BottleneckPass, Reconstruction]:
        """Run both passes on a batch and keep what callbacks look at in `last`."""
        request, guide = batch.request, self.guide
        visual = guide.visual_tokens(request)
        found = guide.bottleneck_pass(request, visual, subset)
        noise = self._noise(batch, found, subset)
        latents = guide.bottleneck.sample(found.posterior, noise)
        predicted = guide.reconstruction_pass(request, batch.answers, latents, subset, blind)
        if subset is not None:
            visual = visual.gather(1, subset.kept[..., None].expand(-1, -1, visual.shape[-1]))
        posterior = Posterior(*(part.detach() for part in found.posterior))
        self.last = StepRecord(
            batch, found.divergence.detach(), found.mask, posterior, visual, found.states.detach(), latents.detach()
        )
        return found, predicted

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch (Eq. 5).

        Raises:
            DataError: if the loss is not finite; names the samples.
        """
        if self.beta is None:
            raise ConfigError("nothing sets beta: add BetaAnnealing to trainer.callbacks")
        blind = self.question_blind > 0 and self._rng(_BLIND, self.global_step).random() < self.question_blind
        found, predicted = self.passes(batch, self._subset(batch), blind)
        reconstruction = reconstruction_loss(*predicted, self.average)
        divergence = divergence_loss(found.divergence, found.mask)
        loss = objective(reconstruction, divergence, self.beta)
        if not torch.isfinite(loss):
            raise DataError(
                f"the loss is {loss.item()} at optimiser step {self.global_step} on rank {self.global_rank} "
                f"(reconstruction {reconstruction.item()}, KL {divergence.item()}) on samples {batch.described()}: "
                "look at them, or lower model.learning_rate or set trainer.gradient_clip_val"
            )
        # The loss was looked at, so a GPU has ended, too; what follows may wait for other processes.
        self.passes_ended = time.perf_counter()
        self._account("train", batch, found, predicted, {"loss": loss, "reconstruction": reconstruction})
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            # Means over the micro-batches of an optimiser step; checkpoints lie between steps, so none is lost.
            self._log("train", on_step=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Account for a batch with all its visual tokens."""
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the means."""
        self._log("val", on_step=False)

    def on_test_start(self) -> None:
        """Refuse what would wait for ever: processes that call a sharded guide for some batches only.

        Raises:
            ConfigError: if the strategy shards the weights.
        """
        strategy = self.trainer.strategy
        sharded = isinstance(strategy, ModelParallelStrategy) or bool(getattr(strategy, "zero_stage_3", False))
        if sharded and self.trainer.world_size > 1:
            raise ConfigError(
                f"{type(strategy).__name__} shards the weights, which `lightning test` cannot use: test with "
                "--trainer.strategy auto on one device, or with ddp"
            )

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Account for a batch, beside random importance and the importance under another image's question."""
        importance = self._evaluate("test", batch)
        relevant = batch.request.relevant
        if relevant is None:
            return
        request = batch.request
        order = [
            next((i for k in range(1, len(batch)) if request.images[i := (b + k) % len(batch)] != image), None)
            for b, image in enumerate(request.images)
        ]
        if None not in order:
            questions = [request.questions[i] for i in order if i is not None]
            other = self.guide(replace(request, questions=questions, relevant=None, other_questions=None))
            self._recall("test", other, relevant, "/another_question")
        padding = importance.isinf()
        random = [torch.from_numpy(self._rng(_CONTROL, i, t).random(padding.shape[1])) for i, t in self._keys(batch)]
        scores = torch.stack(random).to(importance).masked_fill(padding, -torch.inf)
        self._recall("test", scores, relevant, "/random")

    def on_test_epoch_end(self) -> None:
        """Log the means."""
        self._log("test", on_step=False)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Return the keys and the importance (B, M) of a batch."""
        return {"keys": batch.keys, "turns": batch.turns, "importance": self.guide(batch.request).cpu()}

    def _evaluate(self, split: str, batch: Batch) -> Tensor:
        found, predicted = self.passes(batch, None, blind=False)
        terms = {"reconstruction": reconstruction_loss(*predicted, self.average)}
        if self.beta is not None:  # nobody sets it for `lightning test`: then there is no objective either
            terms["loss"] = objective(terms["reconstruction"], divergence_loss(found.divergence, found.mask), self.beta)
        self._account(split, batch, found, predicted, terms)
        self._means(split).update("reconstruction_accuracy", predicted.right(len(batch)).float())
        importance = found.divergence.masked_fill(~found.mask, -torch.inf)
        if batch.request.relevant is not None:
            self._recall(split, importance, batch.request.relevant, "")
        return importance

    def _recall(self, split: str, importance: Tensor, relevant: Tensor, suffix: str) -> None:
        for p in RATIOS:
            values = recall(importance, relevant, p / 100)
            self._means(split).update(f"recall@{p}{suffix}", values[~values.isnan()])

    # Means and logging

    def _means(self, split: str) -> Means:
        means = self.means[f"{split}_means"]
        assert isinstance(means, Means)
        return means

    def _account(
        self,
        split: str,
        batch: Batch,
        found: BottleneckPass,
        predicted: Reconstruction,
        terms: dict[str, Tensor],
    ) -> None:
        """Take a batch into the means; by source, KL is a mean over samples, the reconstruction over tokens."""
        means = self._means(split)
        divergence = found.divergence.detach().masked_fill(~found.mask, 0).sum(dim=1) / found.mask.sum(dim=1)
        tokens = torch.nn.functional.cross_entropy(predicted.logits.detach(), predicted.targets, reduction="none")
        for term, value in terms.items():
            means.update(term, value)
        if self.beta is not None:
            means.update("beta", torch.tensor(self.beta, device=self.device))
        means.update("kl", divergence)
        for tag in means.tags:
            term, _, source = tag.partition("/")
            if term in ("kl", "reconstruction") and source:
                mine = torch.tensor([name == source for name in batch.sources], device=self.device)
                means.update(tag, divergence[mine] if term == "kl" else tokens[mine[predicted.rows]])

    def _log(self, split: str, on_step: bool) -> None:
        for tag, value in self._means(split).compute().items():
            # Summed over ranks already: nothing is left to synchronise.
            self.log(f"{split}/{tag}", value, on_step=on_step, on_epoch=not on_step, prog_bar=tag in ("loss", "kl"))

    # Random numbers, keyed by sample

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    @staticmethod
    def _keys(batch: Batch) -> list[tuple[int, int]]:
        return list(zip(batch.indices, batch.turns, strict=True))

    def _generator(self, stream: int, index: int, turn: int, device: torch.device) -> torch.Generator:
        """Return a generator that depends on the sample alone, not on batch, rank or step."""
        state = np.random.SeedSequence([self.seed, stream, index, turn]).generate_state(2)
        return torch.Generator(device).manual_seed(int(state[0]) << 31 ^ int(state[1]))

    def _subset(self, batch: Batch) -> Subset | None:
        if self.visual_token_share == 1:
            return None
        kept = []
        for (index, turn), count in zip(self._keys(batch), batch.request.counts, strict=True):
            generator = self._generator(_SUBSET, index, turn, torch.device("cpu"))
            size = max(1, round(self.visual_token_share * count))
            kept.append(torch.randperm(count, generator=generator)[:size].sort().values)
        mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in kept], batch_first=True)
        device = batch.request.tiles.device
        return Subset(pad_sequence(kept, batch_first=True).to(device), mask.to(device))

    def _noise(self, batch: Batch, found: BottleneckPass, subset: Subset | None) -> Tensor:
        """Draw epsilon (B, m, d): that of a visual token is the same whichever others take part."""
        device, width = found.divergence.device, found.states.shape[-1]
        rows = [
            torch.randn(count, width, device=device, generator=self._generator(_NOISE, index, turn, device))
            for (index, turn), count in zip(self._keys(batch), batch.request.counts, strict=True)
        ]
        if subset is not None:
            rows = [row[kept[mask]] for row, kept, mask in zip(rows, subset.kept, subset.mask, strict=True)]
        return pad_sequence(rows, batch_first=True)

    # Optimiser and checkpoints

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, decay on matrices only, linear warm-up and cosine over the optimiser steps."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, fused=self.device.type == "cuda")
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(self.warmup_fraction * total)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
            return self.final_fraction + (1 - self.final_fraction) * cosine

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trainable weights only, and which base they belong to."""
        kept = {f"guide.{name}" for name in self.guide.trainable()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["base_fingerprint"] = self.guide.base_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model.

        Raises:
            ConfigError: says what differs.
        """
        found = checkpoint.get("base_fingerprint")
        if found != self.guide.base_fingerprint:
            raise ConfigError(
                f"the checkpoint is of another base model (fingerprint {found}, here {self.guide.base_fingerprint}): "
                "set model.guide.base to the one it was trained on"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Load trainable weights; all of them must be there, and no others but frozen ones (DeepSpeed adds tied ones).

        Raises:
            ConfigError: names the first weights that are missing, too many or of another shape.
        """
        own = {f"guide.{name}": tuple(value.shape) for name, value in self.guide.trainable().items()}
        given = {name: tuple(value.shape) for name, value in state_dict.items()}
        frozen = self.state_dict().keys() - own.keys()
        wrong = sorted({name for name, _ in own.items() ^ given.items()} - frozen)
        if wrong:
            raise ConfigError(
                f"the checkpoint's weights are not this guide's: {', '.join(wrong[:3])} and {max(0, len(wrong) - 3)} "
                "more are missing, unknown or of another shape; use the adapter and bottleneck options it had"
            )
        kept = {name: value for name, value in state_dict.items() if name not in frozen}
        return super().load_state_dict(kept, strict=False, assign=assign)
