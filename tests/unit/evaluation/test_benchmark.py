"""The runner of comparisons: what it writes, figure by figure, and that it goes on where it stopped."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pgp_lightning.embedded.records import EmbeddedRecords
from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.evaluation.benchmark import Benchmark
from pgp_lightning.evaluation.cost import Schedule, prune_cost
from pgp_lightning.evaluation.flops import layer_flops, posterior_flops, projector_flops, vision_flops
from pgp_lightning.evaluation.guide_cost import scoring_flops
from pgp_lightning.evaluation.scoring import Answer, load_answers, load_results
from pgp_lightning.guides.attention import AttentionGuide
from pgp_lightning.guides.posterior import PosteriorGuide
from pgp_lightning.guides.simple import AnotherQuestion
from pgp_lightning.prefill import KeepAll, pruned
from pgp_lightning.pruners.divprune import DivPrune
from pgp_lightning.pruners.fastv import FastV
from pgp_lightning.pruners.guided import Guided
from pgp_lightning.pruners.vision_zip import VisionZip
from pgp_lightning.vlm.inputs import generate, prompt_inputs, read_answers
from pgp_lightning.vlm.loading import load_vlm
from pgp_lightning.vlm.request import Request
from pgp_lightning.vlm.tiles import TileGrid, cut_tiles
from tests.unit.evaluation.scenes_made import (
    FAMILIES,
    LONGEST,
    Counted,
    Last,
    Scenes,
    contents,
    make,
    write_scenes,
)

N, TILES, DEPTH = 320, 5, 4
# Label -> the layer before which it prunes.
LAYERS = {"pgp": 0, "pgp_L2": 2, "fastv": 0, "fastv_L2": 2, "divprune": 0, "vision_zip": 0, "uniform": 0, "random": 0,
          "oracle": 0}  # fmt: skip
ALONE = {"guide_image_first": "image_first", "guide_question_first": "question_first"}


def posterior() -> PosteriorGuide:
    return PosteriorGuide.from_pretrained("embedded:pgp_seed0")


def records() -> list[dict[str, Any]]:
    """Return the records of the manifest in their order."""
    return [EmbeddedRecords("test", name, size)[i][3] for name, size in FAMILIES.items() for i in range(size)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def folder(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of several methods at two budgets."""
    guide = posterior()
    methods = {
        "pgp": Guided(guide),
        "pgp_L2": Guided(guide, layer=2),
        "fastv": FastV(layer=0, score_layer=2),
        "fastv_L2": FastV(layer=2),
        "divprune": DivPrune(),
        "vision_zip": VisionZip(),
    }
    found = tmp_path_factory.mktemp("results")
    described = {"methods": {"pgp": {"init_args": {"guide": {"class_path": "a.Guide.load", "init_args": {"b": "c"}}}}}}
    options = {"guide_alone": "embedded:guide", "keep_importance": ("pgp",)}
    make(manifest, methods, **options).run(found, described)
    return found


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: load_vlm(f"embedded:{name}") for name in ("answer_model", "guide")}


def lines(folder: Path) -> Iterator[tuple[str, float | None, Answer]]:
    """Yield all answers with their label and budget."""
    for path in sorted(folder.glob("*.jsonl")):
        label, _, percent = path.stem.rpartition("@")
        for answer in load_answers(path):
            yield (label, float(percent) / 100, answer) if label else (path.stem, None, answer)


# What is written


def test_every_method_answers_every_question_once_and_in_order(folder: Path):
    expected = {f"{label}@{budget}" for label in LAYERS for budget in (5, 20)} | {"full", *ALONE}
    assert {path.stem for path in folder.glob("*.jsonl")} == expected
    assert list(json.loads((folder / "methods.json").read_text())) == list(load_results(folder).answers)
    for name, answers in load_results(folder).answers.items():
        asked = [(record, place, turn) for record in records() for place, turn in enumerate(record["turns"][:2])]
        for answer, (record, place, turn) in zip(answers, asked, strict=True):
            assert answer.sample == (record["id"].split("-")[1], record["id"], place), name
            assert (answer.question, answer.truth, answer.type) == (turn["question"], turn["answer"], turn["type"])


