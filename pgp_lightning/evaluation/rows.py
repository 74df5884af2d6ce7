"""The rows of a comparison, and how they are written: Markdown, CSV, JSON and the curve."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from pgp_lightning.evaluation import text
from pgp_lightning.evaluation.curve import Chart, Line, Point, draw_chart
from pgp_lightning.evaluation.scoring import Interval

__all__ = ["Report", "Row", "family"]


def family(method: str) -> str:
    """Return a method's name without its budget: "pgp" for "pgp@5"."""
    return method.rpartition("@")[0] or method


@dataclass(frozen=True)
class Row:
    """A method at one budget; None where a thing is not known.

    Args:
        method: as its file is called.
        name: as shown.
        keep_ratio: the budget, kept of all visual tokens.
        layers: before which decoder layers it prunes.
        positions: whether kept tokens keep their position ids: original or renumbered.
        guide: what scores the tokens beforehand.
        note: anything to know beside.
        tokens: visual tokens N, mean over samples, as the next three.
        kept: visual tokens at the last layer.
        layer_average: visual tokens of a layer.
        kv_entries: prompt slots in all layers' caches.
        tiles_encoded: share of the tiles that the answer model's vision tower runs on.
        flops: of answer model and guide together.
        flops_relative: the same, of the full model's.
        times: what was measured, under names that say the unit.
        accuracy: share of right answers.
        relative: accuracy as a share of the full model's.
        types: accuracy by type of question.
        agreement: share of samples answered as the full model does, right or wrong.
        recall: share of relevant tokens kept, mean over samples.
        reference: the method that the difference is to.
        difference: accuracy minus the reference's, paired.
    """

    method: str
    name: str
    keep_ratio: float | None
    layers: list[int] | None
    positions: str | None
    guide: str | None
    note: str
    tokens: float
    kept: float
    layer_average: float
    kv_entries: float
    tiles_encoded: float | None
    flops: float | None
    flops_relative: float | None
    times: dict[str, float]
    accuracy: Interval
    relative: float | None
    types: dict[str, float]
    agreement: float | None
    recall: float | None
    reference: str | None
    difference: Interval | None


