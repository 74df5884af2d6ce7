"""The probe of `guides/probing.py` on a guide that is being built: how well can V' be ranked by the question?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pgp_lightning.embedded.corpus import Corpus, pick
from pgp_lightning.embedded.language import Answerer, make_rows
from pgp_lightning.guides.probing import train_probe
from pgp_lightning.selection import recall
from pgp_lightning.vlm.decoder_call import decode_states
from pgp_lightning.vlm.processor import Processor

__all__ = ["probe_recall"]


@torch.no_grad()
def _visual_states(answerer: Answerer, corpus: Corpus, processor: Processor, questions: int) -> tuple[Tensor, Tensor]:
    """V' (n, 320, d) of one question a scene, and which tokens are relevant (n, 320)."""
    rng = np.random.default_rng(0)
    states, relevant = [], []
    for first in range(0, questions, 32):
        scenes = np.arange(first, min(first + 32, questions))
        chosen = [[next(q for q in pick(corpus.items[i], 99, rng) if q.relevant.any())] for i in scenes]
        rows = make_rows(corpus, scenes, processor, rng, order="question_first", chosen=chosen)
        visual = answerer.model.model.multi_modal_projector(rows.features)
        embeddings = answerer.model.get_input_embeddings()(rows.ids)
        index = rows.slots[..., None].expand(-1, -1, embeddings.shape[-1])
        decoder = answerer.model.model.language_model
        hidden = decode_states(decoder, embeddings.scatter(1, index, visual), torch.ones_like(rows.ids), rows.positions)
        states.append(hidden.gather(1, index))
        relevant.append(torch.from_numpy(np.stack([items[0].relevant for items in chosen])))
    return torch.cat(states), torch.cat(relevant)


def probe_recall(
    answerer: Answerer, training: Corpus, test: Corpus, processor: Processor, steps: int = 1500
) -> dict[str, float]:
    """Train the probe on some scenes and return its recall at 5, 11 and 20 % on others."""
    answerer.eval()
    states, relevant = _visual_states(answerer, training, processor, len(training))
    probe = train_probe(states, relevant, steps)
    states, relevant = _visual_states(answerer, test, processor, len(test))
    with torch.no_grad():
        scores = probe(states).squeeze(-1)
    answerer.train()
    return {f"at_{p}": recall(scores, relevant, p / 100).nanmean().item() for p in (5, 11, 20)}
