"""A comparison that was stopped goes on where it was, and results of other settings are never mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.evaluation import benchmark
from pgp_lightning.evaluation.cost import Schedule, prune_cost
from pgp_lightning.evaluation.report import write_report
from pgp_lightning.evaluation.resume import PART, WHOLE, alike, attributes, check_settings, fingerprint
from pgp_lightning.evaluation.scoring import load_answers
from pgp_lightning.guides.simple import AnotherQuestion, RandomGuide, UniformGuide
from pgp_lightning.prefill import Pruner
from pgp_lightning.prefill_state import PrefillState
from pgp_lightning.pruners.divprune import DivPrune
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.selection import keep_top
from pgp_lightning.vlm.inputs import generate
from pgp_lightning.vlm.loading import load_vlm
from tests.unit.evaluation.scenes_made import Counted, Last, Scenes, contents, make, write_scenes


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


DESCRIBED = {"seed": 0, "methods": {"pgp": {"init_args": {"layer": 0}}, "last": {"init_args": {}}}}


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
    noted = json.loads(after["benchmark.json"])["methods"]
    assert {name: method["configuration"] for name, method in noted.items()} == {"a": {}, "b": {}}
    # So do a budget that is added later and a control.
    generations.clear()
    make(manifest, {"b": DivPrune()}, keep_ratios=(0.05, 0.5), **options).run(tmp_path, {"methods": {"b": {}}})
    assert generations == [4] * 4  # oracle, b, uniform, random


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "another seed (0, now 1)"),
        ({"methods": {"pgp": {"init_args": {"layer": 1}}}}, "methods.pgp.configuration.init_args.layer (0, now 1)"),
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
    noted = json.loads((tmp_path / "benchmark.json").read_text())
    assert noted["methods"]["deep"]["configuration"] == right["methods"]["deep"] and "batch_size" not in noted
    # A method may be called like a setting.
    named = {"methods": {"split": {"a": 1}}}
    make(manifest, {"split": Last()}, **options).run(tmp_path, named)
    with pytest.raises(ConfigError, match=r"another split \(test, now val\)"):
        make(manifest, {"split": Last()}, split="val", **options).run(tmp_path, named)


def test_a_run_that_failed_before_its_first_answer_binds_nobody(tmp_path: Path):
    note = tmp_path / "benchmark.json"
    check_settings(note, {"split": "test", "methods": {"a": {"x": 1}}})
    (tmp_path / "full.jsonl").touch()
    check_settings(note, {"split": "val", "methods": {"a": {"x": 2}}, "batch_size": 3})
    assert json.loads(note.read_text()) == {"split": "val", "methods": {"a": {"x": 2}}}
    (tmp_path / "full.jsonl").write_text("{}\n")
    check_settings(note, {"split": "val", "methods": {"a": {"x": 3}}})
    with pytest.raises(ConfigError, match=r"another split \(val, now test\)"):
        check_settings(note, {"split": "test"})
    (tmp_path / "a@5.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"another methods\.a\.x \(3, now 1\)"):
        check_settings(note, {"methods": {"a": {"x": 1}}})


def test_damaged_results_are_named(manifest: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    make(manifest, {}, images=1, max_new_tokens=1).run(copy)
    path = copy / "full.jsonl"
    path.write_text(path.read_text().replace('"turn": 0', '"turn": "x"', 1))
    with pytest.raises(DataError, match=r"full\.jsonl, line 1: turn must be of type int"):
        make(manifest, {}, images=1, max_new_tokens=1).run(copy)
    (copy / "benchmark.json").write_text('{"methods": {')
    with pytest.raises(ConfigError, match=r"benchmark\.json is damaged .*give another folder, or remove it"):
        make(manifest, {}, images=1, max_new_tokens=1).run(copy)


# By what methods are known to be the same

FEW = {"images": 1, "questions_per_image": 1, "max_new_tokens": 1, "keep_ratios": (0.05,)}


@pytest.mark.parametrize(
    ("then", "now", "key"),
    [
        (Guided(Counted(0.5)), Guided(Counted(0.25)), "weights"),
        (Guided(RandomGuide(0)), Guided(RandomGuide(1)), "attributes.guide.seed (0, now 1)"),
        (Guided(UniformGuide()), Guided(UniformGuide(), layer=2), "attributes.layers ([0], now [2])"),
        (Guided(UniformGuide()), DivPrune(), "attributes.class"),
    ],
)
def test_another_pruner_under_the_same_name_is_refused(
    manifest: Path, tmp_path: Path, then: Pruner, now: Pruner, key: str
):
    """Also where no configuration tells, as from Python, or the same: a guide that was trained again in its folder."""
    make(manifest, {"mine": then}, **FEW).run(tmp_path)
    before = contents(tmp_path)
    for described in ({}, {"methods": {"mine": {"init_args": {}}}}):
        with pytest.raises(ConfigError) as error:
            make(manifest, {"mine": now}, **FEW).run(tmp_path, described)
        assert f"another methods.mine.{key}" in str(error.value) and "give another folder, or remove" in str(
            error.value
        )
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"images": 2}, "images (1, now 2)"),
        ({"questions_per_image": 2}, "questions_per_image (1, now 2)"),
        ({"max_new_tokens": 2}, "max_new_tokens (1, now 2)"),
        ({"order": "question_first"}, "order (image_first, now question_first)"),
        ({"dtype": "bfloat16"}, "dtype (float32, now bfloat16)"),
        ({"max_tiles": 2}, "max_tiles (None, now 2)"),
        ({"answer_model": "embedded:guide"}, "answer_model (embedded:answer_model, now embedded:guide)"),
    ],
)
def test_settings_are_compared_without_a_configuration(
    manifest: Path, tmp_path: Path, change: dict[str, Any], key: str
):
    make(manifest, {}, **FEW).run(tmp_path)
    with pytest.raises(ConfigError, match="holds results with another") as error:
        make(manifest, {}, **{**FEW, **change}).run(tmp_path)
    assert key in str(error.value)
    # These do not change an answer.
    make(manifest, {}, **FEW, batch_size=5, keep_importance=("random",)).run(tmp_path)


def test_an_answer_model_of_other_weights_is_refused(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(manifest, {}, **FEW).run(tmp_path)

    def retrained(*arguments: Any) -> Any:
        vlm = load_vlm(*arguments)
        with torch.no_grad():
            next(vlm.model.parameters()).view(-1)[-1] += 1
        return vlm

    monkeypatch.setattr(benchmark, "load_vlm", retrained)
    with pytest.raises(ConfigError, match=r"another weights\.answer_model \(\w{16}, now \w{16}\)"):
        make(manifest, {}, **FEW).run(tmp_path)


def test_a_fingerprint_is_of_names_types_shapes_and_values():
    def module(values: torch.Tensor, name: str = "a") -> nn.Module:
        found = nn.Module()
        found.register_buffer(name, values)
        return found

    zeros = torch.zeros(2, 3)
    changed = zeros.clone()
    changed[1, 2] = 1e-30
    kinds = [module(zeros), module(changed), module(zeros, "b"), module(zeros.half()), module(zeros.view(3, 2))]
    assert len({fingerprint(kind) for kind in kinds}) == 5
    assert fingerprint(module(zeros)) == fingerprint(module(zeros.clone()))
    assert fingerprint(module(torch.tensor(True))) != fingerprint(module(torch.tensor(False)))
    for place, seen in ((0, True), (PART - 1, True), (PART, False), (-PART, True), (-1, True)):
        large = torch.zeros(WHOLE + 1, dtype=torch.bfloat16)
        before = fingerprint(module(large))
        large[place] = 1
        assert (fingerprint(module(large)) != before) == seen
    whole = torch.zeros(WHOLE, dtype=torch.bfloat16)
    before = fingerprint(module(whole))
    whole[PART] = 1
    assert fingerprint(module(whole)) != before


def test_guides_are_alike_only_if_all_they_hold_is():
    def holding(value: object) -> Counted:
        guide = Counted()
        guide.held = value  # type: ignore[assignment]
        return guide

    assert alike(Counted(0.5)) == alike(Counted(0.5)) != alike(Counted(0.25))
    assert alike(AnotherQuestion(RandomGuide(3))) == alike(AnotherQuestion(RandomGuide(3)))
    assert alike(AnotherQuestion(RandomGuide(3))) != alike(AnotherQuestion(RandomGuide(4)))
    assert alike(holding({"a": [1, None]})) == alike(holding({"a": [1, None]})) != alike(holding({"a": [2, None]}))
    mine, others = object(), object()
    assert alike(holding(mine)) == alike(holding(mine)) != alike(holding(others))
    found = attributes(Guided(AnotherQuestion(RandomGuide(3)), keep_ratio=0.5, max_tiles_kept=2).train())
    assert found == {
        "class": "pgp_lightning.pruners.guided.Guided",
        "layers": [0],
        "renumber": False,
        "max_tiles_kept": 2,
        "skip_tiles": True,
        "guide.class": "pgp_lightning.guides.simple.AnotherQuestion",
        "guide.guide.class": "pgp_lightning.guides.simple.RandomGuide",
        "guide.guide.seed": 3,
    }


# What becomes of the rest


def test_times_stay_where_none_are_taken(manifest: Path, tmp_path: Path):
    make(manifest, {}, **FEW, timed_images=1).run(tmp_path)
    before = contents(tmp_path)
    make(manifest, {}, **FEW).run(tmp_path)
    assert contents(tmp_path) == before
    assert all(about["latency"] for about in json.loads(before["methods.json"]).values())


def test_two_sources_may_have_records_of_one_key(tmp_path: Path):
    sources = Scenes("objects", 2, name="one"), Scenes("objects", 2, name="two")
    manifest, results = write_scenes(tmp_path, *sources), tmp_path / "results"
    for size in (1, 4):
        make(manifest, {}, batch_size=size, max_new_tokens=1, keep_ratios=(0.05,)).run(results)
        answers = load_answers(results / "oracle@5.jsonl")
        assert len({answer.key for answer in answers}) == 2 and len({answer.sample for answer in answers}) == 8
        assert [answer.source for answer in answers] == ["one"] * 4 + ["two"] * 4


class FullDepth(Pruner):
    """Keeps the first tokens before layer 2, in the caches behind too; has a parameter, so that its cost is unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.keep_ratio, self.layers = 0.1, (2,)
        self.weight = nn.Parameter(torch.zeros(1))

    def before_layer(self, depth: int, state: PrefillState) -> PrefillState:
        if depth != 2:
            return state
        place = torch.arange(int(state.counts.max()), dtype=torch.float32).expand(len(state.hidden), -1)
        scores = (-place).masked_fill(place >= state.counts[:, None], -torch.inf)
        return state.keep_tokens(keep_top(scores, self.keep_ratio), full_depth=True)


