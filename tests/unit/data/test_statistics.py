"""Statistics of a split, against a twin that opens every tar with the standard library and sorts plain lists."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from data_world import PictureBuilder, picture
from PIL import Image
from raw_world import PickyBuilder

from pgp_lightning.data.manifest import Manifest
from pgp_lightning.data.statistics import Gauge, SplitStatistics, measure_split, summarise
from pgp_lightning.data.writing import write_source
from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.evaluation.statistics_report import as_json, caption, histograms, percentiles
from pgp_lightning.vlm.tiles import TileRule
from tests.tiny import tiny_processor


@dataclass(frozen=True)
class StatedBuilder(PictureBuilder):
    """Records of many sizes that state them, with one to three turns; those in `broken` lack an answer."""

    def __getitem__(self, index: int) -> tuple[str, bytes, str, dict[str, Any]]:
        width, height = 20 + 37 * index, 900 - 31 * index
        answer = "" if index in self.broken else "red " * (index + 1)
        turns = [{"question": f"<i>what</i> {turn}?", "answer": answer} for turn in range(1 + index % 3)]
        record = {"width": width, "height": height, "turns": turns}
        if index % 4 == 1:
            record["system"] = "what is " * index
        return f"{self.name}-{index:04d}", picture(index, width, height, "JPEG"), "jpg", record


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two sources: `headers` (11 written, 2 rejected, 1 no image) and `stated` (17, 1 without an answer)."""
    folder = tmp_path_factory.mktemp("statistics")
    write_source(folder / "train/headers", PickyBuilder("h", 13, (2, 7)), 5, progress=False)
    _break_image(folder / "train/headers", "h-0004.png")
    write_source(folder / "train/stated", StatedBuilder("s", 17, (6,)), 4, progress=False)
    sources = [{"name": "headers", "repeat": 3.0}, {"name": "stated", "max_tiles": 3}]
    content = {"name": "two", "licence": "MIT", "root": str(folder), "weights": "sqrt", "splits": {"train": sources}}
    (folder / "two.yaml").write_text(yaml.safe_dump(content))
    return Manifest.load(folder / "two.yaml")


def _break_image(source: Path, name: str) -> None:
    """Overwrite the beginning of an image in a shard, sizes left as they are."""
    for path in source.glob("*.tar"):
        with tarfile.open(path) as tar:
            offset = next((m.offset_data for m in tar if m.name == name), None)
        if offset is not None:
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(b"no picture")


