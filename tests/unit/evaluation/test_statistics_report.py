"""Statistics as tables, JSON, page and picture: the same numbers everywhere, and nothing in them is markup."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor

from pgp_lightning.data.statistics import Gauge, SourceStatistics, SplitStatistics
from pgp_lightning.evaluation.curve import COLOURS
from pgp_lightning.evaluation.histograms import BINS, Histogram, bin_edges, draw_histograms, histogram_svg
from pgp_lightning.evaluation.statistics_report import (
    as_json,
    overview,
    percentiles,
    print_statistics,
    reasons,
    write_statistics,
)
from tests.html_reader import Page

EVIL = "<script>alert(1)</script>"


def source(name: str, seed: int, records: int = 40, share: float | None = None) -> SourceStatistics:
    """Return a source of random figures, one record of which cannot be used."""
    rng = np.random.default_rng(seed)
    turns = rng.integers(1, 4, records)
    values = {
        "turns": turns,
        "width": rng.integers(100, 900, records),
        "height": rng.integers(100, 900, records),
        "bytes": rng.integers(300, 90_000, records),
        "tiles": rng.integers(1, 14, records),
        "question_characters": rng.integers(1, 500, turns.sum()),
        "answer_characters": rng.integers(1, 20, turns.sum()),
        "system_characters": rng.integers(5, 300, records // 4),
    }
    typed = {key: value.astype(np.int32) for key, value in values.items()}
    return SourceStatistics(name, 2, records + 1, records + 1, {EVIL: 3}, {"bad[red]": 1}, typed, 256, share)


@pytest.fixture
def found() -> SplitStatistics:
    return SplitStatistics("m.yaml", "train", (source("a&b", 0, share=0.25), source("long", 1, 60, 0.75)), Gauge())


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=60))
def test_every_value_has_a_bin_and_every_bin_a_whole_number(values: list[int]):
    edges, log = bin_edges(np.array(values))
    chart = Histogram.of("", [("all", np.array(values))])
    counts = [sum(low < value < high for value in values) for low, high in pairwise(edges)]
    assert chart.rows[0].counts.tolist() == counts and sum(counts) == len(values) and len(counts) <= BINS
    assert all(low % 1 == 0.5 and high - low >= 1 for low, high in pairwise(edges))
    assert counts[0] and counts[-1]
    assert log == (min(values) > 0 and max(values) > 50 * min(values) and max(values) - min(values) >= BINS)


def test_areas_of_bars_are_the_counts_in_svg_and_picture():
    values = [("a", np.geomspace(1, 3000, 500).astype(np.int64)), ("b", np.full(7, 50))]
    chart = Histogram.of("sizes & such", values)
    assert chart.log
    page = Page(histogram_svg(chart))
    assert "sizes & such" in page.text and page.all("svg")[0]["aria-label"] == "sizes & such"
    bars = [
        {k: float(v or 0) for k, v in box.items() if k != "class"} for box in page.all("rect") if box["class"] == "c0"
    ]
    counts = [count for count in chart.rows[0].counts.tolist() if count]
    # A gap of half a pixel on either side of a bar belongs to its bin.
    areas = np.array([(bar["width"] + 1) * bar["height"] for bar in bars])
    assert areas / areas.sum() == pytest.approx(np.array(counts) / sum(counts), abs=2e-3)
    (base,) = {round(bar["y"] + bar["height"], 1) for bar in bars}
    assert str(base) in {f"{float(box['y'] or 0):.1f}" for box in page.all("rect") if box["class"] == "grid"}
    picture = draw_histograms([chart], "heading")
    for bar in bars:
        middle = (2 * (bar["x"] + bar["width"] / 2), 2 * (52 + bar["y"] + bar["height"] / 2))
        assert picture.getpixel(tuple(map(int, middle))) in (ImageColor.getrgb(COLOURS[0]), (29, 36, 51))  # or a median


def test_the_tables(found: SplitStatistics):
    table = overview(found)
    assert [row[0] for row in table[1:]] == ["a&b", "long", "all sources"]
    assert [row[2] for row in table[1:]] == ["41", "61", "102"] and table[0][-1] == "% of\nepoch"
    assert [row[-1] for row in table[1:]] == ["25.0", "75.0", "100.0"]
    first = found.sources[0]
    heights = sorted(first.values["height"].tolist())
    assert table[1][8].split(" × ")[1] == str(heights[19]) and table[1][9].split(" × ")[1] == str(heights[-1])
    assert reasons(found)[1:3] == [["a&b", "built", EVIL, "3", "6.8"], ["a&b", "read", "bad[red]", "1", "2.4"]]
    (pixels,) = (row for row in percentiles(first) if row[0] == "image size, megapixels")
    areas = sorted(w * h for w, h in zip(first.values["width"].tolist(), first.values["height"].tolist(), strict=True))
    assert pixels[1:] == [
        "40",
        *(f"{x / 1e6:.3g}" for x in (np.mean(areas), areas[1], areas[19], areas[37], *[areas[39]] * 2)),
    ]


def test_nothing_is_markup_in_the_terminal(found: SplitStatistics, capsys: pytest.CaptureFixture[str]):
    print_statistics(found)
    out = capsys.readouterr().out
    head = "train of m.yaml: 102 records, 25 with a system text of their own; tiles of 448 px, at most 12"
    assert EVIL in out and "bad[red]" in out and head in out


def test_json_adds_up(found: SplitStatistics, tmp_path: Path):
    write_statistics(found, tmp_path / "found.json")
    read = json.loads((tmp_path / "found.json").read_text())
    assert read == json.loads(json.dumps(as_json(found)))
    for name, part in {**read["sources"], "all": read["all"]}.items():
        assert part["turns"]["count"] + sum(part["unusable"].values()) == part["records"] == part["samples"], name
    for quantity, bins in read["histograms"].items():
        assert len(bins["edges"]) == len(bins["counts"]["long"]) + 1
        assert sum(map(sum, bins["counts"].values())) == read["all"][quantity]["count"]
    assert read["rule"]["max_tiles"] == 12 and read["first"] is None and "slots" not in read["all"]


def test_the_page_is_whole_and_its_text_escaped(found: SplitStatistics, tmp_path: Path):
    write_statistics(found, tmp_path / "found.html")
    text = (tmp_path / "found.html").read_text()
    page = Page(text)
    assert EVIL in page.text and "a&b" in page.text and not page.all("script") and "://" not in text
    assert len(page.all("svg")) == 7 and len(page.all("table")) == 5
    assert "prefers-color-scheme: dark" in text and "default-src 'none'" in str(page.all("meta"))


def test_the_picture(found: SplitStatistics, tmp_path: Path):
    write_statistics(found, tmp_path / "found.png")
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.width == 2 * 2 * 560 and picture.convert("RGB").getcolors(1 << 24)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or []}
    assert {ImageColor.getrgb(colour) for colour in COLOURS[:2]} <= colours


def test_a_split_of_which_nothing_can_be_used(tmp_path: Path):
    empty = {name: np.zeros(0, dtype=np.int32) for name in source("a", 0).values}
    found = SplitStatistics("m", "val", (SourceStatistics("a", 1, 5, 5, {}, {"no-turns": 5}, empty, 256),), Gauge())
    for suffix in ("html", "png", "json"):
        write_statistics(found, tmp_path / f"found.{suffix}")
    assert json.loads((tmp_path / "found.json").read_text())["all"]["tiles"] is None
    assert (
        overview(found)[1][:5] == ["a", "1", "5", "0", "5"] and percentiles(found.total) == percentiles(found.total)[:1]
    )
