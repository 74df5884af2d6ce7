"""The HTML report: what it shows, and that it needs and leaks nothing."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation.explorer import explored_scenes, flips, write_explorer
from pgp_lightning.evaluation.overlay import draw_kept
from pgp_lightning.evaluation.report import build_report
from pgp_lightning.evaluation.scoring import Scene, load_results
from pgp_lightning.vlm.tiles import TileGrid
from tests.html_reader import Page
from tests.unit.evaluation.results_made import FULL, GRID, answer, answers, comparison, write

EVIL = '</script><script>alert("1")</script><img src=x onerror=alert(1)>'


def image_of(scene: Scene) -> Image.Image:
    assert scene[0] == "made"
    rng = np.random.default_rng(ord(scene[1]))
    return Image.fromarray(rng.integers(0, 255, (300, 600, 3)).astype(np.uint8))


def explore(folder: Path, **more: object) -> tuple[str, Page]:
    text = write_explorer(folder, image_of, lambda scene: GRID, **more).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return comparison(tmp_path)


def test_cases_are_the_flips_of_the_chosen_methods(folder: Path):
    # Full is right on 11110; pgp@25 11010 loses b0; random@25 10001 loses a1, b0, b1 and gains c0.
    _, page = explore(folder, methods=["pgp@25", "random@25"])
    cases = page.all("article")
    assert [case["data-method"] for case in cases] == ["1", "0 1", "1", "1"]
    assert [case["data-way"] for case in cases] == ["lost", "lost", "lost", "gained"]
    assert [case["data-type"] for case in cases] == ["1", "0", "1", "0"]  # colour, count
    # The image, pgp and random of each case; the bar marks who flipped.
    marks = [figure["class"] for figure in page.all("figure")]
    assert [marks[i : i + 3] for i in range(0, 12, 3)] == [
        ["same", "same", "flip"],
        ["same", "flip", "flip"],
        ["same", "same", "flip"],
        ["same", "same", "flip"],
    ]
    assert "what count is it, a1?" in page.texts
    assert "what colour is it, a0?" not in page.texts


def test_the_smallest_budget_and_the_reference_come_first_unless_chosen(folder: Path):
    _, page = explore(folder)
    # As with these two chosen by hand; in methods.json random comes before pgp.
    assert [case["data-method"] for case in page.all("article")] == ["1", "0 1", "1", "1"]
    named = page.texts[page.texts.index("flipped by") :]
    assert [text for text in named if "%" in text][:2] == ["pgp, 25 %", "random, 25 %"]


def test_filters_name_what_cases_carry(folder: Path):
    _, page = explore(folder)
    groups: dict[str, set[str]] = {}
    for button in page.all("button"):
        groups.setdefault(button["data-group"], set()).add(button["data-value"])
    assert groups == {"method": {"", "0", "1"}, "type": {"", "0", "1"}, "way": {"", "lost", "gained"}}
    for case in page.all("article"):
        for group, values in groups.items():
            assert set(case[f"data-{group}"].split(" ")) <= values


def test_pictures_are_embedded_small_and_those_of_the_overlays(folder: Path):
    _, page = explore(folder, methods=["pgp@25", "random@25"], size=100)
    pictures = page.all("img")
    # Four cases: the image, pgp's kept tokens and importance, random's kept tokens.
    assert len(pictures) == 4 * 4
    drawn = []
    for picture in pictures:
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", picture["src"]).groups()
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert image.size == (100, 50)
        assert image.format.lower() == kind
        drawn.append(image)
    small = image_of(("made", "a")).resize((100, 50), Image.Resampling.LANCZOS)
    keep = np.zeros(FULL, dtype=bool)
    keep[[0, 5, 11]] = True
    difference = np.asarray(drawn[1], dtype=float) - np.asarray(draw_kept(small, GRID, keep), dtype=float)
    assert abs(difference).mean() < 20  # noise, as JPEG
    assert [picture["alt"] for picture in pictures[:4]] == [
        "the image",
        "kept by pgp, 25 %",
        "importance by pgp, 25 %",
        "kept by random, 25 %",
    ]


def test_only_pictures_of_what_is_shown_are_asked_for(folder: Path):
    results, asked = load_results(folder), set[Scene]()
    report = build_report(results)
    for methods, scenes in ((["pgp@25"], "b"), (["random@25"], "abc"), (None, "abc"), (["pgp@50"], "")):
        asked.clear()

        def image(scene: Scene) -> Image.Image:
            asked.add(scene)
            return image_of(scene)

        write_explorer(folder, image, lambda scene: GRID, methods=methods)
        assert explored_scenes(results, report, methods) == asked == {("made", key) for key in scenes}
    assert explored_scenes(results, report, ["random@25"], max_cases=1) == {("made", "a")}


def test_small_images_are_not_enlarged(folder: Path):
    file = write_explorer(folder, lambda scene: Image.new("L", (20, 10)), lambda scene: GRID, size=100)
    assert {(p["width"], p["height"]) for p in Page(file.read_text()).all("img")} == {("20", "10")}


def test_the_file_needs_nothing_else(folder: Path):
    text, page = explore(folder)
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert not page.all("link")
    assert not page.all("iframe")
    for tag, attributes in page.elements:
        assert "href" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        if "src" in attributes:
            assert tag == "img"
            assert attributes["src"].startswith("data:image/")


def test_whatever_the_texts_hold_is_shown_and_not_run(tmp_path: Path):
    full = [replace(answer(key, type=EVIL), question=EVIL, truth=EVIL, given=EVIL) for key in "ab"]
    pruned = [replace(row, correct=False, given=f"{EVIL}!", n=FULL) for row in full]
    write(tmp_path, {"full": full, "pgp@5": pruned}, {"full": {}, "pgp@5": {"name": EVIL, "note": EVIL, "guide": EVIL}})
    text, page = explore(tmp_path)
    assert len(page.all("script")) == 1
    assert not [p for p in page.all("img") if not (p["src"] or "").startswith("data:")]
    assert f"✗ {EVIL}!" in page.texts
    assert page.texts.count(EVIL) >= 3
    # And the one script that may run is ours.
    script = re.search(r"<script>(.*)</script></body>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_the_table_the_curve_and_all_flips_are_in_it(folder: Path):
    _, page = explore(folder, max_cases=1)
    assert len(page.all("svg")) == 1
    assert {"GFLOPs incl. guide", "accuracy, % [95 %]", "Answers that pruning flipped"} <= set(page.texts)
    # random at 25 %: three lost, one gained, no other wrong answer; one of them shown, and b0, pgp's.
    start = page.texts.index("random, 25 %")
    assert page.texts[start : start + 5] == ["random, 25 %", "3", "1", "0", "2"]


def test_a_case_limit_takes_turns_among_types_and_directions():
    full = answers("11110") * 4
    pruned = answers("00001") * 4
    full, pruned = ([replace(row, turn=i) for i, row in enumerate(rows)] for rows in (full, pruned))
    assert flips(pruned, full) == list(range(20))
    # Groups in order of appearance: colour lost (0, 2, 5, ...), count lost (1, 3, ...), colour gained (4, 9, ...).
    assert flips(pruned, full, 3) == [0, 1, 4]
    assert flips(pruned, full, 7) == [0, 1, 2, 3, 4, 5, 9]
    assert flips(full, full) == []


def test_without_flips_there_is_still_a_page(tmp_path: Path):
    write(tmp_path, {"full": answers("11110"), "pgp@5": answers("11110")})
    _, page = explore(tmp_path)
    assert not page.all("article")
    assert not page.all("button")
    assert page.all("table")


def test_kept_tokens_that_were_not_recorded_are_said_to_be(tmp_path: Path):
    write(tmp_path, {"full": answers("11110"), "pgp@5": answers("01110")})
    _, page = explore(tmp_path)
    assert len(page.all("img")) == 1
    assert "kept tokens were not recorded" in page.texts


def test_errors(folder: Path):
    with pytest.raises(
        ConfigError,
        match="the image of turn 0 of 'made/b' has a grid of 4 visual tokens, but the answers of pgp@25 tell of 12",
    ):
        write_explorer(folder, image_of, lambda scene: TileGrid(1, 1, 2, False), methods=["pgp@25"])
    with pytest.raises(ConfigError, match="no flips to show of full, sgp"):
        explore(folder, methods=["full", "sgp"])
    with pytest.raises(ConfigError, match="'whole', which is not among full"):
        explore(folder, full="whole")
    with pytest.raises(ConfigError, match="max_cases and size"):
        explore(folder, max_cases=0)


def test_it_stands_where_it_is_asked_to(folder: Path, tmp_path: Path):
    file = write_explorer(folder, image_of, lambda scene: GRID, into=tmp_path / "a" / "b")
    assert file == tmp_path / "a" / "b" / "explorer.html"
    assert len(load_results(folder).answers) == 4
