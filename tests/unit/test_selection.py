"""Keep masks and recall against slow twins and by properties."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pgp_lightning import selection
from pgp_lightning.errors import ConfigError
from pgp_lightning.selection import equal_shares, keep_count, keep_top, max_min_diversity, recall

# Few distinct values, so ties are common; padding anywhere, but a first token in every row.
VALUES = st.sampled_from([-2.0, -0.0, 0.0, 0.5, 0.5, 1.0, 3e38, -math.inf, -math.inf])
RATIOS = st.floats(0.001, 1.0)


@st.composite
def maps(draw: st.DrawFn) -> Tensor:
    columns = draw(st.integers(0, 12))
    rows = draw(st.lists(st.lists(VALUES, min_size=columns, max_size=columns), min_size=1, max_size=4))
    return torch.tensor([[draw(st.sampled_from([0.0, 0.5, 2.0])), *row] for row in rows])


def tokens_of(row: list[float]) -> list[int]:
    return [i for i, value in enumerate(row) if value != -math.inf]


def slow_keep_top(importance: Tensor, count: int) -> list[list[bool]]:
    """Take the best remaining token, the first of equals, as often as the budget allows."""
    keep = []
    for row in importance.tolist():
        left, taken = tokens_of(row), set()
        for _ in range(min(count, len(left))):
            best = max(row[i] for i in left)
            taken.add(next(i for i in left if row[i] == best))
            left = [i for i in left if i not in taken]
        keep.append([i in taken for i in range(len(row))])
    return keep


@pytest.mark.parametrize(
    ("tokens", "ratio", "kept"),
    [(320, 0.05, 16), (320, 0.2, 64), (100, 0.29, 29), (576, 64 / 576, 64), (576, 1 / 3, 192), (10, 0.05, 1),
     (19, 0.1, 1), (1, 0.001, 1), (7, 1.0, 7), (3328, 0.05, 166)],
)  # fmt: skip
def test_keep_count_of_known_budgets(tokens: int, ratio: float, kept: int):
    assert keep_count(tokens, ratio) == kept


@given(st.integers(1, 5000), st.integers(1, 1000))
def test_keep_count_is_exact_arithmetic_on_decimal_ratios(tokens: int, thousandths: int):
    assert keep_count(tokens, thousandths / 1000) == max(1, int(tokens * Fraction(thousandths, 1000)))


@given(st.integers(1, 5000), st.data())
def test_keep_count_returns_a_ratio_made_from_a_count(tokens: int, data: st.DataObject):
    kept = data.draw(st.integers(1, tokens))
    assert keep_count(tokens, kept / tokens) == kept


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_keep_count_refuses_ratios_outside_the_range(ratio: float):
    with pytest.raises(ConfigError, match=r"ratio must be in \(0, 1\]"):
        keep_count(10, ratio)


def test_keep_count_refuses_no_tokens():
    with pytest.raises(ValueError, match="at least one visual token"):
        keep_count(0, 0.5)


@given(maps(), st.integers(1, 14))
def test_keep_top_by_count_equals_the_slow_twin(importance: Tensor, count: int):
    assert keep_top(importance, count=count).tolist() == slow_keep_top(importance, count)


@given(maps(), RATIOS)
def test_keep_top_by_ratio_gives_every_row_its_own_budget(importance: Tensor, ratio: float):
    keep = keep_top(importance, ratio)
    assert keep.shape == importance.shape
    assert keep.dtype == torch.bool
    for row, mask in zip(importance, keep, strict=True):
        budget = keep_count(len(tokens_of(row.tolist())), ratio)
        assert mask.tolist() == slow_keep_top(row[None], budget)[0]


@given(maps(), RATIOS)
def test_kept_tokens_are_at_least_as_important_as_dropped_ones(importance: Tensor, ratio: float):
    keep = keep_top(importance, ratio)
    for row, mask in zip(importance.tolist(), keep.tolist(), strict=True):
        kept = [value for value, stays in zip(row, mask, strict=True) if stays]
        dropped = [value for value, stays in zip(row, mask, strict=True) if not stays]
        assert -math.inf not in kept
        assert not dropped or min(kept) >= max(dropped)


@given(maps(), RATIOS, st.integers(0, 5))
def test_keep_top_does_not_depend_on_padding_or_batch(importance: Tensor, ratio: float, padding: int):
    padded = torch.nn.functional.pad(importance, (0, padding), value=-math.inf)
    keep = keep_top(padded, ratio)
    assert not keep[:, importance.shape[1] :].any()
    for i in range(len(importance)):
        assert torch.equal(keep[i, : importance.shape[1]], keep_top(importance[i : i + 1], ratio)[0])


@given(maps(), RATIOS)
def test_a_greater_budget_keeps_what_a_smaller_one_kept(importance: Tensor, ratio: float):
    assert not (keep_top(importance, ratio / 2) & ~keep_top(importance, ratio)).any()


def test_all_equal_keeps_the_first_and_ratio_one_keeps_all():
    importance = torch.tensor([[1.0] * 6, [1.0] * 4 + [-math.inf] * 2])
    assert keep_top(importance, 0.5).tolist() == [[True] * 3 + [False] * 3, [True] * 2 + [False] * 4]
    assert torch.equal(keep_top(importance, 1.0), importance.isfinite())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_keep_top_takes_any_floating_dtype(dtype: torch.dtype):
    importance = torch.tensor([[0.5, 2.0, -1.0, 2.0, -math.inf]], dtype=dtype)
    assert keep_top(importance, count=1).tolist() == [[False, True, False, False, False]]


def test_ties_keep_their_order_in_long_rows():
    """Unstable sorts happen to be stable on short rows."""
    importance = torch.zeros(3, 4096)
    keep = keep_top(importance, 0.05)
    assert torch.equal(keep, (torch.arange(4096) < 204).expand(3, 4096))


def test_keep_top_refuses_what_it_cannot_rank():
    with pytest.raises(ValueError, match=r"NaN, got some in rows \[1\]"):
        keep_top(torch.tensor([[1.0, 2.0], [math.nan, 0.0]]), 0.5)
    with pytest.raises(ValueError, match="got none in row 1"):
        keep_top(torch.tensor([[1.0, 2.0], [-math.inf, -math.inf]]), 0.5)
    with pytest.raises(ValueError, match=r"shape \(B, M\)"):
        keep_top(torch.zeros(3), 0.5)
    with pytest.raises(ConfigError, match="exactly one of ratio and count"):
        keep_top(torch.zeros(1, 3))
    with pytest.raises(ConfigError, match="exactly one of ratio and count"):
        keep_top(torch.zeros(1, 3), 0.5, count=1)
    with pytest.raises(ConfigError, match="count must be at least 1"):
        keep_top(torch.zeros(1, 3), count=0)
    with pytest.raises(ConfigError, match=r"ratio must be in \(0, 1\]"):
        keep_top(torch.zeros(1, 3), 0.0)


def slow_recall(importance: Tensor, relevant: Tensor, ratio: float) -> list[float]:
    result = []
    for row, wanted in zip(importance.tolist(), relevant.tolist(), strict=True):
        tokens = tokens_of(row)
        k = max(1, int(len(tokens) * ratio + 1e-6))
        top = set(sorted(tokens, key=lambda i: (-row[i], i))[:k])
        truth = {i for i in tokens if wanted[i]}
        result.append(len(top & truth) / min(k, len(truth)) if truth else math.nan)
    return result


@given(maps(), RATIOS, st.integers(0, 2**16))
def test_recall_equals_the_slow_twin(importance: Tensor, ratio: float, seed: int):
    relevant = torch.rand(importance.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    measured = recall(importance, relevant, ratio)
    torch.testing.assert_close(measured, torch.tensor(slow_recall(importance, relevant, ratio)), equal_nan=True)


@given(maps(), RATIOS)
def test_recall_of_the_truth_itself_is_one(importance: Tensor, ratio: float):
    tokens = importance != -math.inf
    relevant = tokens & (importance > 0)
    oracle = torch.where(tokens, relevant.float(), -math.inf)
    expected = torch.where(relevant.any(dim=1), 1.0, math.nan)
    torch.testing.assert_close(recall(oracle, relevant, ratio), expected, equal_nan=True)


def test_recall_by_hand():
    importance = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, -math.inf, -math.inf], [4.0, 3.0, 2.0, 1.0]])
    relevant = torch.tensor([[True, False, True, True], [False, True, True, False], [False] * 4])
    # Row 0: 1 of the 2 that fit; row 1: 0 of 1, padding is never relevant; row 2: nothing to find.
    torch.testing.assert_close(recall(importance, relevant, 0.5), torch.tensor([0.5, 0.0, math.nan]), equal_nan=True)


def test_recall_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="bool relevance"):
        recall(torch.zeros(1, 3), torch.zeros(1, 3), 0.5)
    with pytest.raises(ValueError, match="bool relevance"):
        recall(torch.zeros(1, 3), torch.zeros(1, 4, dtype=torch.bool), 0.5)
    with pytest.raises(ValueError, match="NaN"):
        recall(torch.full((1, 3), math.nan), torch.ones(1, 3, dtype=torch.bool), 0.5)


@given(st.integers(0, 5000), st.integers(1, 13))
def test_equal_shares_are_exact_and_differ_by_one_at_most(count: int, parts: int):
    shares = equal_shares(count, parts)
    assert (len(shares), sum(shares)) == (parts, count)
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)


# Corners of a cube: all of one length, and cosines are exact in float32, so ties and repetitions are the rule.
CORNERS = st.lists(st.lists(st.sampled_from([-1, 1]), min_size=4, max_size=4), min_size=1, max_size=12)


def slow_max_min(corners: list[list[int]], count: int) -> list[int]:
    """Choose by the definition: look at every pair, the first of equals wins."""

    def distance(i: int, j: int) -> int:
        return -sum(a * b for a, b in zip(corners[i], corners[j], strict=True))

    tokens = range(len(corners))
    alone = [min((distance(i, j) for j in tokens if j != i), default=0) for i in tokens]
    chosen = [alone.index(max(alone))]
    while len(chosen) < count:
        left = {i: min(distance(i, j) for j in chosen) for i in tokens if i not in chosen}
        chosen.append(next(i for i in left if left[i] == max(left.values())))
    return chosen


@given(CORNERS, st.data())
def test_max_min_diversity_equals_the_slow_twin(corners: list[list[int]], data: st.DataObject):
    count = data.draw(st.integers(1, len(corners)))
    lengths = torch.tensor(data.draw(st.lists(st.sampled_from([0.25, 1.0, 8.0]), min_size=12, max_size=12)))
    features = torch.tensor(corners, dtype=torch.float32) * lengths[: len(corners), None]
    assert max_min_diversity(features, count).tolist() == slow_max_min(corners, count)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_max_min_diversity_does_not_depend_on_how_much_is_in_memory(chunk: int, monkeypatch: pytest.MonkeyPatch):
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    whole = max_min_diversity(features, 40)
    monkeypatch.setattr(selection, "_CHUNK", chunk)
    assert torch.equal(max_min_diversity(features, 40), whole)


def test_max_min_diversity_with_a_greater_count_goes_on_where_a_smaller_one_stopped():
    features = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    order = max_min_diversity(features, 300)
    assert order.sort().values.tolist() == list(range(300))
    for count in (1, 2, 50):
        assert torch.equal(max_min_diversity(features, count), order[:count])


def test_max_min_diversity_takes_half_precision_and_equal_or_zero_features():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(max_min_diversity(features, 9), max_min_diversity(features.float(), 9))
    assert max_min_diversity(torch.ones(5, 4), 5).tolist() == [0, 1, 2, 3, 4]
    assert max_min_diversity(torch.zeros(3, 4), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("shape", "count"), [((4, 2), 0), ((4, 2), 5), ((4,), 1), ((1, 4, 2), 1)])
def test_max_min_diversity_refuses_what_it_cannot_choose_from(shape: tuple[int, ...], count: int):
    with pytest.raises(ValueError, match="count from 1 to N"):
        max_min_diversity(torch.zeros(shape), count)


def test_max_min_diversity_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="must be finite"):
        max_min_diversity(torch.tensor([[1.0, math.nan], [0.0, 1.0]]), 1)
