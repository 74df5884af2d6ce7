"""Tables and the curve of a comparison, from the folder that a run filled.

The folder holds `<method>.jsonl` (a line per sample, `scoring.Answer`) and `methods.json`: {method: {"name",
"keep_ratio", "layers", "positions", "guide", "flops", "guide_flops", "latency", "note"}}, all of which may be missing.
`flops` is the answer model's, without the guide's; `latency` holds numbers under names that say their unit. A method is
called by its name and, behind an @, its budget in per cent: "pgp@5"; the unpruned model has no budget: "full".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from pgp_lightning.errors import ConfigError, DataError
from pgp_lightning.evaluation import text
from pgp_lightning.evaluation.resume import finished_rows
from pgp_lightning.evaluation.rows import Report, Row, family
from pgp_lightning.evaluation.scoring import (
    Answer,
    Interval,
    Results,
    Sample,
    accuracy,
    accuracy_by_type,
    agreement,
    load_results,
    mean_recall,
    paired_bootstrap,
)
from pgp_lightning.guides.base import Guide, Remember
from pgp_lightning.guides.simple import OracleGuide, RandomGuide, UniformGuide
from pgp_lightning.prefill import Pruner

__all__ = ["Comparison", "build_report", "describe_method", "paired_markdown", "paired_table", "write_report"]


def describe_method(
    answers: Sequence[Answer], label: str, pruner: Pruner, configured: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what `methods.json` says of a method: means over its answers, null where one is not known.

    Args:
        answers: of the method, as `Benchmark` writes them.
        label: its name without budget.
        pruner: with its budget.
        configured: its class and arguments, if it was configured; a guide is called by them, else by its class.
    """
    guide, given = getattr(pruner, "guide", None), configured.get("init_args", {}).get("guide")
    while isinstance(guide, Remember):
        guide = guide.guide
    control = isinstance(guide, (UniformGuide, RandomGuide, OracleGuide))
    named = None if control or not isinstance(guide, Guide) else type(guide).__name__
    return {
        "name": label,
        "keep_ratio": pruner.keep_ratio,
        "layers": list(pruner.layers),
        "positions": "renumbered" if getattr(pruner, "renumber", False) else "original",
        "guide": _named(given) if given else named,
        "flops": _known_mean(answer.extra["flops"] for answer in answers),
        "guide_flops": _known_mean(answer.extra["guide_flops"] for answer in answers),
        "tiles_encoded": _mean(answer.extra["tiles_encoded"] / answer.extra["tiles"] for answer in answers),
        "pruner": type(pruner).__name__,
    }


def _named(configured: Mapping[str, Any]) -> str:
    """Return a class and its arguments as a configuration has them, the ones that are text: Guide(base, order)."""
    parts = configured["class_path"].split(".")
    name = next((part for part in parts if part[0].isupper()), parts[-1])
    inner = configured.get("init_args", {}).values()
    return f"{name}({', '.join(_named(v) if isinstance(v, dict) else v for v in inner if isinstance(v, (str, dict)))})"