def twin(
    manifest: Manifest, name: str, rule: TileRule, first: int | None = None
) -> tuple[dict[str, Any], Counter[str]]:
    """Return a source's values by quantity, and what cannot be used, from the tars alone; every image is decoded."""
    (source,) = (source for source in manifest.sources("train") if source.name == name)
    if source.max_tiles is not None:
        rule = replace(rule, max_tiles=min(rule.max_tiles, source.max_tiles))
    model = tiny_processor()
    values: dict[str, list[int]] = {}
    unusable: Counter[str] = Counter()
    members: dict[str, dict[str, bytes]] = {}
    for path in sorted(source.folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                members.setdefault(key, {})["json" if extension == "json" else "image"] = file.read()
    for parts in list(members.values())[:first]:
        record = json.loads(parts["json"])
        if any(not turn["answer"].strip() for turn in record["turns"]):
            unusable["empty-answer"] += 1
            continue
        try:
            image = Image.open(io.BytesIO(parts["image"]))
            image.load()
        except OSError:
            unusable["bad-image"] += 1
            continue
        grid = rule.grid(*image.size)
        of_record = {
            "turns": len(record["turns"]),
            "width": image.width,
            "height": image.height,
            "bytes": len(parts["image"]),
            "tiles": grid.tiles,
            "pixels": image.width * image.height,
            "visual_tokens": len(grid.rectangles()),
        }
        values.setdefault("system_characters", []).extend([len(record["system"])] if "system" in record else [])
        for quantity, value in of_record.items():
            values.setdefault(quantity, []).append(value)
        for turn in record["turns"]:
            question, answer = (model.tokenizer.tokenize(turn[side]) for side in ("question", "answer"))
            of_turn = {
                "question_characters": len(turn["question"]),
                "answer_characters": len(turn["answer"]),
                "question_tokens": len(question),
                "answer_tokens": len(answer),
                "slots": model.prompt_length(turn["question"], turn["answer"], grid.tokens, record.get("system")),
            }
            for quantity, value in of_turn.items():
                values.setdefault(quantity, []).append(value)
    return values, unusable


def test_system_texts_are_counted_and_named(manifest: Manifest):
    found = measure_split(manifest, "train", Gauge(tiny_processor().rule, tiny_processor()))
    assert found.sources[1].of("system_characters").tolist() == [8, 40, 72, 104]
    assert found.sources[0].of("system_characters").tolist() == []
    assert "4 with a system text of their own" in caption(found)
    rows = {row[0]: row for row in percentiles(found.total)}
    assert rows["characters of a system text"][1:3] == ["4", "56"]
    assert as_json(found)["sources"]["headers"]["system_characters"] is None
    without = replace(found, sources=found.sources[:1])
    assert "system" not in caption(without) and len(histograms(without)) == len(histograms(found)) - 1


def check(found: SplitStatistics, manifest: Manifest, rule: TileRule, first: int | None = None) -> None:
    for part in found.sources:
        values, unusable = twin(manifest, part.name, rule, first)
        assert part.unusable == unusable
        assert part.records == part.values["turns"].size + unusable.total() == min(part.samples, first or part.samples)
        for quantity in found.quantities:
            assert part.of(quantity).tolist() == values[quantity], quantity


@pytest.mark.parametrize("with_base", [False, True])
def test_figures_are_the_twins(manifest: Manifest, with_base: bool):
    gauge = Gauge(tiny_processor().rule, tiny_processor()) if with_base else Gauge()
    found = measure_split(manifest, "train", gauge)
    check(found, manifest, gauge.rule)
    headers, stated = found.sources
    assert (headers.shards, headers.samples, headers.rejected) == (3, 11, {"even": 1, "odd": 1})
    assert (headers.unusable, stated.unusable) == ({"bad-image": 1}, {"empty-answer": 1})
    assert int(stated.values["tiles"].max()) == 4  # three and the thumbnail
    assert ("slots" in found.quantities) == with_base
    lengths = [n for s in ("headers", "stated") for n in twin(manifest, s, gauge.rule)[0]["slots"]]
    assert found.over_length == (sum(n > 64 for n in lengths) if with_base else 0)


def test_the_sum_is_of_all_sources_and_shares_follow_the_weights(manifest: Manifest):
    found = measure_split(manifest, "train", Gauge())
    total = found.total
    assert (total.shards, total.samples, total.records) == (8, 28, 28)
    assert total.rejected == {"even": 1, "odd": 1} and total.unusable == {"bad-image": 1, "empty-answer": 1}
    assert total.of("pixels").tolist() == [x for part in found.sources for x in part.of("pixels").tolist()]
    # 3 x 11 + 17 records an epoch, shared as 3 sqrt(11) to sqrt(17), in whole records.
    exact = 3 * math.sqrt(11) / (3 * math.sqrt(11) + math.sqrt(17))
    assert [part.share for part in found.sources] == [round(50 * exact) / 50, round(50 * (1 - exact)) / 50]


def test_worker_processes_and_the_first_records(manifest: Manifest):
    alone, spread = (measure_split(manifest, "train", Gauge(), workers=workers) for workers in (0, 2))
    for one, other in zip(alone.sources, spread.sources, strict=True):
        assert one.unusable == other.unusable
        assert all(np.array_equal(one.values[name], other.values[name]) for name in one.values)
    calls: list[tuple[int, int]] = []
    few = measure_split(manifest, "train", Gauge(), first=6, progress=lambda done, total: calls.append((done, total)))
    check(few, manifest, TileRule(), first=6)
    assert [(part.records, part.samples) for part in few.sources] == [(6, 11), (6, 17)]
    assert calls == [(4, 12), (6, 12), (10, 12), (12, 12)]


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 100, 101])
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(count: int):
    values = np.random.default_rng(count).integers(0, 30, count)
    summary = summarise(values)
    assert summary is not None
    for percent, value in zip((5, 50, 95, 99), summary.percentiles, strict=True):
        shares = {int(v): Fraction(int((values <= v).sum()), count) for v in values}
        assert value == min(v for v, share in shares.items() if share >= Fraction(percent, 100))
    assert (summary.count, summary.most) == (count, max(values.tolist()))
    assert summary.mean == pytest.approx(sum(values.tolist()) / count) and summary.median == summary.percentiles[1]
    assert summarise(values[:0]) is None


def test_what_is_not_built_or_damaged_is_said(manifest: Manifest, tmp_path: Path):
    build = {"class_path": "a.B"}
    content = {
        "name": "none",
        "licence": "MIT",
        "root": str(tmp_path),
        "splits": {"val": [{"name": "a", "build": build}]},
    }
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(
        ConfigError, match=r"source 'a' of split 'val': .* does not exist: it is built .*, or by `pgp shards build`"
    ):
        measure_split(Manifest.load(tmp_path / "none.yaml"), "val", Gauge())
    with pytest.raises(ConfigError, match=r"splits\.test is missing"):
        measure_split(manifest, "test", Gauge())
    with pytest.raises(ConfigError, match="records must be at least 1"):
        measure_split(manifest, "train", Gauge(), first=0)
    write_source(tmp_path / "val/a", PictureBuilder("a", 8), 4, progress=False)
    (tmp_path / "val/a/a-00001.tar").write_bytes(b"\0" * 512)
    with pytest.raises(DataError, match=r"a-00001\.tar has 512 bytes"):
        measure_split(Manifest.load(tmp_path / "none.yaml"), "val", Gauge())
    content["splits"]["val"][0]["on_damage"] = "substitute"  # type: ignore[index]
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(content))
    found = measure_split(Manifest.load(tmp_path / "none.yaml"), "val", Gauge())
    assert found.total.unusable == {"damaged-shard": 4} and found.total.records == 8 and found.total.share is None
    assert found.total.of("width").tolist() == [16] * 4


def test_a_stated_size_that_no_image_has_is_not_believed(tmp_path: Path):
    @dataclass(frozen=True)
    class Boasting(PictureBuilder):
        def __getitem__(self, index: int) -> tuple[str, bytes, str, dict[str, Any]]:
            key, image, extension, record = super().__getitem__(index)
            return key, image, extension, record | {"width": (10**400, 1 << 31, True, "9")[index], "height": 16}

    write_source(tmp_path / "val/a", Boasting("a", 4), 4, progress=False)
    content = {"name": "big", "licence": "MIT", "root": str(tmp_path), "splits": {"val": [{"name": "a"}]}}
    (tmp_path / "big.yaml").write_text(yaml.safe_dump(content))
    found = measure_split(Manifest.load(tmp_path / "big.yaml"), "val", Gauge())
    assert found.total.of("width").tolist() == [16] * 4 and not found.total.unusable
