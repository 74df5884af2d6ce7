"""Tables and plots of a sweep: what every finished run reaches, what that is against its reference, how it learned."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pgp_lightning.evaluation import text
from pgp_lightning.evaluation.curve import Chart, Line, Point, draw_chart
from pgp_lightning.evaluation.resume import finished_rows
from pgp_lightning.evaluation.rows import family
from pgp_lightning.evaluation.scoring import (
    Answer,
    Interval,
    accuracy,
    load_results,
    mean_recall,
    paired_bootstrap,
)
from pgp_lightning.evaluation.sweep_run import Run
from pgp_lightning.training.run import differences

__all__ = ["write_tables"]


class _Answers:
    """Answers of runs and controls by name and budget."""

    def __init__(self, folder: Path) -> None:
        finished, _ = finished_rows(folder)
        self.rows = load_results(folder, finished).answers
        self.budgets = sorted({name.rpartition("@")[2] for name in self.rows if "@" in name}, key=float)

    def at(self, name: str, budget: str) -> Sequence[Answer]:
        """Return the answers of a method at a budget; the full model has none."""
        return self.rows.get(f"{name}@{budget}") or self.rows[name]

    def minus(self, pairs: Sequence[tuple[str, str]], budget: str) -> tuple[Interval, Interval | None]:
        """Return the difference of pairs of methods in accuracy and in recall, paired by question, mean over pairs."""
        both = [(self.at(a, budget), self.at(b, budget)) for a, b in pairs]
        scenes = [answer.scene for answer in both[0][0]]
        right = [[a.correct - b.correct for a, b in zip(*pair, strict=True)] for pair in both]
        known = [i for i, answer in enumerate(both[0][0]) if answer.recall is not None]
        found = [[(first[i].recall or 0.0) - (second[i].recall or 0.0) for i in known] for first, second in both]
        recall = paired_bootstrap(_mean(found), [scenes[i] for i in known]) if known else None
        return paired_bootstrap(_mean(right), scenes), recall


def _mean(columns: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*columns, strict=True)]


def write_tables(
    output: Path, folder: Path, runs: Sequence[Run], reference_of: Callable[[str], str], controls: Sequence[str]
) -> None:
    """Write sweep.md, sweep.json, and the plots: learning curves by reference, and recall against beta.

    Args:
        output: the sweep's folder.
        folder: the one with the answers.
        runs: that were looked into; those whose answers are not complete are left out.
        reference_of: the row that a row is compared with.
        controls: rows that are no runs.
    """
    answers = _Answers(folder)
    runs = [run for run in runs if _is_complete(answers, run.name)]
    figures = {run.name: json.loads(run.figures.read_text(encoding="utf-8")) for run in runs}
    order = list(dict.fromkeys(run.row for run in runs))
    runs = sorted(runs, key=lambda run: (order.index(run.row), run.seed))
    complete = [name for name in answers.rows if "@" not in name or _is_complete(answers, family(name))]
    others = [name for name in dict.fromkeys(map(family, complete)) if name not in figures]
    rest = sorted(others, key=lambda name: (name not in ("full", "oracle"), name in controls))
    samples = next(iter(answers.rows.values()))
    parts = [
        f"{len(samples)} questions about {len({answer.scene for answer in samples})} records. Accuracy of the answer "
        "model and recall of the relevant tokens in per cent, by the share of visual tokens kept; intervals are 95 %, "
        "over records.",
        text.markdown_table(_reached(answers, [run.name for run in runs] + rest)),
        "Minus the reference of the same seed, in points, paired by question; `mean` is over the seeds above it, its "
        "interval over records and not over seeds. Empty where the reference's run is not finished.",
        text.markdown_table(_differences(answers, runs, reference_of), left=3),
        f"The guides, on the first {_images(figures)} records with all their questions: exact match from the latents "
        "with the question and without (%), divergence of a visual token (nats, mean over channels), gate, where the "
        "divergence lies (% of its sum; `tokens` is how many are relevant), optimiser steps to 90 % of the last recall "
        "at 5 % on validation.",
        text.markdown_table(_guides(runs, figures)),
    ]
    (output / "sweep.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (output / "sweep.json").write_text(json.dumps(text.as_json(figures), indent=2) + "\n", encoding="utf-8")
    for reference in dict.fromkeys(reference_of(run.row) for run in runs):
        chosen = [run for run in runs if reference_of(run.row) == reference or run.row == reference]
        if chart := _curves(chosen, figures, reference):
            (output / f"curves_{reference}.svg").write_text(chart, encoding="utf-8")
    if len(points := _constant_beta(runs, figures, reference_of)) > 1:
        (output / "beta.svg").write_text(_beta_chart(points, answers), encoding="utf-8")


def _is_complete(answers: _Answers, name: str) -> bool:
    return all(f"{name}@{budget}" in answers.rows for budget in answers.budgets)


def _images(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Return on how many records figures were measured."""
    counts = {found.get("measured_on", {}).get("images") for found in figures.values()}
    return " or ".join(sorted(map(str, counts)))


