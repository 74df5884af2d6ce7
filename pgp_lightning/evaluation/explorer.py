"""A comparison as one HTML file: table, curve, and the answers that pruning flipped, with what was kept for them.

The file holds all it shows and asks for nothing else, so it works from a disk and in an artefact store. A flip is a
question that the unpruned model answers rightly and a pruned one wrongly (lost), or the other way round (gained).
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path

from PIL import Image

from pgp_lightning.errors import ConfigError
from pgp_lightning.evaluation import text
from pgp_lightning.evaluation.html_page import html_table
from pgp_lightning.evaluation.overlay import draw_heat, draw_kept
from pgp_lightning.evaluation.report import build_report
from pgp_lightning.evaluation.resume import finished_rows
from pgp_lightning.evaluation.rows import Report
from pgp_lightning.evaluation.scoring import Answer, Results, Scene, exact_match, load_results
from pgp_lightning.vlm.tiles import TileGrid

__all__ = ["explored_scenes", "explorer_page", "flips", "write_explorer"]

SHOWN = 4  # methods beside each other, unless chosen

STYLE = """
:root { color-scheme: light; --ink: #1d2433; --faint: #5b6475; --line: #dfe3ea; --good: #00714f; --bad: #b3440b; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 24px; background: #f7f8fa; color: var(--ink);
  font: 15px/1.5 system-ui, Helvetica, Arial, sans-serif; }