def test_controls_always_run(manifest: Path, tmp_path: Path):
    make(manifest, {}, keep_ratios=(0.01,), images=1, questions_per_image=1, max_new_tokens=1).run(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.jsonl")} == {"full", "random@1", "uniform@1", "oracle@1"}
    (oracle,) = load_answers(tmp_path / "oracle@1.jsonl")
    # All that so few tokens could hold.
    assert oracle.recall == 1.0 and oracle.kept == 3 < len(records()[0]["turns"][0]["relevant"])


def test_budgets_are_kept_counts(folder: Path):
    for label, ratio, answer in lines(folder):
        kept = N if ratio is None else {0.05: 16, 0.2: 64}[ratio]
        assert answer.n == N and answer.kept == kept, label
        assert answer.keep is not None and int(answer.keep.sum()) == kept, label


def test_figures_are_those_of_the_kept_masks(folder: Path, models: dict[str, Any]):
    relevant = {
        (r["id"].split("-")[1], r["id"], place): set(turn["relevant"])
        for r in records()
        for place, turn in enumerate(r["turns"])
    }
    seen = set()
    for label, ratio, answer in lines(folder):
        vlm, depth = models["guide" if label in ALONE else "answer_model"], DEPTH - (label in ALONE)
        assert depth == len(vlm.decoder_layers)
        layer = depth if ratio is None else LAYERS[label]
        assert answer.correct == (answer.given.lower() == answer.truth.lower())
        assert answer.layer_average == pytest.approx((layer * N + (depth - layer) * answer.kept) / depth)
        prompt = vlm.processor.prompt(answer.question, None, ALONE.get(label, "image_first"))
        text = len(prompt.before) + len(prompt.after)
        assert answer.kv_entries == layer * N + (depth - layer) * answer.kept + depth * text
        assert answer.keep is not None
        kept, matter = set(answer.keep.nonzero()[0].tolist()), relevant[answer.sample]
        assert answer.recall == pytest.approx(len(kept & matter) / min(len(kept), len(matter)))
        steps = min(LONGEST, len(answer.given.split()) + 1)
        # Only what a guide chooses before layer 0 spares tiles: scores of others take the vision tower's output.
        spares = label in ("pgp", "uniform", "random", "oracle")
        encoded = len({place // (N // TILES) for place in kept}) if spares else TILES
        schedule = Schedule(N, (N,) * layer + (answer.kept,) * (depth - layer))
        cost = prune_cost(
            vlm.model.config, schedule, tiles=TILES, text=text, new_tokens=steps, tiles_encoded=encoded
        ).answer_model
        scoring = {"pgp": pgp_flops, "pgp_L2": pgp_flops, "fastv": fastv_flops, "fastv_L2": row_flops}
        if label in ("divprune", "vision_zip"):
            tiles = torch.zeros(TILES, 3, 128, 128, dtype=torch.uint8)
            request = Request([answer.question], tiles, [TileGrid(2, 2, 8, True)])
            pruner = (DivPrune() if label == "divprune" else VisionZip()).at(ratio or 1.0)
            (guide,) = scoring_flops(pruner, vlm, request, [text])
        else:
            guide = scoring.get(label, lambda *_: 0)(models, answer)
        assert answer.extra == {
            "flops": cost, "guide_flops": guide, "tiles": TILES, "tiles_encoded": encoded, "new_tokens": steps
        }, label  # fmt: skip
        seen.add((label, encoded, answer.correct))
    assert len({encoded for _, encoded, _ in seen}) > 2 and {right for _, _, right in seen} == {True, False}


def pgp_flops(models: dict[str, Any], answer: Answer) -> int:
    vlm = models["guide"]
    before = len(vlm.processor.prompt(answer.question, None, "question_first").before)
    return posterior_flops(vlm.model.config, TILES, before, lora_rank=32)


def fastv_flops(models: dict[str, Any], answer: Answer) -> int:
    """One layer of the answer model and its tower once more, and the row of attention."""
    config, whole = models["answer_model"].model.config, slots(models, answer)
    once_more = vision_flops(config, TILES) + projector_flops(config, TILES) + layer_flops(config, whole)
    return once_more + row_flops(models, answer)


def row_flops(models: dict[str, Any], answer: Answer) -> int:
    """The keys of all slots, one query, and their products."""
    text, whole = models["answer_model"].model.config.text_config, slots(models, answer)
    head = text.hidden_size // text.num_attention_heads
    keys, query = head * text.num_key_value_heads, head * text.num_attention_heads
    return 2 * (whole * text.hidden_size * keys + text.hidden_size * query + whole * query)


def slots(models: dict[str, Any], answer: Answer) -> int:
    prompt = models["answer_model"].processor.prompt(answer.question, None, "image_first")
    return N + len(prompt.before) + len(prompt.after)


def test_answers_and_masks_are_those_of_a_question_by_itself(folder: Path, models: dict[str, Any]):
    vlm, guide, found = models["answer_model"], posterior(), load_results(folder).answers
    scenes = [EmbeddedRecords("test", name, size) for name, size in FAMILIES.items()]  # type: ignore[arg-type]
    for place, (records_, index) in {0: (scenes[0], 0), 3: (scenes[0], 1), 9: (scenes[1], 1)}.items():
        tiles, grid = cut_tiles(Image.open(io.BytesIO(records_[index][1])).convert("RGB"), vlm.processor.rule)
        request = Request([found["full"][place].question], torch.from_numpy(tiles), [grid])
        inputs = prompt_inputs(vlm, request)
        for name, pruner in {"full": KeepAll(), "pgp@5": Guided(guide), "fastv_L2@20": FastV(2, 0.2)}.items():
            with pruned(vlm, pruner, inputs, request) as run:
                (given,) = read_answers(vlm, generate(vlm, inputs, LONGEST))
            answer = found[name][place]
            assert answer.given == given, name
            assert answer.keep is not None and answer.keep.tolist() == run.kept[-1][0].tolist(), name


def test_importance_is_kept_for_the_methods_asked_for(folder: Path):
    for label, ratio, answer in lines(folder):
        assert (answer.importance is not None) == (label == "pgp")
        if answer.importance is not None and ratio == 0.05:
            assert answer.keep is not None
            # float16 may make equals of neighbours, but never turns them round.
            assert answer.importance[answer.keep].min() >= answer.importance[~answer.keep].max()


def test_methods_are_described(folder: Path):
    found = json.loads((folder / "methods.json").read_text())
    assert found["pgp@5"]["guide"] == "Guide(c)" and found["pgp_L2@5"]["guide"] == "PosteriorGuide"
    assert all(found[f"{name}@5"]["guide"] is None for name in ("fastv", "random", "uniform", "oracle"))
    assert found["pgp_L2@20"]["layers"] == [2] and found["pgp_L2@20"]["keep_ratio"] == 0.2
    assert found["full"]["keep_ratio"] == 1 and found["full"]["tiles_encoded"] == 1
    for name, about in found.items():
        answers = load_answers(folder / f"{name}.jsonl")
        assert about["name"] == name.partition("@")[0] and about["positions"] == "original"
        for field in ("flops", "guide_flops"):
            assert about[field] == pytest.approx(sum(answer.extra[field] for answer in answers) / len(answers))
        encoded = [answer.extra["tiles_encoded"] / TILES for answer in answers]
        assert about["tiles_encoded"] == pytest.approx(sum(encoded) / len(encoded))


def test_times_are_taken_one_question_at_a_time(manifest: Path, tmp_path: Path):
    methods = {"pgp": Guided(posterior()), "last": Last()}
    options = {"keep_ratios": (0.05,), "images": 1, "timed_images": 2, "max_new_tokens": 1}
    make(manifest, methods, **options).run(tmp_path)
    for name, about in json.loads((tmp_path / "methods.json").read_text()).items():
        assert about["latency"] and all(value >= 0 for value in about["latency"].values()), name
        assert sum(about["latency"].values()) > 0


# Guides and batches


def test_a_guide_is_asked_once_a_batch(manifest: Path, tmp_path: Path):
    once, other, twice = Counted(0.5), Counted(0.5), Counted(0.25)
    methods = {"a": Guided(once), "b": Guided(other, layer=2), "c": Guided(twice)}
    make(manifest, methods, images=4, max_new_tokens=1).run(tmp_path)
    # Two batches, two budgets; of two guides that are alike one is asked, and the other is let go.
    assert [len(call) for call in once.calls] == [len(call) for call in twice.calls] == [4, 4] and not other.calls
    assert methods["b"].guide is once and methods["c"].guide is twice
    assert not once.training and other.training


def test_the_pruners_given_stay_as_they_are(manifest: Path, tmp_path: Path):
    guide = Counted()
    given = Guided(guide, keep_ratio=0.5)
    make(manifest, {"a": given}, images=1, max_new_tokens=1).run(tmp_path)
    assert given.guide is guide and given.keep_ratio == 0.5 and given.importance is None


@pytest.fixture(scope="module")
def by_batch_size(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    guide = posterior()

    def run(size: int) -> Path:
        methods = {
            "pgp": Guided(guide),
            "renumbered": Guided(guide, layer=1, renumber=True),
            "another": Guided(AnotherQuestion(guide)),
            "sgp": Guided(AttentionGuide(guide_base)),
            "fastv": FastV(layer=0, score_layer=2),
            "fastv_L2": FastV(layer=2),
            "divprune": DivPrune(),
            "vision_zip": VisionZip(),
        }
        found = tmp_path_factory.mktemp(f"batch{size}")
        make(manifest, methods, keep_ratios=(0.05,), batch_size=size, images=4).run(found, {"batch_size": size})
        return found

    guide_base = load_vlm("embedded:guide")
    return run


def test_answers_do_not_depend_on_the_batch_size(by_batch_size: Callable[[int], Path]):
    one, *others = (load_results(by_batch_size(size)).answers for size in (1, 2, 4))
    assert len(one) == 12
    for other in others:
        for name, answers in one.items():
            for mine, theirs in zip(answers, other[name], strict=True):
                assert mine == theirs, name
                assert mine.keep is not None and theirs.keep is not None
                assert mine.keep.tolist() == theirs.keep.tolist(), name


@pytest.mark.parametrize("size", [1, 2, 5])
def test_other_questions_are_about_the_image_before(manifest: Path, tmp_path: Path, size: int):
    guide = Counted()
    options = {"keep_ratios": (0.05,), "batch_size": size, "max_new_tokens": 1, "questions_per_image": 3}
    make(manifest, {"a": Guided(guide)}, **options).run(tmp_path)
    scenes = [[turn["question"] for turn in record["turns"]] for record in records()]
    expected = []
    for place, questions in enumerate(scenes):
        before = scenes[place - 1 if place else 1]
        expected += [(asked, next(q for q in before if q != asked)) for asked in questions[:3]]
    assert [pair for call in guide.calls for pair in call] == expected


def test_two_runs_write_the_same(manifest: Path, tmp_path: Path):
    for name in ("one", "two"):
        methods = {"pgp": Guided(posterior()), "last": Last()}
        options = {"images": 2, "keep_importance": ("pgp", "random"), "keep_ratios": (0.1,)}
        make(manifest, methods, **options).run(tmp_path / name, {"images": 2})
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# What cannot work


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": {"full": Last()}}, "cannot be called 'full'"),
        ({"methods": {"guide_image_first": Last()}}, "cannot be called 'guide_image_first'"),
        ({"methods": {"a@5": Last()}}, "cannot be called 'a@5'"),
        ({"methods": {"a/b": Last()}}, "cannot be called 'a/b'"),
        ({"methods": {"": Last()}}, "cannot be called ''"),
        ({"keep_ratios": ()}, "keep_ratios must be different budgets"),
        ({"keep_ratios": (0.1, 0.1)}, "keep_ratios must be different budgets"),
        ({"keep_ratios": (0.1, 0.10000001)}, "keep_ratios must be different budgets"),
        ({"keep_ratios": (0.0,)}, r"in \(0, 1\), at least one, got \[0.0\]"),
        ({"keep_ratios": (0.1, 1.5)}, r"in \(0, 1\)"),
        ({"keep_ratios": (1.0,)}, "the full model always runs"),
        ({"keep_importance": ("a", "pgb")}, r"keep_importance names \['pgb'\], which are no methods"),
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"questions_per_image": 0}, "questions_per_image must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"timed_images": -1}, "timed_images must be at least 1, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        Benchmark(**{"methods": {"a": Last()}, "manifest": "none.yaml", **options})


def test_records_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sources = (Scenes("objects", 3, broken=(1,)), Scenes("reading", 2, broken=(0,)))
    manifest = write_scenes(tmp_path, *sources, allowed_rejects=0.5)
    for size in (1, 5):
        make(manifest, {}, keep_ratios=(0.05,), batch_size=size, max_new_tokens=1).run(tmp_path / f"by {size}")
        counted = capsys.readouterr().out.splitlines()
        assert counted == [f"left out: 1 records, {name}/bad-image" for name in ("objects", "reading")]
    keys = {answer.key for answer in load_answers(tmp_path / "by 1" / "full.jsonl")}
    assert keys == {"test-objects-000000", "test-objects-000002", "test-reading-000001"}
    assert contents(tmp_path / "by 1") == contents(tmp_path / "by 5")


def test_a_source_with_too_many_of_them_fails(tmp_path: Path):
    manifest = write_scenes(tmp_path, Scenes("objects", 3, broken=(1,)))
    with pytest.raises(DataError, match=r"source 'objects' .* cannot be used"):
        make(manifest, {}, max_new_tokens=1).run(tmp_path / "results")
    manifest = write_scenes(tmp_path / "all", Scenes("objects", 2, broken=(0, 1)), allowed_rejects=1.0)
    with pytest.raises(DataError, match=r"none of the records of 'test' in .* can be used"):
        make(manifest, {}, max_new_tokens=1).run(tmp_path / "results")


def test_without_relevant_tokens_there_is_no_oracle_and_no_recall(tmp_path: Path):
    manifest = write_scenes(tmp_path, Scenes("objects", 1, known=False))
    make(manifest, {"a": Last()}, keep_ratios=(0.05,), max_new_tokens=1).run(tmp_path / "results")
    names = {path.stem for path in (tmp_path / "results").glob("*.jsonl")}
    assert names == {"full", "a@5", "uniform@5", "random@5"}
    assert all(answer.recall is None for _, _, answer in lines(tmp_path / "results"))


def test_where_some_relevant_tokens_are_unknown_the_oracle_is_random(tmp_path: Path):
    manifest = write_scenes(tmp_path, Scenes("objects", 1), Scenes("reading", 1, known=False))
    for size in (1, 2):
        options = {"keep_ratios": (0.05,), "batch_size": size, "max_new_tokens": 1, "timed_images": 2}
        make(manifest, {}, **options).run(tmp_path / f"by {size}")
    oracle, random = (load_answers(tmp_path / "by 1" / f"{name}@5.jsonl") for name in ("oracle", "random"))
    assert [answer.recall for answer in oracle] == [1.0, 1.0, None, None]
    for mine, theirs in list(zip(oracle, random, strict=True))[2:]:
        assert mine.keep is not None and theirs.keep is not None
        assert mine.keep.tolist() == theirs.keep.tolist()
    for name in ("oracle@5", "random@5", "full"):
        assert (tmp_path / "by 1" / f"{name}.jsonl").read_bytes() == (tmp_path / "by 2" / f"{name}.jsonl").read_bytes()
