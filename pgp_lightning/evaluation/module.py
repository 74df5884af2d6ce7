"""Pruned answers under `lightning test`, and importance maps to shards under `lightning predict`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import webdataset
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from pgp_lightning.data.collate import Batch
from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.scoring import HALF_MAX, exact_match
from pgp_lightning.prefill import Pruner, pruned
from pgp_lightning.training.means import Means
from pgp_lightning.vlm.family import Attention
from pgp_lightning.vlm.inputs import generate, prompt_inputs, read_answers
from pgp_lightning.vlm.loading import load_vlm
from pgp_lightning.vlm.processor import PromptOrder

__all__ = ["ImportanceShards", "PrunedAnswers"]


class PrunedAnswers(pl.LightningModule):
    """Answers questions with a pruned model; nothing is trained.

    `test` logs exact match, the share of visual tokens kept by the last layer and by the mean layer, and key-value
    entries, all and by source; `predict` returns what the pruner ranked by.

    Args:
        pruner: what to drop, and where.
        answer_model: the model that is pruned: `embedded:answer_model`, a folder, or a repository on the hub.
        order: prompt order; its family's own is `image_first`.
        max_new_tokens: longest answer.
        dtype: of the model.
        attention: attention implementation of transformers; `auto` is flash-attn where it can run, else sdpa.
    """

    def __init__(
        self,
        pruner: Pruner,
        answer_model: str = "embedded:answer_model",
        order: PromptOrder = "image_first",
        max_new_tokens: int = 16,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: Attention = "auto",
    ) -> None:
        super().__init__()
        self.pruner, self.order, self.max_new_tokens = pruner, order, max_new_tokens
        self.vlm = load_vlm(answer_model, getattr(torch, dtype), attention)
        self.model: torch.nn.Module = self.vlm.model
        self.strict_loading = False

    def setup(self, stage: str) -> None:
        """Prepare the means and check that the data was tiled for the answer model.

        Raises:
            ConfigError: if it was tiled for another.
        """
        data = getattr(self.trainer, "datamodule", None)
        reader = getattr(data, "reader", None)
        if reader is not None and reader.processor.rule != self.vlm.processor.rule:
            raise ConfigError(
                f"data.base and the answer model must tile alike: {reader.processor.rule} and "
                f"{self.vlm.processor.rule}; set data.base to the answer model"
            )
        sources = data.source_names("test") if data is not None else []
        measures = ("exact_match", "kept", "layer_average", "kv_entries")
        self.means = Means([*measures, *(f"exact_match/{source}" for source in sources)])

    def answer(self, batch: Batch) -> tuple[list[str], list[Tensor], list[Tensor]]:
        """Return the answers of a batch, the keep mask bool (B, M) and prompt slots int64 (B,) of every layer."""
        request, features = batch.request, None
        alone = len(request.grids) == len(request)
        if not self.pruner.reads_vision_tower and not (self.pruner.skip_tiles and alone):
            # Once an image, however many questions ask about it.
            with torch.no_grad():
                features = self.vlm.visual_tokens(request.tiles)
        inputs = prompt_inputs(self.vlm, request, self.order, features)
        with pruned(self.vlm, self.pruner, inputs, request) as run:
            tokens = generate(self.vlm, inputs, self.max_new_tokens)
        return read_answers(self.vlm, tokens), run.kept, run.slots

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Account for a batch."""
        answers, kept, slots = self.answer(batch)
        counts = torch.tensor(batch.request.counts, device=self.device)
        shares = torch.stack([mask.sum(dim=1) / counts for mask in kept])
        right = [exact_match(given, truth) for given, truth in zip(answers, batch.answers, strict=True)]
        matches = torch.tensor(right, device=self.device)
        self.means.update("exact_match", matches)
        self.means.update("kept", shares[-1])
        self.means.update("layer_average", shares.mean(dim=0))
        self.means.update("kv_entries", torch.stack(slots).sum(dim=0))
        for tag in self.means.tags:
            if source := tag.partition("/")[2]:
                mine = torch.tensor([name == source for name in batch.sources], device=self.device)
                self.means.update(tag, matches[mine])

    def on_test_epoch_end(self) -> None:
        """Log the means."""
        for tag, value in self.means.compute().items():
            self.log(f"test/{tag}", value)  # reduced over ranks already

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Return keys, turns, answers, keep masks and, from a pruner that ranks, the importance (B, M) of a batch."""
        answers, kept, _ = self.answer(batch)
        found = {"keys": batch.keys, "turns": batch.turns, "answers": answers, "kept": kept[-1].cpu()}
        ranked = self.pruner.importance
        return found if ranked is None else {**found, "importance": ranked.cpu()}


class ImportanceShards(BasePredictionWriter):
    """Writes what `predict` found into WebDataset shards, for a PGP run as for a `PrunedAnswers`.

    A sample `KEY/TURN` has `importance.npy`, float16 (M,), and as far as they are there `kept.npy`, bool (M,), and
    `answer.txt`. Each rank writes shards of its own, `RANK-000000.tar` and on.

    Args:
        folder: where shards go; must not hold any.
        samples_per_shard: samples in a shard at the most.
    """

    def __init__(self, folder: str, samples_per_shard: int = 1000) -> None:
        super().__init__("batch")
        if samples_per_shard < 1:
            raise ConfigError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
        self.folder, self.samples_per_shard = Path(folder), samples_per_shard
        self._writer: webdataset.ShardWriter | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open this rank's first shard.

        Raises:
            ConfigError: if the folder holds shards already.
        """
        rank = trainer.global_rank
        if any(self.folder.glob(f"{rank}-*.tar")):
            raise ConfigError(f"{self.folder} holds shards already: give another folder, or remove them")
        self.folder.mkdir(parents=True, exist_ok=True)
        pattern = str(self.folder / f"{rank}-%06d.tar")
        self._writer = webdataset.ShardWriter(pattern, maxcount=self.samples_per_shard, verbose=0)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,  # noqa: ANN401 (Lightning's type)
        batch_indices: Any,  # noqa: ANN401
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write a batch."""
        assert self._writer is not None
        counts = batch.request.counts
        for row, (key, turn, n) in enumerate(zip(prediction["keys"], prediction["turns"], counts, strict=True)):
            sample: dict[str, Any] = {"__key__": f"{key}/{turn}"}
            if "importance" in prediction:
                sample["importance.npy"] = _npy(_half(prediction["importance"][row, :n].numpy()))
            if "kept" in prediction:
                sample["kept.npy"] = _npy(prediction["kept"][row, :n].numpy())
            if "answers" in prediction:
                sample["answer.txt"] = prediction["answers"][row].encode()
            self._writer.write(sample)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the last shard."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _half(values: np.ndarray) -> np.ndarray:
    """Return importance as float16, what is beyond its range brought back to it."""
    return np.where(np.isfinite(values), values.clip(-HALF_MAX, HALF_MAX), values).astype(np.float16)


def _npy(values: np.ndarray) -> bytes:
    """Return an array as a file: webdataset would pickle it."""
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()