def _reached(answers: _Answers, names: Sequence[str]) -> list[list[str]]:
    table = [["row", *(f"accuracy at {b} %" for b in answers.budgets), *(f"recall at {b} %" for b in answers.budgets)]]
    for name in names:
        rows = [answers.at(name, budget) for budget in answers.budgets]
        table.append(
            [name, *(text.interval(accuracy(row)) for row in rows), *(text.percent(mean_recall(row)) for row in rows)]
        )
    return table


def _differences(answers: _Answers, runs: Sequence[Run], reference_of: Callable[[str], str]) -> list[list[str]]:
    """Return a row for each run that has a reference, and one for the mean over the seeds of a row."""
    named = {(run.row, run.seed): run.name for run in runs}
    head = [f"{what} at {b} %" for what in ("accuracy", "recall") for b in answers.budgets]
    table = [["row", "against", "seed", *head]]
    for row in dict.fromkeys(run.row for run in runs):
        reference = reference_of(row)
        if row == reference:
            continue
        seeds = [run.seed for run in runs if run.row == row]
        paired = [seed for seed in seeds if (reference, seed) in named]
        groups = {str(seed): [seed] if seed in paired else [] for seed in seeds}
        if len(paired) > 1:
            groups["mean"] = paired
        for label, members in groups.items():
            pairs = [(named[row, seed], named[reference, seed]) for seed in members]
            found = [answers.minus(pairs, budget) for budget in answers.budgets if pairs]
            cells = [text.interval(value, signed=True) for column in zip(*found, strict=True) for value in column]
            table.append([row, reference, label, *(cells or [""] * len(head))])
    return table


def _guides(runs: Sequence[Run], figures: dict[str, dict[str, Any]]) -> list[list[str]]:
    columns: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
        ("from Z", "accuracy", text.percent),
        ("from Z alone", "accuracy_blind", text.percent),
        ("KL", "kl", text.number),
        ("gate", "gate", text.number),
        ("tokens", "tokens/relevant", text.percent),
        ("KL on relevant", "mass/relevant", text.percent),
        ("on other objects", "mass/other_objects", text.percent),
        ("on neither", "mass/neither", text.percent),
        ("on others", "mass/rest", text.percent),
        ("in the thumbnail", "mass/thumbnail", text.percent),
        ("in the last tenth", "mass/last_tenth", text.percent),
        ("steps to 90 %", "steps_to_90", text.number),
    )
    used = [column for column in columns if any(column[1] in found for found in figures.values())]
    table = [["row", *(name for name, _, _ in used)]]
    return table + [[run.name, *(show(figures[run.name].get(key)) for _, key, show in used)] for run in runs]


def _curves(runs: Sequence[Run], figures: dict[str, dict[str, Any]], reference: str) -> str:
    """Draw recall at 5 % over the steps, a line for each row: the mean over its seeds, and their range; "" if none."""
    lines = []
    for row in dict.fromkeys(run.row for run in runs):
        curves = [dict(map(tuple, figures[run.name]["curve"])) for run in runs if run.row == row]
        points = []
        for step in sorted(set.intersection(*(set(curve) for curve in curves))):
            values = [100 * curve[step] for curve in curves]
            low, high = (min(values), max(values)) if len(values) > 1 else (math.nan, math.nan)
            points.append(Point(step, sum(values) / len(values), low, high, f"{row}, step {step}"))
        lines += [Line(row, points, strong=row == reference)] if points else []
    if not lines:
        return ""
    return draw_chart(
        Chart(lines, "Recall of relevant tokens while training", "optimiser steps", "recall at 5 % on validation, %",
              note="Mean over seeds; bars are their range.")
    )  # fmt: skip


def _constant_beta(
    runs: Sequence[Run], figures: dict[str, dict[str, Any]], reference_of: Callable[[str], str]
) -> list[tuple[float, Run]]:
    """Return the runs whose beta is constant, above 0, and all that tells them from their reference, and that beta."""
    configs = {(run.row, run.seed): yaml.safe_load((run.folder / "config.yaml").read_text("utf-8")) for run in runs}
    found = []
    for run in runs:
        beta, reference = figures[run.name]["beta"], configs.get((reference_of(run.row), run.seed))
        if beta is None or reference is None or beta[0] != beta[1] or beta[0] <= 0:
            continue
        changed = differences(reference, configs[run.row, run.seed])
        if all(change.startswith("callbacks.BetaAnnealing") for change in changed):
            found.append((float(beta[0]), run))
    return found


def _beta_chart(points: Sequence[tuple[float, Run]], answers: _Answers) -> str:
    lines = []
    for budget in answers.budgets:
        chosen = [(beta, answers.at(run.name, budget)) for beta, run in points]
        recalls = [(beta, mean_recall(rows)) for beta, rows in chosen]
        lines.append(
            Line(f"recall at {budget} %", [Point(b, 100 * r, label=f"beta {b:g}") for b, r in recalls if r is not None])
        )
        scores = [(beta, accuracy(rows)) for beta, rows in chosen]
        points_of = [Point(b, 100 * s.mean, 100 * s.low, 100 * s.high, f"beta {b:g}") for b, s in scores]
        lines.append(Line(f"accuracy at {budget} %", points_of))
    lines = [line for line in lines if line.points]
    return draw_chart(Chart(lines, "Penalty and what the guide finds", "beta, constant", "per cent", log=True))