def test_layers_are_charged_for_what_they_read_and_caches_for_what_they_hold(manifest: Path, tmp_path: Path):
    make(manifest, {"mine": FullDepth()}, **{**FEW, "max_new_tokens": 4}).run(tmp_path)
    (answer,) = load_answers(tmp_path / "mine@5.jsonl")
    vlm = load_vlm("embedded:answer_model")
    prompt = vlm.processor.prompt(answer.question, None, "image_first")
    text = len(prompt.before) + len(prompt.after)
    read, held = (320 + text, 320 + text, 16 + text, 16 + text), (16 + text,) * 4
    options: dict[str, Any] = {"tiles": 5, "text": text, "new_tokens": answer.extra["new_tokens"]}
    cost = prune_cost(vlm.model.config, Schedule(320, (320, 320, 16, 16)), **options, cached=held)
    assert answer.kv_entries == sum(held) and answer.layer_average == 168 and answer.extra["flops"] == cost.answer_model
    # Nothing but the decoding differs, and nothing at all if it is the whole that is read and held.
    plain = prune_cost(vlm.model.config, Schedule(320, (320, 320, 16, 16)), **options)
    assert cost.prefill == plain.prefill and cost.decode < plain.decode
    full = Schedule(320, (320,) * 4)
    given = prune_cost(vlm.model.config, full, **options, slots=read, cached=read)
    assert (given.prefill, given.decode) == (plain.prefill, plain.decode)
    # What its scores cost nobody has said.
    assert answer.extra["guide_flops"] is None
    about = json.loads((tmp_path / "methods.json").read_text())
    assert about["mine@5"]["guide_flops"] is None and about["random@5"]["guide_flops"] == 0
    assert {row.method for row in write_report(tmp_path).rows if row.flops is None} == {"mine@5"}