def _known_mean(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return _mean(known) if len(known) == len(found) else None


def build_report(
    results: Results | str | Path,
    reference: str = "pgp",
    full: str = "full",
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Report:
    """Make the rows of a comparison.

    Args:
        results: of the methods, or the folder that holds them.
        reference: what differences are to: a method, then its row of the same budget, or one row ("pgp@5").
        full: the unpruned model's row.
        draws: of the bootstrap.
        seed: of the bootstrap.
        level: of the intervals.

    Raises:
        ConfigError: if there is nothing to compare, or methods have different samples.
        DataError: if a file cannot be read.
    """
    if not isinstance(results, Results):
        results = load_results(results)
    chance = {"draws": draws, "seed": seed, "level": level}
    order = {method: place for place, method in enumerate(results.answers)}
    rows = [_row(results, method, reference, full, chance) for method in order]
    rows.sort(key=lambda row: (row.method != full, -(row.keep_ratio or 0.0), order[row.method]))
    samples = results.samples
    return Report(rows, len(samples), len({sample[:2] for sample in samples}), level, full, reference)


def _row(results: Results, method: str, reference: str, full: str, chance: dict[str, Any]) -> Row:
    answers, info, base = results.answers[method], results.info[method], results.answers.get(full)
    against = reference if reference in results.answers else f"{reference}@{_percent(method)}"
    other = results.answers.get(against) if against != method else None
    score = accuracy(answers, **chance)
    whole = None if base is None else sum(answer.correct for answer in base) / len(base)
    flops, full_flops = (_flops(results.info.get(name, {})) for name in (method, full))
    latency = info.get("latency") or {}
    return Row(
        method=method,
        name=str(info.get("name") or family(method)),
        keep_ratio=_keep_ratio(method, info),
        layers=info.get("layers"),
        positions=info.get("positions"),
        guide=info.get("guide"),
        note=str(info.get("note") or ""),
        tokens=_mean(answer.n for answer in answers),
        kept=_mean(answer.kept for answer in answers),
        layer_average=_mean(answer.layer_average for answer in answers),
        kv_entries=_mean(answer.kv_entries for answer in answers),
        tiles_encoded=info.get("tiles_encoded"),
        flops=flops,
        flops_relative=flops / full_flops if flops is not None and full_flops else None,
        times={name: value for name, value in latency.items() if _is_number(value)},
        accuracy=score,
        relative=score.mean / whole if whole else None,
        types=accuracy_by_type(answers),
        agreement=None if base is None else agreement(answers, base),
        recall=mean_recall(answers),
        reference=against if other else None,
        difference=_difference(answers, other, chance) if other else None,
    )


def _difference(first: Sequence[Answer], second: Sequence[Answer], chance: Mapping[str, Any]) -> Interval:
    values = [a.correct - b.correct for a, b in zip(first, second, strict=True)]
    return paired_bootstrap(values, [answer.scene for answer in first], **chance)


def _flops(info: Mapping[str, Any]) -> float | None:
    """Return answer model's and guide's together; unknown if one that is needed is."""
    # A guide's that are null are unknown; where nothing is said of them and there is no guide, there are none.
    own, guide = info.get("flops"), info.get("guide_flops", None if info.get("guide") else 0.0)
    return float(own + guide) if _is_number(own) and _is_number(guide) else None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _percent(method: str) -> str:
    return method.rpartition("@")[2] if "@" in method else ""


def _keep_ratio(method: str, info: Mapping[str, Any]) -> float | None:
    """Return the budget that `methods.json` says, else the one in the method's name."""
    given = info.get("keep_ratio")
    if _is_number(given):
        return float(given)
    try:
        return float(_percent(method)) / 100
    except ValueError:
        return None


def write_report(
    folder: str | Path, into: str | Path | None = None, reference: str = "pgp", full: str = "full"
) -> Report:
    """Write report.md, report.csv, report.json and, if anything is pruned, curve.svg about a results folder.

    Rows that a run left unfinished are left out, and named in a line.

    Args:
        folder: with the results.
        into: where to write; by default into the folder itself.
        reference: see `build_report`.
        full: see `build_report`.
    """
    rows, unfinished = finished_rows(folder)
    if unfinished:
        print(f"not in the report, for they are not finished: {', '.join(unfinished)}")
    report = build_report(load_results(folder, rows) if rows else folder, reference, full)
    into = Path(into or folder)
    into.mkdir(parents=True, exist_ok=True)
    files = {"report.md": report.markdown(), "report.csv": report.csv(), "report.json": report.json()}
    if any(row.method != full for row in report.rows):
        files["curve.svg"] = report.curve()
    for name, content in files.items():
        (into / name).write_text(content, encoding="utf-8")
    return report


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same samples.

    Args:
        first: a method.
        second: the one it is compared with.
        part: which samples: all, or those of one side of a split.
        samples: how many.
        scenes: how many records, one image each, they are about.
        wins: samples that only the first answers rightly.
        losses: samples that only the second answers rightly.
        accuracy: of the first minus that of the second; None without samples.
        recall: the same of the recall, over the samples where both have one; None without any.
    """

    first: str
    second: str
    part: str
    samples: int
    scenes: int
    wins: int
    losses: int
    accuracy: Interval | None
    recall: Interval | None


def paired_table(
    folder: str | Path,
    pairs: Sequence[tuple[str, str]],
    split: str | Mapping[Sample, bool] | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Comparison]:
    """Compare pairs of methods, on all samples and on both sides of a split.

    Args:
        folder: with the results.
        pairs: of methods; differences are the first minus the second.
        split: a boolean per sample: the name of a method of the folder (whether it answers rightly: e.g. the guide
            itself), or of a boolean field of the lines, or a mapping from (source, key, turn).
        draws: of the bootstrap.
        seed: of the bootstrap.
        level: of the intervals.

    Raises:
        ConfigError: if a method has no results, samples differ, or the split leaves samples without a side.
    """
    names = [method for pair in pairs for method in pair]
    if isinstance(split, str) and (Path(folder) / f"{split}.jsonl").exists():
        names.append(split)
    results = load_results(folder, list(dict.fromkeys(names)))
    parts = {"all": set(results.samples)}
    if split is not None:
        sides, name = _sides(results, split), split if isinstance(split, str) else "split"
        parts[f"{name}: yes"] = {sample for sample, side in sides.items() if side}
        parts[f"{name}: no"] = {sample for sample, side in sides.items() if not side}
    chance = {"draws": draws, "seed": seed, "level": level}
    found = []
    for first, second in pairs:
        both = list(zip(results.answers[first], results.answers[second], strict=True))
        for part, members in parts.items():
            chosen = [answers for answers in both if answers[0].sample in members]
            found.append(_comparison((first, second), part, chosen, chance))
    return found


def paired_markdown(rows: Sequence[Comparison]) -> str:
    """Return comparisons as a Markdown table; differences in points with their intervals."""
    head = ["first", "second", "samples of", "n", "records", "only first right", "only second right"]
    table = [[*head, "accuracy, first minus second", "recall, first minus second"]]
    for row in rows:
        counts = [str(count) for count in (row.samples, row.scenes, row.wins, row.losses)]
        differences = [text.interval(value, signed=True) for value in (row.accuracy, row.recall)]
        table.append([row.first, row.second, row.part, *counts, *differences])
    return text.markdown_table(table, left=3)


def _comparison(
    pair: tuple[str, str], part: str, chosen: Sequence[tuple[Answer, Answer]], chance: Mapping[str, Any]
) -> Comparison:
    recalls = [(a.scene, a.recall - b.recall) for a, b in chosen if a.recall is not None and b.recall is not None]
    return Comparison(
        first=pair[0],
        second=pair[1],
        part=part,
        samples=len(chosen),
        scenes=len({a.scene for a, _ in chosen}),
        wins=sum(a.correct and not b.correct for a, b in chosen),
        losses=sum(b.correct and not a.correct for a, b in chosen),
        accuracy=_difference([a for a, _ in chosen], [b for _, b in chosen], chance) if chosen else None,
        recall=paired_bootstrap([d for _, d in recalls], [scene for scene, _ in recalls], **chance)
        if recalls
        else None,
    )


def _sides(results: Results, split: str | Mapping[Sample, bool]) -> dict[Sample, bool]:
    """Return on which side of a split each sample is."""
    if not isinstance(split, str):
        sides = dict(split)
    elif split in results.answers:
        sides = {answer.sample: answer.correct for answer in results.answers[split]}
    else:
        sides = {}
        for answer in (answer for answers in results.answers.values() for answer in answers):
            side = answer.extra.get(split)
            if side is None:
                continue
            if not isinstance(side, bool) or sides.setdefault(answer.sample, side) != side:
                raise DataError(f"{split!r} of {answer} must be true or false, and the same for all methods")
    if lacking := [sample for sample in results.samples if sample not in sides]:
        raise ConfigError(
            f"the split {split if isinstance(split, str) else ''} says nothing of {len(lacking)} of "
            f"{len(results.samples)} samples (first: {lacking[0]}); name a method of the folder, or a boolean field of "
            "its lines"
        )
    return sides
