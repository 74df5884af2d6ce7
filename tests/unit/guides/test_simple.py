"""Controls: what they rank first is what their name says, whatever batch a question is in."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pgp_lightning.errors import ConfigError
from pgp_lightning.guides.base import Guide
from pgp_lightning.guides.simple import AnotherQuestion, OracleGuide, RandomGuide, UniformGuide
from pgp_lightning.selection import keep_top, recall
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import TileGrid
from tests.tiny import QUESTIONS, row_of, tiny_request

GUIDES = {"random": RandomGuide(), "uniform": UniformGuide(), "oracle": OracleGuide()}


def with_truth(request: Request) -> Request:
    """Say that some tokens of every row matter."""
    widest = max(request.counts)
    relevant = torch.arange(widest).expand(len(request), -1) % 4 == torch.arange(len(request))[:, None] % 4
    return replace(request, relevant=relevant & (torch.arange(widest) < torch.tensor(request.counts)[:, None]))


def image_request(grid: TileGrid) -> Request:
    return Request(["?"], torch.zeros(grid.tiles, 3, 4, 4, dtype=torch.uint8), [grid])


@pytest.mark.parametrize("name", GUIDES)
def test_importance_has_the_shape_of_every_guides(name: str, request_: Request):
    importance = GUIDES[name](with_truth(request_))
    counts = torch.tensor(request_.counts)
    assert importance.dtype == torch.float32 and importance.shape == (4, 20)
    assert torch.equal(importance > -torch.inf, torch.arange(20) < counts[:, None])
    assert all(len(row[:count].unique()) == count for row, count in zip(importance, counts, strict=True))


@pytest.mark.parametrize("name", GUIDES)
def test_a_row_does_not_depend_on_its_batch(name: str, request_: Request):
    truth = with_truth(request_)
    together = GUIDES[name](truth)
    assert torch.equal(together, GUIDES[name](truth))
    assert truth.relevant is not None
    for row, count in enumerate(request_.counts):
        alone = replace(row_of(request_, row), relevant=truth.relevant[row : row + 1, :count])
        assert torch.equal(GUIDES[name](alone)[0], together[row, :count])


def test_random_depends_on_seed_question_and_image_and_on_nothing_else():
    one = tiny_request(QUESTIONS[:1] * 2, images=(0, 2))
    first = RandomGuide()(one)[0, :12]
    assert torch.equal(RandomGuide(0)(one)[0, :12], first)
    state = torch.random.get_rng_state()
    others = {
        "seed": RandomGuide(1)(one)[0, :12],
        "question": RandomGuide()(replace(one, questions=list(QUESTIONS[1:3])))[0, :12],
        "pixels": RandomGuide()(tiny_request(QUESTIONS[:1] * 2, images=(0, 2), seed=1))[0, :12],
        "image": RandomGuide()(one)[1, :12],
    }
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, other in others.items():
        assert not torch.equal(other, first), name


def test_random_keeps_every_token_equally_often():
    grid = TileGrid(1, 1, 4, False)
    times = torch.zeros(16)
    for seed in range(400):
        times += keep_top(RandomGuide(seed)(image_request(grid)), 0.25)[0]
    # 100 expected, standard deviation 8.7
    assert times.min() > 60 and times.max() < 140


def test_oracle_ranks_relevant_tokens_first_and_the_others_as_random_does(request_: Request):
    request_ = with_truth(request_)
    assert request_.relevant is not None
    importance, random = OracleGuide(3)(request_), RandomGuide(3)(request_)
    for ratio in (0.1, 0.3, 0.9):
        assert torch.equal(recall(importance, request_.relevant, ratio), torch.ones(4))
    for row in range(4):
        for part in (request_.relevant[row], ~request_.relevant[row]):
            assert torch.equal(importance[row, part].argsort(), random[row, part].argsort())


def test_oracle_says_what_it_needs(request_: Request):
    with pytest.raises(ConfigError, match=r"needs request\.relevant"):
        OracleGuide()(request_)
    with pytest.raises(ConfigError, match=r"\(4, 20\).*got \(4, 19\)"):
        OracleGuide()(replace(request_, relevant=torch.zeros(4, 19, dtype=torch.bool)))


class Notes(Guide):
    """Remembers what it was asked."""

    def forward(self, request: Request) -> Tensor:
        self.asked = request
        return torch.ones(len(request), max(request.counts))


def test_another_question_asks_about_the_same_images(request_: Request):
    others = ["is it red", "how many", "what is there", "why"]
    guide = Notes()
    importance = AnotherQuestion(guide)(replace(with_truth(request_), other_questions=others))
    assert guide.asked.questions == others and guide.asked.images == request_.images
    assert torch.equal(guide.asked.tiles, request_.tiles)
    assert guide.asked.relevant is None and guide.asked.other_questions is None
    assert torch.equal(importance, torch.ones(4, 20))
    asked = RandomGuide()(replace(request_, questions=others))
    assert torch.equal(AnotherQuestion(RandomGuide())(replace(request_, other_questions=others)), asked)


def test_another_question_says_what_it_needs(request_: Request):
    with pytest.raises(ConfigError, match="must hold 4 questions, got none"):
        AnotherQuestion(Notes())(request_)
    with pytest.raises(ConfigError, match="must hold 4 questions, got 1 of them"):
        AnotherQuestion(Notes())(replace(request_, other_questions=["is it red"]))
    with pytest.raises(ConfigError, match=r"needs request\.relevant"):
        AnotherQuestion(OracleGuide())(replace(with_truth(request_), other_questions=list(QUESTIONS)))


def order_of(grid: TileGrid) -> Tensor:
    return UniformGuide()(image_request(grid))[0].argsort(descending=True)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_uniform_serves_all_tiles_alike_at_every_budget(columns: int, rows: int, side: int, thumbnail: bool):
    grid = TileGrid(columns, rows, side, thumbnail)
    order = order_of(grid)
    tile, cell = order // side**2, order % side**2
    counts = torch.nn.functional.one_hot(tile, grid.tiles).cumsum(dim=0)
    assert int((counts.amax(dim=1) - counts.amin(dim=1)).max()) <= 1
    # All tiles give the same cells in the same order, the thumbnail last.
    turns = cell.view(-1, grid.tiles)
    assert torch.equal(turns, turns[:, :1].expand_as(turns))
    assert not thumbnail or bool((tile.view(-1, grid.tiles)[:, -1] == grid.tiles - 1).all())


@pytest.mark.parametrize("side", [1, 2, 3, 5, 7, 8, 12, 16, 24])
def test_uniform_is_even_within_a_tile_at_every_budget(side: int):
    order = order_of(TileGrid(1, 1, side, False))
    assert torch.equal(order.sort().values, torch.arange(side**2))
    places = torch.stack([order // side, order % side], dim=1).float()
    for k in range(2, side**2 + 1):
        # Half of the spacing of the coarsest square grid that holds k; no order can be at its spacing for all k.
        spacing = side / math.ceil(math.sqrt(k))
        assert torch.pdist(places[:k]).min() >= 0.5 * spacing, k
        for half in (places[:k] < side / 2).sum(dim=0).tolist():
            assert abs(half - k * math.ceil(side / 2) / side) < 1.5, k


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_uniform_is_a_regular_grid_wherever_one_fits(side: int):
    order = order_of(TileGrid(1, 1, side, False))
    step = side
    while step >= 1:
        cells = order[: (side // step) ** 2]
        y, x = (cells // side).unique(), (cells % side).unique()
        for axis in (y, x):
            assert torch.equal(axis.diff(), torch.full((side // step - 1,), step))
        assert len(y) * len(x) == len(cells)
        step //= 2


def test_uniform_does_not_look_at_the_image():
    one, other = (UniformGuide()(tiny_request(seed=seed)) for seed in (0, 1))
    assert torch.equal(one, other)
