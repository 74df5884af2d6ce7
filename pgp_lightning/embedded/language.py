"""Stages two and three of the embedded pair: projector and language model learn to answer from the frozen tower.

A row is one picture with one or several turns. Only some visual tokens are given, at their original positions:
those that the turns ask for and others drawn uniformly. No method's scores and no truth beyond "what is asked for
stays in the picture" shape what is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import InternVLForConditionalGeneration

from pgp_lightning.embedded.corpus import Corpus, Item, pick
from pgp_lightning.embedded.glyphs import GLYPHS
from pgp_lightning.embedded.world import COLOUR_NAMES, GRID, HEIGHTS, SHAPES, TYPES
from pgp_lightning.vlm.decoder_call import decode_states
from pgp_lightning.vlm.processor import Processor, PromptOrder

__all__ = ["Answerer", "Rows", "accuracy", "make_rows"]

_END_WEIGHT = 0.1  # the end of an answer is easy; it should not drown the answer


@dataclass
class Rows:
    """A batch of B rows of N slots, k of them visual; features (B, k, 256), everything else int64 or bool."""

    features: Tensor
    labels: Tensor
    ids: Tensor
    positions: Tensor
    slots: Tensor
    targets: Tensor
    turns: Tensor
    types: list[list[int]]


def make_rows(
    corpus: Corpus,
    scenes: np.ndarray,
    processor: Processor,
    rng: np.random.Generator,
    *,
    order: PromptOrder = "image_first",
    turns: int = 1,
    keep: float = 1.0,
    chosen: list[list[Item]] | None = None,
    weights: dict[int, float] | None = None,
) -> Rows:
    """Lay out rows of some scenes.

    Args:
        corpus: where the scenes are.
        scenes: indices of B scenes.
        processor: tokenises and knows the chat format.
        rng: draws questions and dropped tokens.
        order: `question_first` rows hold one turn.
        turns: questions of a row.
        keep: share of visual tokens that stay (more if the questions ask for more).
        chosen: the questions of each row, drawn if not given.
        weights: of types, for `pick`.
    """
    chosen = chosen or [pick(corpus.items[i], turns, rng, weights) for i in scenes]
    needed = np.stack([np.any([item.relevant for item in items], axis=0) for items in chosen])
    if order == "question_first" and keep < 1:
        # Were only the asked-for tokens sure to stay, the picture alone would tell what is asked.
        others = [pick(corpus.items[i], 6, rng) for i in scenes]
        needed |= np.stack([np.any([item.relevant for item in items], axis=0) for items in others])
    count = min(GRID.tokens, max(int(GRID.tokens * keep), int(needed.sum(axis=1).max())))
    rank = rng.random(needed.shape) + 2.0 * needed
    kept = np.sort(np.argsort(-rank, axis=1)[:, :count], axis=1)
    context = processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    template = processor.template
    opening = processor.encode(template.user)
    closing = processor.encode(template.separator + template.assistant)
    lines: list[tuple[list[int], list[int], list[int], list[int]]] = []
    for items in chosen:
        before, after, marks, turn = opening, processor.encode("</img>"), [], []
        if order == "question_first":
            before = before + items[0].question
        marks, turn = [-100] * len(after), [-1] * len(after)
        for number, item in enumerate(items):
            question = ([] if number == 0 else opening) + (item.question if order == "image_first" else []) + closing
            after = after + question + item.answer
            marks += [-100] * len(question) + item.answer
            turn += [-1] * len(question) + [number] * len(item.answer)
        lines.append(([*before, processor.encode("<img>")[0]], after, marks, turn))
    width = max(len(before) + count + len(after) for before, after, _, _ in lines)
    ids, positions, slots, targets, turn_of = (
        np.zeros((len(lines), n), np.int64) for n in (width, width, count, width, width)
    )
    targets[:], turn_of[:] = -100, -1
    for b, (before, after, marks, turn) in enumerate(lines):
        start, stop = len(before), len(before) + count
        end = stop + len(after)
        ids[b, :start], ids[b, start:stop], ids[b, stop:end] = before, context, after
        positions[b, :start], positions[b, start:stop] = np.arange(start), start + kept[b]
        positions[b, stop:] = start + GRID.tokens + np.arange(width - stop)
        slots[b] = np.arange(start, stop)
        targets[b, stop:end], turn_of[b, stop:end] = marks, turn
    gathered = np.stack([corpus.features[i][k] for i, k in zip(scenes, kept, strict=True)])
    labels = np.stack([corpus.labels[i][k] for i, k in zip(scenes, kept, strict=True)])
    return Rows(
        features=torch.from_numpy(gathered).float(),
        labels=torch.from_numpy(labels).long(),
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        targets=torch.from_numpy(targets),
        turns=torch.from_numpy(turn_of),
        types=[[item.type for item in items] for items in chosen],
    )


class Answerer(nn.Module):
    """A model under training, its tower frozen, with an alignment head that reads words off visual tokens.

    Args:
        model: guide or answer model; only projector and language model are trained.
        processor: gives the ids of the words.
    """

    def __init__(self, model: InternVLForConditionalGeneration, processor: Processor) -> None:
        super().__init__()
        self.model = model
        model.model.vision_tower.requires_grad_(False)
        self.norm = nn.LayerNorm(model.get_input_embeddings().get_parameter("weight").shape[1])
        self.scale = nn.Parameter(torch.ones(3))
        heights = tuple(str(h) for h in range(1, HEIGHTS + 1))
        names = (COLOUR_NAMES, (*SHAPES, "sign", *heights), GLYPHS)
        self.words = [torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(words))) for words in names]

    def forward(self, rows: Rows, blind: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Answer the rows' turns.

        Args:
            rows: the batch.
            blind: hide the question from every slot behind the visual tokens (`question_first` rows), so that
                only the visual tokens themselves can tell what is asked.

        Returns:
            Logits (S, V) and targets (S,) at supervised slots, their places (S, 2) as (row, slot), and the
            projected visual tokens (B, k, d).
        """
        visual = self.model.model.multi_modal_projector(rows.features)
        embeddings = self.model.get_input_embeddings()(rows.ids)
        index = rows.slots[..., None].expand(-1, -1, embeddings.shape[-1])
        embeddings = embeddings.scatter(1, index, visual.to(embeddings.dtype))
        mask = self._blind_mask(rows) if blind else torch.ones_like(rows.ids)
        hidden = decode_states(self.model.model.language_model, embeddings, mask, rows.positions)
        supervised = rows.targets[:, 1:] != -100
        logits = self.model.lm_head(hidden[:, :-1][supervised])
        return logits.float(), rows.targets[:, 1:][supervised], supervised.nonzero(), visual

    @staticmethod
    def _blind_mask(rows: Rows) -> Tensor:
        slot = torch.arange(rows.ids.shape[1])
        causal = slot[:, None] >= slot[None, :]
        first, last = rows.slots[:, :1, None], rows.slots[:, -1:, None]
        # Slot 0 stays visible: softmax needs somewhere to rest, and it tells nothing.
        hidden = (slot[None, :, None] > last) & (slot[None, None, :] < first) & (slot[None, None, :] > 0)
        return (causal[None] & ~hidden)[:, None]

    def answer_loss(self, logits: Tensor, targets: Tensor, end: int) -> Tensor:
        """Cross-entropy over answer tokens, the end token weighing less."""
        weight = torch.where(targets == end, _END_WEIGHT, 1.0)
        return (functional.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()

    def alignment_loss(self, visual: Tensor, labels: Tensor) -> Tensor:
        """Every foreground token must name its colour, form and glyph through the model's own word embeddings."""
        embeddings = self.model.get_input_embeddings().get_parameter("weight")
        normed = self.norm(visual.float())
        total = torch.zeros(())
        for kind, words in enumerate(self.words):
            target = labels[..., kind]
            shown = target > 0
            logits = normed[shown] @ embeddings[words].T * self.scale[kind]
            total = total + functional.cross_entropy(logits, target[shown] - 1)
        return total


@torch.no_grad()
def accuracy(
    answerer: Answerer,
    corpus: Corpus,
    processor: Processor,
    *,
    order: PromptOrder = "image_first",
    blind: bool = False,
    scenes: int | None = None,
) -> dict[str, float]:
    """Exact match per question type with all visual tokens, one question of each type a scene, plus their mean.

    An answer is right if every token of it, the end included, is the most likely one: what greedy decoding finds.
    """
    answerer.eval()
    right: dict[int, list[float]] = {}
    rng = np.random.default_rng(0)
    asked: list[tuple[int, Item]] = []
    for i in range(scenes or len(corpus)):
        by_type = {item.type: item for item in (corpus.items[i][j] for j in rng.permutation(len(corpus.items[i])))}
        asked += [(i, item) for item in by_type.values()]
    for first in range(0, len(asked), 64):
        part = asked[first : first + 64]
        rows = make_rows(
            corpus, np.array([i for i, _ in part]), processor, rng, order=order, chosen=[[item] for _, item in part]
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets, places, _ = answerer(rows, blind)
        wrong = torch.zeros(len(part)).index_add(0, places[:, 0], (logits.argmax(-1) != targets).float())
        for (_, item), errors in zip(part, wrong.tolist(), strict=True):
            right.setdefault(item.type, []).append(float(errors == 0))
    answerer.train()
    figures = {TYPES[kind]: float(np.mean(values)) for kind, values in sorted(right.items())}
    return {"mean": float(np.mean(list(figures.values()))), **figures}
