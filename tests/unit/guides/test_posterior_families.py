"""The posterior guide on every family: LLaVA-1.5 and InternVL in the original layout, as on transformers' InternVL."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.objective import divergence_loss, reconstruction_loss
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import cut_tiles
from tests.originals import download
from tests.tiny import ANSWERS, QUESTIONS
from tests.unit.guides.made import CLOSE, make


@pytest.fixture(scope="session")
def original_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(download(tmp_path_factory.mktemp("original"), "internvl_internlm2"))


@pytest.fixture(params=["llava_base", "original_base"])
def base(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def pictures(guide: PosteriorGuide, sizes: tuple[tuple[int, int], ...] = ((60, 40), (30, 90), (20, 20))) -> Request:
    rng = np.random.default_rng(3)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    cut = [cut_tiles(image, guide.vlm.processor.rule, 2) if guide.vlm.processor.rule.fit == "stretch" else
           cut_tiles(image, guide.vlm.processor.rule) for image in images]  # fmt: skip
    tiles = torch.from_numpy(np.concatenate([tiles for tiles, _ in cut]))
    return Request(list(QUESTIONS[: len(sizes)]), tiles, [grid for _, grid in cut])


def test_a_step_trains_adapter_and_bottleneck_and_nothing_else(base: str):
    guide = make(base).train()
    request = pictures(guide)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    found = guide.bottleneck_pass(request, guide.visual_tokens(request))
    latents = guide.bottleneck.sample(found.posterior, torch.randn_like(found.states))
    predicted = guide.reconstruction_pass(request, list(ANSWERS[:3]), latents)
    loss = reconstruction_loss(*predicted, "token") + divergence_loss(found.divergence, found.mask)
    loss.backward()
    torch.optim.SGD([p for p in guide.parameters() if p.requires_grad], lr=0.1).step()
    trained = set(guide.trainable())
    moved = {name for name, value in guide.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained and not any("vision_tower" in name for name in trained)


def test_rows_of_a_batch_do_not_see_each_other(base: str):
    guide = make(base)
    request = pictures(guide)
    together = guide(request)
    assert together.shape == (3, max(request.counts)) and together.dtype == torch.float32
    first = 0
    for row, grid in enumerate(request.grids):
        alone = guide(Request([request.questions[row]], request.tiles[first : first + grid.tiles], [grid]))
        torch.testing.assert_close(together[row, : grid.tokens], alone[0], **CLOSE)
        assert together[row, grid.tokens :].isinf().all()
        first += grid.tiles


def test_the_question_moves_the_scores(base: str):
    guide = make(base)
    request = pictures(guide, ((60, 40),))
    other = Request(["how many blue shapes"], request.tiles, request.grids)
    assert not torch.allclose(guide(request), guide(other), atol=1e-3)
    blind = make(base, bottleneck_order="image_first")
    torch.testing.assert_close(blind(request), blind(other), **CLOSE)


def test_a_guide_survives_the_disk(base: str, tmp_path: Path):
    guide = make(base)
    guide.save_pretrained(tmp_path / "guide")
    again = PosteriorGuide.from_pretrained(tmp_path / "guide")
    request = pictures(guide)
    assert torch.equal(again(request), guide(request))
    assert again.vlm.family == guide.vlm.family and again.base_fingerprint == guide.base_fingerprint