@dataclass(frozen=True)
class Report:
    """The rows of a comparison, full model first, then budgets from large to small.

    Args:
        rows: one for each method and budget.
        samples: questions that each was asked.
        scenes: records, one image each, that they are about.
        level: of the intervals.
        full: the unpruned model's method; the columns relative to it are empty if it is none of the rows.
        reference: the method, with or without budget, that differences are to.
    """

    rows: list[Row]
    samples: int
    scenes: int
    level: float
    full: str
    reference: str

    def table(self) -> list[list[str]]:
        """Return the main table as texts, header first; columns of which nothing is known are left out."""
        rows, (scale, prefix) = self.rows, text.unit(row.flops for row in self.rows)
        columns: list[tuple[str, list[str]]] = [
            *self._methods(),
            ("at layer", [", ".join(map(str, row.layers or ())) for row in rows]),
            ("positions", [row.positions or "" for row in rows]),
            ("guide", [row.guide or "" for row in rows]),
            ("N", [text.number(row.tokens) for row in rows]),
            ("kept at last layer", [text.number(row.kept) for row in rows]),
            ("layer average", [text.number(row.layer_average) for row in rows]),
            ("KV entries", [text.number(row.kv_entries) for row in rows]),
            ("tiles encoded, %", [text.percent(row.tiles_encoded) for row in rows]),
            (f"{prefix}FLOPs incl. guide", ["" if row.flops is None else f"{row.flops / scale:.3g}" for row in rows]),
            ("FLOPs of full, %", [text.percent(row.flops_relative) for row in rows]),
            *((name, [text.number(row.times.get(name)) for row in rows]) for name in self._times()),
            (f"accuracy, % [{100 * self.level:g} %]", [text.interval(row.accuracy) for row in rows]),
            ("of full, %", [text.percent(row.relative) for row in rows]),
            ("same answer as full, %", [text.percent(row.agreement) for row in rows]),
            ("recall, %", [text.percent(row.recall) for row in rows]),
            (f"minus {self.reference}, points", [text.interval(row.difference, signed=True) for row in rows]),
        ]
        return text.transposed([column for column in columns if any(column[1])])

    def types_table(self) -> list[list[str]]:
        """Return accuracies in per cent by type of question as texts, header first."""
        types = [(kind, [text.percent(row.types[kind]) for row in self.rows]) for kind in self.rows[0].types]
        return text.transposed([*self._methods(), *types])

    def notes(self) -> list[str]:
        """Return what a reader has to know, sentence by sentence."""
        found = [
            f"{self.samples} questions about {self.scenes} records; every method answered the same ones.",
            f"Intervals: {100 * self.level:g} %, percentile bootstrap over records (one image each); differences are "
            "paired.",
            "Budget: share of the visual tokens that is kept. Kept at last layer and layer average count visual "
            "tokens; KV entries are the prompt's slots, of text too, summed over the layers.",
        ]
        if any(row.flops is not None for row in self.rows):
            found.append("FLOPs: answer model and guide together, a multiply-add counted as 2.")
        if all(row.method != self.full for row in self.rows):
            found.append(f"There is no row of the unpruned model ({self.full}), so nothing is said relative to it.")
        if all(row.difference is None for row in self.rows):
            found.append(f"No two methods of one budget with {self.reference} among them, so there are no differences.")
        # A note that all budgets of a method share is said once.
        noted: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            noted.setdefault((row.name, row.note), []).append(row)
        for (name, note), rows in noted.items():
            alike = len(rows) == sum(row.name == name for row in self.rows)
            budgets = "" if alike else f", {' and '.join(text.budget(row.keep_ratio) for row in rows)}"
            found += [f"{name}{budgets}: {note}"] if note else []
        return found

    def markdown(self) -> str:
        """Return both tables and the notes as Markdown."""
        notes = "\n".join(f"- {text.plain(note)}" for note in self.notes())
        by_type = text.markdown_table(self.types_table())
        return f"{text.markdown_table(self.table())}\n\n{notes}\n\nAccuracy by type of question, %\n\n{by_type}\n"

    def csv(self) -> str:
        """Return a line for each row: numbers unrounded and unscaled (shares, FLOPs), empty where unknown."""
        lines = []
        for row in self.rows:
            line: dict[str, Any] = {}
            for name, value in asdict(row).items():
                if name in ("accuracy", "difference"):
                    mean, low, high = value or (None, None, None)
                    line |= {name: mean, f"{name}_low": low, f"{name}_high": high}
                elif name == "layers":
                    line[name] = " ".join(map(str, value or ()))
                elif name == "times":
                    line |= {f"time: {time}": value.get(time) for time in self._times()}
                elif name == "types":
                    line |= {f"accuracy: {kind}": share for kind, share in value.items()}
                else:
                    line[name] = value
            lines.append({name: text.as_json(value) for name, value in line.items()})
        out = io.StringIO()
        writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return out.getvalue()

    def json(self) -> str:
        """Return everything as JSON, null where unknown."""
        return json.dumps(text.as_json(asdict(self)), indent=2, allow_nan=False) + "\n"

    def curve(self, log: bool = False) -> str:
        """Return accuracy against FLOPs, guide included, as SVG: a line per method over its budgets.

        If no pruned row has FLOPs, against the visual tokens of a layer instead. Methods without FLOPs are named below.

        Args:
            log: whether costs are drawn on a logarithmic axis.
        """
        rows, (scale, prefix) = self.rows, text.unit(row.flops for row in self.rows)
        costs = {row.method: row.flops / scale for row in rows if row.flops is not None}
        title, x_label = "Accuracy against FLOPs", f"{prefix}FLOPs per question, guide included"
        if not costs.keys() - {self.full}:
            costs = {row.method: row.layer_average for row in rows}
            title, x_label = "Accuracy against visual tokens", "visual tokens of a decoder layer, mean over layers"
        lines: dict[str, list[Point]] = {}
        level = None
        for row in rows:
            label = f"{row.name}, {text.budget(row.keep_ratio)}: {text.interval(row.accuracy)} %"
            mean, low, high = (100 * value for value in row.accuracy)
            if row.method == self.full:
                level = Point(costs.get(row.method, math.nan), mean, label="all tokens")
            elif row.method in costs:
                point = Point(costs[row.method], mean, low, high, label)
                lines.setdefault(family(row.method), []).append(point)
        names = {family(row.method): family(row.name) for row in reversed(rows)}
        note = f"Bars: {100 * self.level:g} % intervals over records."
        if left_out := sorted({family(row.name) for row in rows if row.method not in costs}):
            note += f" Without FLOPs, so not drawn: {', '.join(left_out)}."
        strong = family(self.reference)
        drawn = [Line(names[family], points, family == strong) for family, points in lines.items()]
        return draw_chart(Chart(drawn, title, x_label, "accuracy, %", level, note, log))

    def _methods(self) -> list[tuple[str, list[str]]]:
        """Return the columns that say which row it is."""
        budgets = ["all" if row.method == self.full else text.budget(row.keep_ratio) for row in self.rows]
        return [("method", [row.name for row in self.rows]), ("budget", budgets)]

    def _times(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row.times))
