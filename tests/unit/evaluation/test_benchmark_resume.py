"""A comparison that was stopped goes on where it was, and results of other settings are never mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.evaluation import benchmark
from pgp_lightning.evaluation.resume import check_settings
from pgp_lightning.evaluation.scoring import load_answers
from pgp_lightning.guides.simple import UniformGuide
from pgp_lightning.pruners.divprune import DivPrune
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.vlm.inputs import generate
from tests.unit.evaluation.scenes_made import Last, contents, make, write_scenes


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every call that generates."""
    calls: list[int] = []

    def counted(vlm: Any, inputs: dict[str, Any], longest: int) -> Any:
        calls.append(len(inputs["input_ids"]))
        return generate(vlm, inputs, longest)

    monkeypatch.setattr(benchmark, "generate", counted)
    return calls


DESCRIBED = {"split": "test", "methods": {"pgp": {"init_args": {"layer": 0}}, "last": {"init_args": {}}}}


def test_a_stopped_run_goes_on_and_becomes_the_whole_one(manifest: Path, tmp_path: Path, generations: list[int]):
    def run(folder: Path, fail_at: int | None = None, **options: Any) -> None:
        methods = {"uni": Guided(UniformGuide()), "last": Last(fail_at=fail_at)}
        make(manifest, methods, **options).run(folder, DESCRIBED)

    run(tmp_path / "whole")
    whole = len(generations)
    assert whole == 3 * 11  # batches times methods
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", fail_at=3)
    assert not (tmp_path / "cut" / "methods.json").exists()
    assert [len(load_answers(tmp_path / "cut" / f"last@{budget}.jsonl")) for budget in (5, 20)] == [6, 2]
    # Killed while writing: half a line, and a line without its newline.
    for name, lost in (("uni@5", 40), ("last@5", 1), ("full", 200)):
        path = tmp_path / "cut" / f"{name}.jsonl"
        path.write_bytes(path.read_bytes()[:-lost])
    generations.clear()
    run(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert 11 < len(generations) < whole
    generations.clear()
    run(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole") and not generations
    # Whatever the batches, nothing is there twice.
    path = tmp_path / "cut" / "uni@5.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    run(tmp_path / "cut", batch_size=5)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole") and len(generations) == 1


def test_a_method_added_later_runs_alone(manifest: Path, tmp_path: Path, generations: list[int]):
    options = {"images": 2, "max_new_tokens": 1}
    make(manifest, {"a": Last()}, **options).run(tmp_path, {"methods": {"a": {}}})
    before = contents(tmp_path)
    generations.clear()
    make(manifest, {"b": DivPrune()}, **options).run(tmp_path, {"methods": {"b": {}}})
    assert generations == [4, 4]  # two budgets
    after = contents(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} == {
        "b@5.jsonl", "b@20.jsonl", "methods.json", "benchmark.json"
    }  # fmt: skip
    assert {"a@5", "b@5"} <= json.loads(after["methods.json"]).keys()
    assert json.loads(after["benchmark.json"])["methods"] == {"a": {}, "b": {}}
    # So do a budget that is added later and a control.
    generations.clear()
    make(manifest, {"b": DivPrune()}, keep_ratios=(0.05, 0.5), **options).run(tmp_path, {"methods": {"b": {}}})
    assert generations == [4] * 4  # oracle, b, uniform, random


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"split": "val"}, "another split (test, now val)"),
        ({"methods": {"pgp": {"init_args": {"layer": 1}}}}, "another methods.pgp ({'init_args': {'layer': 0}}"),
    ],
)
def test_results_of_another_configuration_are_refused(manifest: Path, tmp_path: Path, change: dict[str, Any], key: str):
    options = {"images": 1, "max_new_tokens": 1, "keep_ratios": (0.05,)}
    make(manifest, {"pgp": Last()}, **options).run(tmp_path, DESCRIBED)
    before = contents(tmp_path)
    with pytest.raises(ConfigError) as error:
        make(manifest, {"pgp": Last()}, **options).run(tmp_path, {**DESCRIBED, **change})
    assert key in str(error.value) and str(tmp_path) in str(error.value) and "give another folder" in str(error.value)
    assert contents(tmp_path) == before


def test_what_has_no_answers_yet_may_change(manifest: Path, tmp_path: Path):
    options = {"images": 1, "max_new_tokens": 1, "keep_ratios": (0.05,)}
    with pytest.raises(ConfigError, match="cannot prune before layer 9"):
        deep = {"methods": {"deep": {"init_args": {"layer": 9}}}}
        make(manifest, {"deep": Guided(UniformGuide(), layer=9)}, **options).run(tmp_path, deep)
    right = {"methods": {"deep": {"init_args": {"layer": 1}}}, "batch_size": 3}
    make(manifest, {"deep": Guided(UniformGuide(), layer=1)}, **options).run(tmp_path, right)
    assert json.loads((tmp_path / "benchmark.json").read_text()) == {"methods": right["methods"]}
    # A method may be called like a setting.
    named = {"methods": {"split": {"a": 1}}, "split": "test"}
    make(manifest, {"split": Last()}, **options).run(tmp_path, named)
    with pytest.raises(ConfigError, match=r"another split \(test, now val\)"):
        make(manifest, {"split": Last()}, **options).run(tmp_path, {**named, "split": "val"})


def test_a_run_that_failed_before_its_first_answer_binds_nobody(tmp_path: Path):
    note = tmp_path / "benchmark.json"
    check_settings(note, {"split": "test", "methods": {"a": 1}})
    (tmp_path / "full.jsonl").touch()
    check_settings(note, {"split": "val", "methods": {"a": 2}, "batch_size": 3})
    assert json.loads(note.read_text()) == {"split": "val", "methods": {"a": 2}}
    (tmp_path / "full.jsonl").write_text("{}\n")
    check_settings(note, {"split": "val", "methods": {"a": 3}})
    with pytest.raises(ConfigError, match=r"another split \(val, now test\)"):
        check_settings(note, {"split": "test"})
    (tmp_path / "a@5.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"another methods\.a \(3, now 1\)"):
        check_settings(note, {"methods": {"a": 1}})


def test_damaged_results_are_named(manifest: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    make(manifest, {}, images=1, max_new_tokens=1).run(copy)
    path = copy / "full.jsonl"
    path.write_text(path.read_text().replace('"turn": 0', '"turn": "x"', 1))
    with pytest.raises(DataError, match=r"full\.jsonl, line 1: turn must be of type int"):
        make(manifest, {}, max_new_tokens=1).run(copy)
    (copy / "benchmark.json").write_text('{"methods": {')
    with pytest.raises(ConfigError, match=r"benchmark\.json is damaged .*give another folder, or remove it"):
        make(manifest, {}, max_new_tokens=1).run(copy)
