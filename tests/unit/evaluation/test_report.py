"""Tables, curve and paired comparisons of a results folder whose numbers are known by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.evaluation.curve import Chart, Line, Point, draw_chart, ticks
from pgp_lightning.evaluation.report import build_report, paired_markdown, paired_table, write_report
from pgp_lightning.evaluation.scoring import Interval, paired_bootstrap
from pgp_lightning.evaluation.text import interval, number, percent, plain, unit
from tests.unit.evaluation.results_made import SAMPLES, answers, comparison, write

SVG = "{http://www.w3.org/2000/svg}"
SCENES = [key for key, _, _ in SAMPLES]


def style(group: ElementTree.Element) -> tuple:
    """Colour, dashes and the shape of the markers of a drawn line."""
    line, marker = group.find(f"{SVG}polyline"), list(group)[-1]
    corners = [[float(v) for v in pair.split(",")] for pair in (marker.get("points") or "0,0").split()]
    shape = [round(value - corners[0][axis], 1) for corner in corners for axis, value in enumerate(corner)]
    return line.get("stroke"), line.get("stroke-dasharray"), *shape


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return comparison(tmp_path / "results")


class TestRows:
    def test_order_full_first_then_budgets_from_large_to_small(self, folder: Path):
        assert [row.method for row in build_report(folder).rows] == ["full", "pgp@50", "random@25", "pgp@25"]

    def test_json_has_every_column(self, folder: Path):
        found = json.loads(build_report(folder).json())
        assert {name: found[name] for name in ("samples", "scenes", "level", "full", "reference")} == {
            "samples": 5,
            "scenes": 3,
            "level": 0.95,
            "full": "full",
            "reference": "pgp",
        }
        row = found["rows"][3]
        given = row.pop("accuracy")
        assert row.pop("relative") == pytest.approx(0.75)  # 3 of 5 against 4 of 5
        assert row == {
            "method": "pgp@25",
            "name": "pgp",
            "keep_ratio": 0.25,
            "layers": [0],
            "positions": "renumbered",
            "guide": "tiny",
            "note": "a | note",
            "tokens": 12.0,
            "kept": 3.0,
            "layer_average": 4.5,
            "kv_entries": 35.0,
            "tiles_encoded": None,
            "flops": 3e9,  # answer model 2e9, guide 1e9
            "flops_relative": 0.375,
            "times": {"prefill, ms": 1.5},
            "types": {"colour": 1 / 3, "count": 1.0},
            "agreement": 0.8,
            "recall": 0.75,
            "reference": None,
            "difference": None,
        }
        expected = paired_bootstrap([1, 1, 0, 1, 0], SCENES)
        assert given == {"mean": 0.6, "low": expected.low, "high": expected.high}

    def test_differences_are_paired_with_the_reference_of_the_same_budget(self, folder: Path):
        rows = {row.method: row for row in build_report(folder).rows}
        assert rows["random@25"].reference == "pgp@25"
        # random 10001 minus pgp 11010
        assert rows["random@25"].difference == paired_bootstrap([0, -1, 0, -1, 1], SCENES)
        assert rows["pgp@50"].difference is None
        assert rows["full"].difference is None

    def test_one_row_can_be_the_reference_of_all(self, folder: Path):
        rows = {row.method: row for row in build_report(folder, reference="pgp@50").rows}
        assert {name for name, row in rows.items() if row.reference == "pgp@50"} == {"full", "random@25", "pgp@25"}
        assert rows["full"].difference == (0, 0, 0)
        assert rows["pgp@25"].difference.mean == pytest.approx(-0.2)

    def test_csv_comes_back(self, folder: Path):
        report = build_report(folder)
        lines = list(csv.DictReader(io.StringIO(report.csv())))
        assert [line["method"] for line in lines] == [row.method for row in report.rows]
        for line, row in zip(lines, report.rows, strict=True):
            assert [float(line[f"accuracy{end}"]) for end in ("", "_low", "_high")] == list(row.accuracy)
            assert float(line["accuracy: count"]) == row.types["count"]
            assert line["recall"] == ("" if row.recall is None else str(row.recall))
            assert line["difference_low"] == ("" if row.difference is None else str(row.difference.low))
            assert line["flops"] == ("" if row.flops is None else str(row.flops))
        assert [line["layers"] for line in lines] == ["", "0 2", "0", "0"]
        assert [line["time: prefill, ms"] for line in lines] == ["", "", "", "1.5"]

    def test_flops_are_unknown_where_the_guides_are(self, folder: Path):
        rows = {row.method: row for row in build_report(folder).rows}
        assert rows["pgp@50"].flops is None  # has a guide, but not its FLOPs
        assert rows["random@25"].flops == 2e9  # has none
        assert rows["full"].flops_relative == 1

    def test_flops_that_nobody_knows_are_empty_even_without_a_guide(self, folder: Path):
        described = json.loads((folder / "methods.json").read_text())
        described["random@25"]["guide_flops"] = None
        (folder / "methods.json").write_text(json.dumps(described))
        report = build_report(folder)
        assert {row.method for row in report.rows if row.flops is None} == {"pgp@50", "random@25"}
        assert dict(zip(report.table()[0], report.table()[3], strict=True))["GFLOPs incl. guide"] == ""

    def test_nothing_relative_without_the_full_model(self, folder: Path):
        (folder / "full.jsonl").unlink()
        described = json.loads((folder / "methods.json").read_text())
        del described["full"]
        (folder / "methods.json").write_text(json.dumps(described))
        report = build_report(folder)
        assert all(row.relative is None and row.agreement is None for row in report.rows)
        assert "no row of the unpruned model (full)" in report.markdown()
        assert "of full, %" not in report.table()[0]

    def test_a_full_model_that_is_always_wrong(self, tmp_path: Path):
        write(tmp_path, {"full": answers("00000"), "pgp@5": answers("10000")})
        row = build_report(tmp_path).rows[1]
        assert row.relative is None
        assert row.keep_ratio == 0.05  # from the name
        assert row.accuracy.mean == 0.2

    def test_a_single_scene_has_no_interval_and_its_json_is_valid(self, tmp_path: Path):
        write(tmp_path, {"full": answers("11111")[:2], "pgp@5": answers("10111")[:2]})
        report = build_report(tmp_path)
        assert json.loads(report.json())["rows"][1]["accuracy"] == {"mean": 0.5, "low": None, "high": None}
        assert "| 50.0 |" in report.markdown()
        assert ElementTree.fromstring(report.curve()) is not None

    def test_mismatched_samples_are_refused(self, folder: Path):
        write(folder, {"pgp@50": answers("11110")[:-1]})
        with pytest.raises(ConfigError, match="pgp@50 lacks 1 of 5 samples"):
            build_report(folder)


class TestMarkdown:
    def test_every_line_of_a_table_has_the_same_cells(self, folder: Path):
        tables = [block for block in build_report(folder).markdown().split("\n\n") if block.startswith("|")]
        assert len(tables) == 2
        for table in tables:
            assert len({line.replace(r"\|", "").count("|") for line in table.splitlines()}) == 1
            assert len(table.splitlines()) == 2 + 4

    def test_the_main_table(self, folder: Path):
        table = build_report(folder).table()
        row = dict(zip(table[0], table[4], strict=True))
        low, high = paired_bootstrap([1, 1, 0, 1, 0], SCENES)[1:]
        assert row == {
            "method": "pgp",
            "budget": "25 %",
            "at layer": "0",
            "positions": "renumbered",
            "guide": "tiny",
            "N": "12",
            "kept at last layer": "3",
            "layer average": "4.5",
            "KV entries": "35",
            "GFLOPs incl. guide": "3",
            "FLOPs of full, %": "37.5",
            "prefill, ms": "1.5",
            "accuracy, % [95 %]": f"60.0 [{100 * low:.1f}, {100 * high:.1f}]",
            "of full, %": "75.0",
            "same answer as full, %": "80.0",
            "recall, %": "75.0",
            "minus pgp, points": "",
        }
        assert dict(zip(table[0], table[1], strict=True))["budget"] == "all"

    def test_the_notes_say_what_is_resampled(self, folder: Path):
        counts, intervals, *_ = build_report(folder).notes()
        assert counts == "5 questions about 3 records; every method answered the same ones."
        assert "percentile bootstrap over records (one image each)" in intervals

    def test_notes_and_names_are_escaped(self, folder: Path):
        assert r"pgp, 25 %: a \| note" in build_report(folder).markdown()
        assert plain("a_b _c_ <b> [x](y) `z`\n*") == r"a_b \_c\_ &lt;b> [x\](y) \`z\` \*"

    def test_a_note_of_all_budgets_is_said_once(self, tmp_path: Path):
        notes = {"full": "", "pgp@5": "one", "pgp@20": "one", "sgp@5": "two", "sgp@20": "three"}
        write(
            tmp_path, {name: answers("11111") for name in notes}, {name: {"note": note} for name, note in notes.items()}
        )
        assert build_report(tmp_path).notes()[-3:] == ["pgp: one", "sgp, 20 %: three", "sgp, 5 %: two"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (number(320.0), "320"),
        (number(8160.4), "8,160"),
        (number(35.25), "35.2"),
        (number(0.12345), "0.123"),
        (number(None), ""),
        (number(math.nan), ""),
        (percent(0.12345), "12.3"),
        (percent(None), ""),
        (interval(Interval(0.5, 0.25, 0.75)), "50.0 [25.0, 75.0]"),
        (interval(Interval(-0.05, -0.1, 0.01), signed=True), "-5.0 [-10.0, +1.0]"),
        (interval(Interval(0.5, math.nan, math.nan)), "50.0"),
        (unit([None, 5.0, 2.5e13]), (1e12, "T")),
        (unit([]), (1.0, "")),
    ],
)
def test_numbers_as_text(found: object, expected: object):
    assert found == expected


class TestFiles:
    def test_all_four_are_written(self, folder: Path, tmp_path: Path):
        write_report(folder, tmp_path / "new" / "report")
        assert sorted(file.name for file in (tmp_path / "new" / "report").iterdir()) == [
            "curve.svg",
            "report.csv",
            "report.json",
            "report.md",
        ]

    def test_into_the_folder_itself_and_again(self, folder: Path):
        first = write_report(folder)
        assert write_report(folder) == first

    def test_what_is_unfinished_is_left_out_and_named(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        whole = write_report(folder)
        assert capsys.readouterr().out == ""
        # A method that was taken out after a stop, in the middle of a line, and one that never got that far.
        write(folder, {"gone@50": answers("11110")[:2], "gone@25": []})
        lines = (folder / "gone@50.jsonl").read_text()
        (folder / "gone@50.jsonl").write_text(lines[:-20])
        assert write_report(folder) == whole
        assert capsys.readouterr().out == "not in the report, for they are not finished: gone@25, gone@50\n"
        write(folder, {"pgp@50": answers("11110")[:-1]})
        assert [row.method for row in write_report(folder).rows] == ["full", "random@25", "pgp@25"]
        # Too many lines are no reason to leave out the others, but an error.
        write(folder, {"pgp@50": answers("11110") * 2})
        with pytest.raises(DataError, match="is there twice"):
            write_report(folder)

    def test_the_full_model_alone_has_no_curve(self, tmp_path: Path):
        write(tmp_path, {"full": answers("11111")})
        write_report(tmp_path)
        assert not (tmp_path / "curve.svg").exists()


class TestCurve:
    def test_a_line_for_each_method_and_a_dashed_one_for_the_full_model(self, folder: Path):
        svg = ElementTree.fromstring(build_report(folder).curve())
        assert len(svg.findall(f".//{SVG}polyline")) == 2
        (level,) = svg.findall(f".//{SVG}line[@class='level']")
        assert level.get("stroke-dasharray")
        texts = [text.text for text in svg.iter(f"{SVG}text")]
        assert {"pgp", "random", "all tokens: 80.0", "accuracy, %"} <= set(texts)
        assert any("Without FLOPs, so not drawn: pgp." in (text or "") for text in texts)

    def test_points_lie_where_the_axes_say(self):
        points = [Point(1, 20, 10, 30), Point(4, 60), Point(2, 40)]
        svg = ElementTree.fromstring(draw_chart(Chart([Line("a", points)], "t", "x", "y")))
        ((ax, ay), (bx, by), (cx, cy)) = (
            [float(v) for v in pair.split(",")] for pair in svg.find(f".//{SVG}polyline").get("points").split()
        )
        zero, bottom = 74, 500 - 66  # the x axis starts at 0
        assert (ax - zero) * 4 == pytest.approx((bx - zero) * 2, abs=0.5)
        assert (ax - zero) * 4 == pytest.approx(cx - zero, abs=0.5)
        assert ay - by == pytest.approx(by - cy, abs=0.2)
        # The y axis leaves 7 % of the range from 10 to 60 free at both ends.
        assert bottom - ay == pytest.approx((20 - 6.5) / (63.5 - 6.5) * (bottom - 58), abs=0.1)
        ticks_by_value = {t.text: float(t.get("x")) for t in svg.iter(f"{SVG}text") if t.get("text-anchor") == "middle"}
        assert ticks_by_value["2"] == pytest.approx(bx, abs=0.1)
        (bar,) = svg.findall(f".//{SVG}path[@class='interval']")
        low = float(bar.get("d").split("V")[0].split()[1])
        high = float(bar.get("d").split("V")[1].split("M")[0])
        assert low - ay == pytest.approx(ay - high, abs=0.2)

    def test_a_logarithmic_axis(self):
        points = [Point(1, 20), Point(10, 60), Point(100, 40)]
        svg = ElementTree.fromstring(draw_chart(Chart([Line("a", points)], "t", "x", "y", log=True)))
        places = [float(p.split(",")[0]) for p in svg.find(f".//{SVG}polyline").get("points").split()]
        assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)
        with pytest.raises(ConfigError, match="positive"):
            draw_chart(Chart([Line("a", [Point(0, 1)])], "t", "x", "y", log=True))

    def test_texts_are_escaped_and_long_names_cut(self):
        name = '<script>&"' + "x" * 40
        svg = draw_chart(Chart([Line(name, [Point(1, 1, label=name)])], name, name, name, note=name))
        assert "<script" not in svg
        root = ElementTree.fromstring(svg)
        assert root.get("aria-label") == name
        assert any((text.text or "").endswith("…") for text in root.iter(f"{SVG}text"))

    def test_many_methods_differ_in_colour_marker_or_dashes_and_fit(self):
        lines = [Line(str(i), [Point(1, i)]) for i in range(30)]
        svg = draw_chart(Chart(lines, "t", "x", "y"))
        root = ElementTree.fromstring(svg)
        height = float(root.get("height"))
        assert all(float(text.get("y")) <= height for text in root.iter(f"{SVG}text"))
        assert len({style(group) for group in root.findall(f"{SVG}g")}) == 30

    def test_without_flops_it_is_drawn_against_tokens(self, tmp_path: Path):
        write(tmp_path, {"full": answers("11111"), "pgp@5": answers("10111")}, {"full": {"flops": 1e9}, "pgp@5": {}})
        assert "visual tokens of a decoder layer" in build_report(tmp_path).curve()

    def test_nothing_and_nonsense_are_refused(self):
        with pytest.raises(ConfigError, match="nothing to draw"):
            draw_chart(Chart([], "t", "x", "y"))
        with pytest.raises(ConfigError, match="cannot draw pgp at nan"):
            draw_chart(Chart([Line("a", [Point(math.nan, 1, label="pgp")])], "t", "x", "y"))

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ((0, 10, 5), [0, 2, 4, 6, 8, 10]),
            ((0.0, 0.3, 6), [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]),
            ((-3, 97, 5), [0, 20, 40, 60, 80]),
            ((0.9, 110, 7, True), [1, 2, 5, 10, 20, 50, 100]),
            ((0.9, 110, 6, True), [1, 10, 100]),
            ((0.001, 1e9, 7, True), [1e-3, 1e-1, 1e1, 1e3, 1e5, 1e7, 1e9]),
            ((3.1, 3.9, 4, True), [3.2, 3.4, 3.6, 3.8]),
        ],
    )
    def test_ticks_are_round(self, arguments: tuple, expected: list[float]):
        assert ticks(*arguments) == pytest.approx(expected)


class TestPairs:
    def test_by_hand(self, folder: Path):
        (row,) = paired_table(folder, [("pgp@25", "random@25")])
        assert (row.part, row.samples, row.scenes, row.wins, row.losses) == ("all", 5, 3, 2, 1)
        assert row.accuracy == paired_bootstrap([0, 1, 0, 1, -1], SCENES)
        assert row.accuracy.mean == pytest.approx(0.2)
        assert row.recall == (0.5, 0.5, 0.5)

    def test_split_by_whether_a_method_answers_rightly(self, folder: Path):
        rows = paired_table(folder, [("pgp@25", "random@25"), ("pgp@25", "full")], split="pgp@50")
        assert [(row.second, row.part, row.samples) for row in rows] == [
            ("random@25", "all", 5),
            ("random@25", "pgp@50: yes", 4),
            ("random@25", "pgp@50: no", 1),
            ("full", "all", 5),
            ("full", "pgp@50: yes", 4),
            ("full", "pgp@50: no", 1),
        ]
        assert rows[1].accuracy == paired_bootstrap([0, 1, 0, 1], SCENES[:4])
        assert rows[2].accuracy.mean == -1
        assert math.isnan(rows[2].accuracy.low)

    def test_split_by_a_field_or_a_mapping(self, folder: Path):
        rows = [
            answer.__class__(**{**vars(answer), "extra": {"guide_correct": answer.key == "a"}})
            for answer in answers("11010")
        ]
        write(folder, {"pgp@25": rows})
        pairs = [("pgp@25", "full")]
        by_field = paired_table(folder, pairs, split="guide_correct")
        by_mapping = paired_table(folder, pairs, split={row.sample: row.key == "a" for row in rows})
        assert [row.samples for row in by_field] == [row.samples for row in by_mapping] == [5, 2, 3]
        assert [row.part for row in by_mapping] == ["all", "split: yes", "split: no"]
        assert [row.accuracy for row in by_field] == [row.accuracy for row in by_mapping]

    def test_a_side_without_samples_has_no_interval(self, folder: Path):
        rows = paired_table(folder, [("pgp@25", "full")], split={("made", key, turn): True for key, turn, _ in SAMPLES})
        assert (rows[2].samples, rows[2].accuracy, rows[2].recall) == (0, None, None)
        assert paired_markdown(rows).splitlines()[-1].endswith("| 0 | 0 | 0 | 0 |  |  |")

    def test_recall_counts_only_where_both_know_it(self, folder: Path):
        (row,) = paired_table(folder, [("pgp@25", "pgp@50")])
        assert row.recall is None

    def test_errors(self, folder: Path):
        with pytest.raises(ConfigError, match="no results of sgp@25"):
            paired_table(folder, [("pgp@25", "sgp@25")])
        with pytest.raises(ConfigError, match="split guide says nothing of 5 of 5 samples"):
            paired_table(folder, [("pgp@25", "full")], split="guide")
        with pytest.raises(ConfigError, match="says nothing of 4 of 5"):
            paired_table(folder, [("pgp@25", "full")], split={("made", "a", 0): True})
        row = answers("11010")[0]
        write(folder, {"pgp@25": [row.__class__(**{**vars(row), "extra": {"x": 1}}), *answers("11010")[1:]]})
        with pytest.raises(DataError, match="'x' of turn 0 of 'made/a' must be true or false"):
            paired_table(folder, [("pgp@25", "full")], split="x")
