"""The parts of `pgp probe`: which questions and images count, what a verdict rests on, and what is printed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.probe import _Image, _Look, different, is_artefact
from pgp_lightning.evaluation.probe_report import Findings, verdict
from pgp_lightning.evaluation.scoring import Interval
from pgp_lightning.selection import recall
from tests.tiny import tiny_batch, tiny_request

GRID = tiny_request().grids[:1]


def recalls(mean: float, low: float) -> dict[str, dict[str, Interval]]:
    return {"difference": {"0.05": Interval(mean, low, 2 * mean - low)}}


def findings(**changes: object) -> Findings:
    shares = {"token": 0.5, "question": 0.25, "interaction": 0.25}
    made = Findings(
        "g", False, "b", "cpu", "float32", "d", 2, 4, {"unusable": 3, "else": 0}, shares, {}, {}, True, ["Yes."]
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_only_different_questions_of_an_image_count():
    for questions, rows in [("abab", [0, 1]), ("aaaa", [0]), ("abcb", [0, 1, 2])]:
        request = tiny_request(tuple(questions), grids=GRID, images=(0, 0, 0, 0))
        assert different(tiny_batch(request)) == rows
    many = tiny_request(tuple("abcdefghijkl"), grids=GRID, images=(0,) * 12)
    assert different(tiny_batch(many, tuple("x" * 12), tuple("y" * 12), tuple(range(12)), (0,) * 12)) == list(range(8))


@pytest.mark.parametrize(
    ("interaction", "truth", "carries", "why"),
    [
        (0.0, recalls(0.5, 0.4), True, "recalls 50.0 points more"),  # the truth decides where it is known
        (0.9, recalls(0.5, 0.05), False, "recalls 50.0 points more"),  # too wide an interval
        (0.9, recalls(0.01, float("nan")), False, "recalls 1.0 points more"),
        (0.11, {}, True, "11.0 % of the variance"),
        (0.09, {}, False, "9.0 % of the variance"),
    ],
)
def test_the_verdict(interaction: float, truth: dict[str, dict[str, Interval]], carries: bool, why: str):
    found, notes = verdict(interaction, truth)
    assert found is carries and why in notes[0]
    assert notes[0].startswith(f"The visual states {'carry' if carries else 'do not carry'} the question")
    assert ("model.question_blind" in notes[-1]) is not carries and ("docs/reproduction.md" in notes[-1]) is not carries


def test_what_is_printed_and_written():
    third = Interval(1 / 3, 0.3, 0.4)
    of = dict.fromkeys(("0.05", "0.11", "0.2"), third)
    full = findings(recalls={"probe": of, "difference": of}, overlap={"the relevant tokens": third})
    text = full.summary()
    assert "base model      g, float32 on cpu" in text and "4 questions about 2 images; left out: 3 unusable" in text
    assert "50.0      25.0         25.0" in text and "33.3 [30.0, 40.0]" in text and "+33.3 [+30.0, +40.0]" in text
    assert text.endswith("\n\nYes.") and "else" not in text
    written = json.loads(json.dumps(full.as_json()))
    assert written["recalls"]["probe"]["0.2"] == {"mean": 1 / 3, "low": 0.3, "high": 0.4} and written["carries"] is True
    bare = findings().summary()
    assert "recall" not in bare and "Jaccard" not in bare


class Threshold(torch.nn.Module):
    """Scores a state by its first channel."""

    def forward(self, states: Tensor) -> Tensor:
        return states[..., :1]


def test_recalls_under_the_own_and_another_question():
    truth = torch.zeros(4, 20, dtype=torch.bool)
    truth[0, :2], truth[1, 1:4], truth[2, 10:13] = True, True, True  # the last has none and does not count
    states, scores = torch.rand(4, 20, 3), torch.rand(4, 20)
    look = _Look(torch.nn.Identity(), [None] * 4, torch.device("cpu"), artefact=True, seed=0)  # type: ignore[arg-type]
    look._recall(_Image(7, states, scores, truth), Threshold())
    other = [2, 2, 0]  # whose truths overlap least
    for name, values in {"probe": states[..., 0], "scores": scores}.items():
        for ratio in (0.05, 0.11, 0.2):
            own = [recall(values[q : q + 1], truth[q : q + 1], ratio).item() for q in range(3)]
            others = [recall(values[o : o + 1], truth[q : q + 1], ratio).item() for q, o in enumerate(other)]
            assert look.recalls[name][ratio] == own
            assert look.recalls[f"{name}, another question"][ratio] == others
            if name == "probe":
                gaps = [a - b for a, b in zip(own, others, strict=True)]
                assert look.recalls["difference"][ratio] == pytest.approx(gaps)
    assert look.recalled == [7, 7, 7]
    # Without two truths that differ there is no other question to read.
    for same in (None, truth[:1].expand(4, -1), torch.zeros_like(truth)):
        look._recall(_Image(8, states, scores, same), Threshold())
    assert look.recalled == [7, 7, 7]


def test_a_name_is_a_guide_or_a_base_model(tmp_path: Path):
    assert is_artefact("embedded:pgp_seed0") and not is_artefact("embedded:guide") and not is_artefact("owner/name")
    with pytest.raises(ConfigError, match=r"holds neither guide\.json"):
        is_artefact(str(tmp_path))
    with pytest.raises(ConfigError, match=r"embedded:pgp_seed0.*embedded:guide_before_question_blind"):
        is_artefact("embedded:gone")
    (tmp_path / "config.json").write_text("{}")
    assert not is_artefact(str(tmp_path))
    (tmp_path / "guide.json").write_text("{}")
    assert is_artefact(str(tmp_path))