h1 { font-size: 24px; margin: 0 0 16px; } h2 { font-size: 19px; margin: 32px 0 8px; }
.sheet { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 16px; overflow-x: auto; }
.sheet svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
.notes, .faint { color: var(--faint); font-size: 13px; }
nav { position: sticky; top: 0; background: #f7f8fa; padding: 8px 0; z-index: 1; }
nav div { margin: 4px 0; }
nav b { display: inline-block; width: 84px; font-size: 13px; color: var(--faint); font-weight: 600; }
button { font: inherit; font-size: 13px; border: 1px solid var(--line); background: #fff; border-radius: 99px;
  padding: 2px 12px; margin: 2px; cursor: pointer; color: var(--ink); }
button[aria-pressed="true"] { background: var(--ink); color: #fff; border-color: var(--ink); }
article { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 16px; margin: 12px 0; }
article h3 { font-size: 16px; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
article p { margin: 2px 0 10px; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 16px; }
figure { margin: 0; overflow-wrap: anywhere; }
figure img { display: inline-block; border-radius: 4px; vertical-align: top; margin-right: 4px; }
figcaption { font-size: 13px; margin-top: 4px; width: min-content; min-width: 100%; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
figure { border-top: 3px solid transparent; padding-top: 5px; } figure.flip { border-color: #0072b2; }
[hidden] { display: none; }
"""

SCRIPT = """
const chosen = {};
for (const button of document.querySelectorAll("nav button")) button.onclick = () => {
  const { group, value } = button.dataset;
  chosen[group] = value;
  for (const other of document.querySelectorAll("nav button"))
    if (other.dataset.group === group) other.setAttribute("aria-pressed", other === button);
  let shown = 0;
  for (const one of document.querySelectorAll("article")) {
    one.hidden = !Object.keys(chosen).every(
      (key) => chosen[key] === "" || one.dataset[key].split(" ").includes(chosen[key]));
    shown += !one.hidden;
  }
  document.getElementById("shown").textContent = shown;
};
"""


def flips(answers: Sequence[Answer], full: Sequence[Answer], most: int | None = None) -> list[int]:
    """Return the places of the samples that a method flipped.

    Args:
        answers: of the method.
        full: of the unpruned model, to the same samples in the same order.
        most: how many at the most, taken by turns from lost and gained of each type; by default all.

    Returns:
        Places in the order of the samples.
    """
    groups: dict[tuple[bool, str], list[int]] = {}
    for place, (answer, base) in enumerate(zip(answers, full, strict=True)):
        if answer.correct != base.correct:
            groups.setdefault((base.correct, answer.type), []).append(place)
    # The first of every group, then the second of every group, and so on.
    by_turns = [place for turn in zip_longest(*groups.values()) for place in turn if place is not None]
    return sorted(by_turns[:most])


def write_explorer(
    folder: str | Path,
    image_of: Callable[[Scene], Image.Image],
    grid_of: Callable[[Scene], TileGrid],
    into: str | Path | None = None,
    methods: Sequence[str] | None = None,
    reference: str = "pgp",
    full: str = "full",
    max_cases: int = 24,
    size: int = 224,
) -> Path:
    """Write explorer.html about a results folder.

    Args:
        folder: with the results.
        image_of: gives the image of a scene, its source and key.
        grid_of: gives the way the image of a scene was tiled.
        into: where to write; by default into the folder itself.
        methods: whose flips are shown, and beside each other for every flip of one of them; by default those of the
            smallest budget, the reference first, four at the most.
        reference: see `report.build_report`.
        full: the unpruned model's row.
        max_cases: flips of each method at the most. The file grows with this times the square of the methods: by
            default it has a few megabytes.
        size: longer side of a picture at the most, in pixels.

    Returns:
        The file.

    Raises:
        ConfigError: if the unpruned model or a method is missing, a number is not positive, or a grid does not have the
            visual tokens of the answers.
    """
    rows, _ = finished_rows(folder)
    results = load_results(folder, rows or None)
    page = explorer_page(
        results, build_report(results, reference, full), image_of, grid_of, methods, max_cases=max_cases, size=size
    )
    file = Path(into or folder) / "explorer.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")
    return file


def explorer_page(
    results: Results,
    report: Report,
    image_of: Callable[[Scene], Image.Image],
    grid_of: Callable[[Scene], TileGrid],
    methods: Sequence[str] | None = None,
    max_cases: int = 24,
    size: int = 224,
) -> str:
    """Return the HTML; see `write_explorer`."""
    if min(max_cases, size) < 1:
        raise ConfigError(f"max_cases and size must be at least 1, got {max_cases} and {size}")
    methods = _default_methods(report) if methods is None else list(dict.fromkeys(methods))
    shown = _cases(results, report, methods, max_cases)
    full = results.answers[report.full]
    names = _names(report)
    types = sorted({full[place].type for place in shown})
    parts = [_head(report), _flip_counts(results, report, shown, max_cases)]
    if shown:
        parts.append(_filters([names[m] for m in methods], types, len(shown)))
    for place in sorted(shown):
        who, kind = " ".join(str(methods.index(m)) for m in shown[place]), types.index(full[place].type)
        answers = {method: results.answers[method][place] for method in methods}
        image, grid = _small(image_of(full[place].scene), size), grid_of(full[place].scene)
        parts.append(
            f'<article data-method="{who}" data-type="{kind}" data-way="{_way(full[place])}">'
            f"{_case(full[place], answers, names, image, grid)}</article>"
        )
    return _document("\n".join(parts))


def explored_scenes(
    results: Results, report: Report, methods: Sequence[str] | None = None, max_cases: int = 24
) -> set[Scene]:
    """Return the scenes whose images `explorer_page` asks for; see `write_explorer`."""
    methods = _default_methods(report) if methods is None else list(dict.fromkeys(methods))
    full = results.answers.get(report.full, [])
    return {full[place].scene for place in _cases(results, report, methods, max_cases)}


def _cases(results: Results, report: Report, methods: Sequence[str], max_cases: int) -> dict[int, list[str]]:
    """Return the places of the samples that are shown, and which of the methods flipped each.

    Raises:
        ConfigError: if the unpruned model or a method is missing.
    """
    known = ", ".join(results.answers)
    if report.full not in results.answers:
        raise ConfigError(f"flips are told by the unpruned model, {report.full!r}, which is not among {known}")
    if missing := [method for method in methods if method not in results.answers or method == report.full]:
        raise ConfigError(f"no flips to show of {', '.join(missing)}; choose pruned methods among {known}")
    full = results.answers[report.full]
    places = {place for method in methods for place in flips(results.answers[method], full, max_cases)}
    return {p: [m for m in methods if results.answers[m][p].correct != full[p].correct] for p in places}


def _way(base: Answer) -> str:
    return "lost" if base.correct else "gained"


def _case(
    base: Answer, answers: Mapping[str, Answer], names: Mapping[str, str], image: Image.Image, grid: TileGrid
) -> str:
    """Return what is shown of one question: its texts, its image, and a figure for each method."""
    figures = [_figure([(image, "the image")], f"all tokens: {_given(base)}", "same")]
    record = f"{base.source}/{base.key}"
    for method, answer in answers.items():
        if grid.tokens != answer.n:
            raise ConfigError(
                f"the image of {base} has a grid of {grid.tokens} visual tokens, but the answers of {method} tell of "
                f"{answer.n}; tile the images as the answer model does"
            )
        figures.append(_method_figure(names[method], answer, image, grid, answer.correct != base.correct))
    return (
        f"<h3>{escape(base.question)}</h3><p>right answer: <b>{escape(base.truth)}</b> "
        f'<span class="faint">· {escape(base.type)} · {_way(base)} · {escape(record)}, turn {base.turn}</span></p>'
        f'<div class="row">{"".join(figures)}</div>'
    )


def _default_methods(report: Report) -> list[str]:
    """Return the pruned methods of the smallest budget, the reference first."""
    pruned = [row for row in report.rows if row.method != report.full]
    budgets = [row.keep_ratio for row in pruned if row.keep_ratio is not None]
    least = [row for row in pruned if not budgets or row.keep_ratio == min(budgets)]
    least.sort(key=lambda row: row.method.split("@")[0] != report.reference.split("@")[0])
    return [row.method for row in least[:SHOWN]]


def _names(report: Report) -> dict[str, str]:
    return {row.method: f"{row.name}, {text.budget(row.keep_ratio) or 'all'}" for row in report.rows}


def _small(image: Image.Image, size: int) -> Image.Image:
    """Shrink an image so that its longer side is no longer than size; never enlarge."""
    small = image.convert("RGB")
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    return small


def _embedded(image: Image.Image, label: str) -> str:
    """Return an image element that holds its picture: PNG or JPEG, whichever is shorter."""
    best: tuple[str, bytes] | None = None
    for kind in ("png", "jpeg"):
        out = io.BytesIO()
        image.save(out, kind, quality=82)
        if best is None or len(out.getvalue()) < len(best[1]):
            best = kind, out.getvalue()
    assert best is not None
    data = base64.b64encode(best[1]).decode()
    return (
        f'<img width="{image.width}" height="{image.height}" alt="{escape(label)}" title="{escape(label)}" '
        f'src="data:image/{best[0]};base64,{data}">'
    )


def _given(answer: Answer) -> str:
    mark, word = ("good", "✓") if answer.correct else ("bad", "✗")
    return f'<span class="{mark}">{word} {escape(answer.given) or "(nothing)"}</span>'


def _figure(pictures: Sequence[tuple[Image.Image, str]], caption: str, kind: str) -> str:
    drawn = "".join(_embedded(image, label) for image, label in pictures)
    return f'<figure class="{kind}">{drawn}<figcaption>{caption}</figcaption></figure>'


def _method_figure(name: str, answer: Answer, image: Image.Image, grid: TileGrid, flipped: bool) -> str:
    pictures = []
    if answer.keep is not None:
        pictures.append((draw_kept(image, grid, answer.keep), f"kept by {name}"))
    if answer.importance is not None:
        pictures.append((draw_heat(image, grid, answer.importance), f"importance by {name}"))
    recall = "" if answer.recall is None else f", recall {text.percent(answer.recall)} %"
    missing = "" if pictures else "<br>kept tokens were not recorded"
    caption = (
        f"<b>{escape(name)}</b>: {_given(answer)}<br>"
        f'<span class="faint">{answer.kept} of {answer.n} tokens{recall}{missing}</span>'
    )
    return _figure(pictures, caption, "flip" if flipped else "same")


def _head(report: Report) -> str:
    # Inside HTML an SVG needs no namespace, and without it the file names no address at all.
    curve = report.curve().replace(' xmlns="http://www.w3.org/2000/svg"', "", 1) if len(report.rows) > 1 else ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes())
    return (
        f'<h1>Pruning methods compared</h1><div class="sheet">{html_table(report.table())}</div>'
        f'<ul class="notes">{notes}</ul><div class="sheet">{curve}</div>'
        f'<h2>Accuracy by type of question, %</h2><div class="sheet">{html_table(report.types_table())}</div>'
    )


def _flip_counts(results: Results, report: Report, cases: Mapping[int, Sequence[str]], most: int) -> str:
    """Return the heading of the flips and a table of all of them."""
    full, names = results.answers[report.full], _names(report)
    rows = [["method", "lost", "gained", "other wrong answer", "shown below"]]
    for method in (row.method for row in report.rows if row.method != report.full):
        pairs = list(zip(results.answers[method], full, strict=True))
        lost = sum(base.correct and not answer.correct for answer, base in pairs)
        gained = sum(answer.correct and not base.correct for answer, base in pairs)
        wrong = [(a, base) for a, base in pairs if not a.correct and not base.correct]
        other = sum(not exact_match(answer.given, base.given) for answer, base in wrong)
        shown = sum(method in flipped for flipped in cases.values())
        rows.append([names[method], *map(str, (lost, gained, other, shown))])
    return (
        f"<h2>Answers that pruning flipped</h2><p>Lost: right with all tokens, wrong with the kept ones; gained: the "
        f"other way round. At most {most} are chosen for each method, by turns from all types and both directions.</p>"
        f'<div class="sheet">{html_table(rows)}</div><p class="notes">Beside each image: where it is '
        "clear, a kept token of a tile covers it, or one of the thumbnail, outlined in orange. Then the importance, "
        "dark blue to light yellow, the thumbnail's as small squares. A blue bar marks the methods that flipped.</p>"
    )


def _filters(methods: Sequence[str], types: Sequence[str], count: int) -> str:
    groups = [
        ("method", "flipped by", [("", "any"), *((str(i), name) for i, name in enumerate(methods))]),
        ("type", "type", [("", "any"), *((str(i), name) for i, name in enumerate(types))]),
        ("way", "direction", [("", "both"), ("lost", "lost"), ("gained", "gained")]),
    ]
    lines = []
    for group, label, values in groups:
        buttons = "".join(
            f'<button type="button" data-group="{group}" data-value="{value}" '
            f'aria-pressed="{str(not value).lower()}">{escape(name)}</button>'
            for value, name in values
        )
        lines.append(f"<div><b>{label}</b>{buttons}</div>")
    return f'<nav>{"".join(lines)}<div class="faint"><span id="shown">{count}</span> of {count} shown</div></nav>'


def _document(body: str) -> str:
    # Only this script may run: should anything ever slip through unescaped, a browser would not execute it.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{policy}"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Pruning methods compared</title><style>{STYLE}</style></head><body>\n{body}\n"
        f"<script>{SCRIPT}</script></body></html>\n"
    )
