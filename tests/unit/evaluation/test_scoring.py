"""Answers on disk and in memory, matching, pairing, and intervals that know of scenes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.evaluation import scoring
from pgp_lightning.evaluation.scoring import (
    Answer,
    accuracy,
    accuracy_by_type,
    agreement,
    exact_match,
    load_answers,
    load_results,
    mean_recall,
    paired_bootstrap,
)
from tests.unit.evaluation.results_made import answer, answers, comparison, write


@pytest.mark.parametrize(
    ("given", "truth", "same"),
    [
        ("red", "red", True),
        ("  Dark\t RED\n", "dark red", True),
        ("STRASSE", "straße", True),
        ("red.", "red", False),
        ("darkred", "dark red", False),
        ("", "red", False),
        ("", "  ", True),
    ],
)
def test_answers_match_apart_from_case_and_white_space(given: str, truth: str, same: bool):
    assert exact_match(given, truth) is same


class TestLines:
    def test_a_line_is_what_the_interface_says(self):
        keep = np.zeros(12, dtype=bool)
        keep[[0, 9]] = True
        line = answer(recall=0.5, keep=keep, importance=np.arange(12.0), extra={"guide_correct": True}).to_json()
        assert json.loads(line) == {
            "source": "made",
            "key": "a",
            "turn": 0,
            "type": "colour",
            "question": "what colour is it, a0?",
            "answer": "red",
            "given": "red",
            "correct": True,
            "n": 12,
            "kept": 12,
            "layer_average": 12.0,
            "kv_entries": 80,
            "recall": 0.5,
            "importance": "AAAAPABAAEIARABFAEYARwBIgEgASYBJ",  # float16 0 to 11, low byte first
            "kept_mask": "gEA=",  # 1000 0000 0100 (0000)
            "guide_correct": True,
        }

    def test_a_line_comes_back(self):
        rng = np.random.default_rng(0)
        importance = rng.normal(size=13).astype(np.float16)
        importance[3] = -np.inf
        before = answer(
            n=13, given='a\n"b"\u2028\ud7ff é', importance=importance, keep=rng.random(13) < 0.5, extra={"seed": [1]}
        )
        line = before.to_json()
        assert line.isascii()
        assert "\n" not in line
        after = Answer.from_json(line)
        assert after == before
        assert after.recall is None
        np.testing.assert_array_equal(after.importance, importance)
        np.testing.assert_array_equal(after.keep, before.keep)
        assert after.keep.dtype == bool

    def test_values_beyond_float16_stay_finite_and_minus_infinity_stays(self):
        importance = np.array([1e6, -1e6, -np.inf, 2.0])
        after = Answer.from_json(answer(n=4, importance=importance).to_json())
        assert after.importance.tolist() == [65504, -65504, -math.inf, 2]

    def test_a_recall_without_relevant_tokens_is_unknown(self):
        assert answer(recall=math.nan).recall is None
        assert json.loads(answer(recall=math.nan).to_json())["recall"] is None

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"layer_average": math.nan}, "turn 0 of 'made/a': expected finite"),
            ({"recall": math.inf}, "finite"),
            ({"importance": np.full(12, np.nan)}, "NaN"),
            ({"importance": np.zeros(11)}, r"importance of 12 visual tokens, got shape \(11,\)"),
            ({"keep": np.zeros((1, 12), dtype=bool)}, "kept mask of 12"),
            ({"extra": {"correct": True, "x": 1}}, "must not be called correct, as"),
        ],
    )
    def test_what_is_no_number_or_does_not_fit_is_refused(self, more: dict, message: str):
        with pytest.raises(DataError, match=message):
            answer(**more)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"source": None}, "source must be of type str, got None"),
            ({"given": None}, "given must be of type str, got None"),
            ({"kept": True}, "kept must be of type int, got True"),
            ({"correct": 1}, "correct must be of type bool, got 1"),
            ({"layer_average": math.nan}, "finite"),
            ({"recall": "high"}, "recall must be a number or null"),
            ({"importance": "AAA="}, "the importance has 2 bytes, expected 2 for each of 12"),
            ({"kept_mask": "AA=="}, "the kept mask has 1 bytes"),
            ({"kept_mask": "!"}, "kept_mask is not base64"),
            ({"importance": 3}, "importance is not base64"),
        ],
    )
    def test_a_wrong_field_is_named(self, change: dict, message: str):
        line = json.dumps({**json.loads(answer().to_json()), **change})
        with pytest.raises(DataError, match=message):
            Answer.from_json(line)

    @pytest.mark.parametrize(
        ("line", "message"), [("[1]", "expected an object, got list"), ('{"key": "a"}', "without source, turn")]
    )
    def test_what_is_no_answer_is_refused(self, line: str, message: str):
        with pytest.raises(DataError, match=message):
            Answer.from_json(line)


class TestFiles:
    def test_a_killed_run_is_an_error_that_says_so(self, tmp_path: Path):
        write(tmp_path, {"pgp@5": answers("11111")})
        file = tmp_path / "pgp@5.jsonl"
        file.write_text(file.read_text()[:-20])
        with pytest.raises(DataError, match=r"pgp@5\.jsonl, line 5: not JSON.*breaks off.*resume"):
            load_answers(file)
        assert [a.sample for a in load_answers(file, partial=True)] == [
            ("made", "a", 0), ("made", "a", 1), ("made", "b", 0), ("made", "b", 1)
        ]  # fmt: skip

    def test_only_the_last_line_may_be_unfinished(self, tmp_path: Path):
        write(tmp_path, {"pgp@5": answers("11111")})
        file = tmp_path / "pgp@5.jsonl"
        lines = file.read_text().splitlines()
        file.write_text("\n".join([lines[0], lines[1][:-9], *lines[2:]]))
        for partial in (False, True):
            with pytest.raises(DataError, match="line 2: not JSON"):
                load_answers(file, partial=partial)

    def test_a_missing_last_newline_and_blank_lines_do_no_harm(self, tmp_path: Path):
        (tmp_path / "x.jsonl").write_text(f"\n{answer().to_json()}\n\n{answer(turn=1).to_json()}")
        assert len(load_answers(tmp_path / "x.jsonl")) == 2

    def test_a_sample_twice_is_an_error(self, tmp_path: Path):
        write(tmp_path, {"x": [answer(), answer(turn=1), answer()]})
        with pytest.raises(DataError, match="line 3: turn 0 of 'made/a' is there twice"):
            load_answers(tmp_path / "x.jsonl")


class TestFolders:
    def test_all_methods_come_in_one_order(self, tmp_path: Path):
        comparison(tmp_path)
        write(tmp_path, {"other": answers("11111")[::-1]})
        results = load_results(tmp_path)
        assert list(results.answers) == ["full", "random@25", "pgp@25", "pgp@50", "other"]
        assert all([a.sample for a in rows] == results.samples for rows in results.answers.values())
        assert results.info["other"] == {}
        assert results.info["pgp@25"]["guide"] == "tiny"

    def test_methods_can_be_chosen(self, tmp_path: Path):
        comparison(tmp_path)
        assert list(load_results(tmp_path, ["pgp@50", "full"]).answers) == ["pgp@50", "full"]
        with pytest.raises(ConfigError, match="no results of sgp@5; run them, or choose among full, pgp@25"):
            load_results(tmp_path, ["full", "sgp@5"])
        with pytest.raises(ConfigError, match="no methods chosen"):
            load_results(tmp_path, [])

    def test_an_empty_folder_is_an_error(self, tmp_path: Path):
        with pytest.raises(ConfigError, match="holds no results"):
            load_results(tmp_path)

    def test_empty_results_are_an_error(self, tmp_path: Path):
        write(tmp_path, {"full": [], "pgp@5": []})
        with pytest.raises(ConfigError, match="results of full, pgp@5 are empty"):
            load_results(tmp_path)

    def test_missing_samples_are_named(self, tmp_path: Path):
        rows = answers("11111")
        write(tmp_path, {"full": rows[1:], "pgp@5": rows[:3], "random@5": rows})
        with pytest.raises(ConfigError) as error:
            load_results(tmp_path)
        assert "full lacks 1 of 5 samples (first: turn 0 of 'made/a')" in str(error.value)
        assert "pgp@5 lacks 2 of 5 samples (first: turn 1 of 'made/b')" in str(error.value)
        assert "random" not in str(error.value)

    def test_a_method_that_was_planned_but_not_run_is_named(self, tmp_path: Path):
        write(tmp_path, {"full": answers("11111")}, {"full": {}, "pgp@5": {}})
        with pytest.raises(ConfigError, match="no results of pgp@5"):
            load_results(tmp_path)

    @pytest.mark.parametrize("change", [{"truth": "green"}, {"question": "?"}, {"type": "count"}])
    def test_other_questions_under_the_same_key_are_an_error(self, tmp_path: Path, change: dict):
        rows = answers("11111")
        write(tmp_path, {"full": rows, "pgp@5": [*rows[:2], replace(rows[2], **change), *rows[3:]]})
        with pytest.raises(DataError, match="turn 0 of 'made/b' is not the same question"):
            load_results(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[]", '{"full": 1}'])
    def test_a_broken_description_is_an_error(self, tmp_path: Path, text: str):
        write(tmp_path, {"full": answers("11111")})
        (tmp_path / "methods.json").write_text(text)
        with pytest.raises(DataError, match=r"methods\.json"):
            load_results(tmp_path)


def test_shares_by_hand():
    full, pruned = answers("11110"), answers("11010")
    assert accuracy_by_type(pruned) == {"colour": 1 / 3, "count": 1.0}
    assert accuracy(pruned).mean == 3 / 5
    # They differ in the third, and agree in the last although that is wrong.
    assert agreement(pruned, full) == 4 / 5
    assert agreement([replace(pruned[0], given=" RED")], full[:1]) == 1
    assert mean_recall([answer(recall=0.5), answer(), answer(recall=1.0), answer(recall=0.0)]) == 0.5
    assert mean_recall([answer()]) is None


def test_equal_keys_of_two_sources_are_two_samples_and_two_scenes(tmp_path: Path):
    full = [answer(source=source, turn=turn) for source in ("charts", "scenes") for turn in (0, 1)]
    pruned = [replace(row, correct=row.source == "scenes") for row in full]
    write(tmp_path, {"full": full, "pgp@5": pruned[::-1]})
    results = load_results(tmp_path)
    assert results.samples == [("charts", "a", 0), ("charts", "a", 1), ("scenes", "a", 0), ("scenes", "a", 1)]
    assert [row.correct for row in results.answers["pgp@5"]] == [False, False, True, True]
    assert accuracy(results.answers["pgp@5"]) == paired_bootstrap([0, 0, 1, 1], [0, 0, 1, 1]) == (0.5, 0, 1)


def slow_bootstrap(values: list[float], clusters: list[str], draws: int, seed: int, level: float) -> tuple:
    """As the docstring says it, one draw and one sample at a time."""
    names = sorted(set(clusters))
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(draws):
        sample = []
        for which in generator.integers(len(names), size=len(names)):
            sample += [v for v, c in zip(values, clusters, strict=True) if c == names[which]]
        means.append(sum(sample) / len(sample))
    means.sort()

    def quantile(share: float) -> float:
        place = share * (draws - 1)
        below = math.floor(place)
        above = min(below + 1, draws - 1)
        return means[below] + (place - below) * (means[above] - means[below])

    return sum(values) / len(values), quantile((1 - level) / 2), quantile((1 + level) / 2)


class TestBootstrap:
    @pytest.mark.parametrize(("draws", "seed", "level"), [(200, 0, 0.95), (37, 5, 0.8)])
    @pytest.mark.parametrize("block", [2**22, 50])
    def test_it_equals_its_slow_twin(self, draws: int, seed: int, level: float, block: int, monkeypatch):
        monkeypatch.setattr(scoring, "BLOCK", block)
        rng = np.random.default_rng(seed)
        clusters = [f"scene {c}" for c in rng.integers(9, size=40)]
        values = rng.normal(size=40).tolist()
        found = paired_bootstrap(values, clusters, draws, seed, level)
        assert found == pytest.approx(slow_bootstrap(values, clusters, draws, seed, level))

    def test_by_hand(self):
        # Two scenes, means 0 and 1: a draw's mean is 0, 1/3 or 1, with probabilities 1/4, 1/2 and 1/4.
        found = paired_bootstrap([0, 0, 1], ["a", "a", "b"], draws=4000, level=0.9)
        assert found == (1 / 3, 0, 1)
        assert paired_bootstrap([0, 0, 1], ["a", "a", "b"], draws=4000, level=0.4)[1:] == (1 / 3, 1 / 3)

    def test_the_order_of_samples_means_nothing_and_the_seed_something(self):
        rng = np.random.default_rng(1)
        values, clusters = rng.normal(size=60), rng.integers(20, size=60)
        order = rng.permutation(60)
        first = paired_bootstrap(values, clusters)
        assert first == pytest.approx(paired_bootstrap(values[order], clusters[order]))
        assert first[1:] != paired_bootstrap(values, clusters, seed=1)[1:]

    def test_one_scene_says_nothing_about_the_spread(self):
        found = paired_bootstrap([0, 1], ["a", "a"])
        assert found.mean == 0.5
        assert math.isnan(found.low)
        assert math.isnan(found.high)

    def test_equal_scenes_have_no_spread(self):
        assert paired_bootstrap([1, 1, 1], ["a", "b", "b"]) == (1, 1, 1)

    @pytest.mark.parametrize(
        ("values", "clusters", "more", "message"),
        [
            ([], [], {}, "n > 0"),
            ([1.0, 2.0], ["a"], {}, r"got \(2,\) and \(1,\)"),
            ([[1.0]], ["a"], {}, r"\(1, 1\)"),
            ([1.0, math.nan], ["a", "b"], {}, "1 of 2 differences are not finite"),
            ([1.0], ["a"], {"draws": 0}, "draws"),
            ([1.0], ["a"], {"level": 1.0}, "level"),
        ],
    )
    def test_what_cannot_be_resampled_is_refused(self, values: list, clusters: list, more: dict, message: str):
        with pytest.raises(ValueError, match=message):
            paired_bootstrap(values, clusters, **more)

    def test_intervals_cover_the_truth_only_if_scenes_are_resampled(self):
        """Samples of a scene share an effect; of 200 intervals at 90 %, about 180 have to cover the mean, 0."""
        rng = np.random.default_rng(0)
        covered = {"scenes": 0, "samples": 0}
        clusters = np.repeat(np.arange(60), 5)
        for _ in range(200):
            values = np.repeat(rng.normal(size=60), 5) + 0.5 * rng.normal(size=300)
            for name, of in (("scenes", clusters), ("samples", np.arange(300))):
                found = paired_bootstrap(values, of, draws=300, level=0.9)
                covered[name] += found.low <= 0 <= found.high
        assert 168 <= covered["scenes"] <= 192
        assert covered["samples"] < 140
