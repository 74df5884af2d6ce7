"""Statistics of data as tables, as JSON, as a page and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pgp_lightning.data.statistics import PERCENTILES, SourceStatistics, SplitStatistics, Summary, summarise
from pgp_lightning.evaluation.histograms import Histogram, draw_histograms, histogram_svg
from pgp_lightning.evaluation.html_page import html_page, html_table, printable
from pgp_lightning.evaluation.text import number, percent

__all__ = ["STATISTICS_SUFFIXES", "as_json", "print_statistics", "write_statistics"]

STATISTICS_SUFFIXES = (".html", ".png", ".json")
PIPE_WIDTH = 170  # columns where no terminal says how many there are; the table's greatest width
MEGA = 1_000_000
# Quantity, what people call it, and what its values are divided by: percentiles have them all, in this order.
TITLES = (
    ("slots", "prompt slots of a turn, at the finest tiling", 1),
    ("tiles", "tiles of an image, thumbnail included", 1),
    ("question_tokens", "tokens of a question", 1),
    ("answer_tokens", "tokens of an answer", 1),
    ("question_characters", "characters of a question", 1),
    ("answer_characters", "characters of an answer", 1),
    ("pixels", "image size, megapixels", MEGA),
    ("bytes", "image file, kilobytes", 1000),
    ("turns", "turns of a record", 1),
    ("system_characters", "characters of a system text", 1),
)


def caption(found: SplitStatistics) -> str:
    """Say what was looked at, and how."""
    rule, total = found.gauge.rule, found.total
    seen = f"{total.records:,} records"
    if total.records < total.samples:
        seen = f"the first {found.first:,} records of each source, {total.records:,} of {total.samples:,}"
    if systems := len(total.of("system_characters")):
        seen += f", {systems:,} with a system text of their own"
    tiled = f"tiles of {rule.tile_size} px, at most {rule.max_tiles} or a source's own max_tiles"
    if found.gauge.processor is None:
        return f"{seen}; {tiled} (InternVL's rule, as no base was given)"
    over = f"{found.over_length:,} turns are longer than the base's {found.gauge.processor.max_length:,} slots"
    return f"{seen}; {tiled} (the base's rule); {over} at the finest tiling"


def overview(found: SplitStatistics) -> list[list[str]]:
    """Return the table of sources, header first, their sum last."""
    measure = "tokens" if found.gauge.processor else "characters"
    header = [
        "source",
        "shards",
        "records",
        "rejected",
        "unusable",
        "turns:\nmean, max",
        f"{measure} of a\nquestion:\nmean, max",
        f"{measure} of\nan answer:\nmean, max",
        "image:\nmedian",
        "image:\ngreatest",
        "file, kB:\nmedian, max",
        "tiles:\nmean, max",
        "visual\ntokens:\nmean, max",
        *(["% of\nepoch"] if found.total.share is not None else []),
    ]
    return [header, *(_overview_row(part, measure) for part in (*found.sources, found.total))]


def _overview_row(part: SourceStatistics, measure: str) -> list[str]:
    width, height, size = (summarise(part.of(name)) for name in ("width", "height", "bytes"))
    sizes, most, file = "", "", ""
    if width and height and size:
        sizes = f"{width.median} × {height.median}"
        most = f"{width.most} × {height.most}"
        file = f"{number(size.median / 1000)}, {number(size.most / 1000)}"
    counts = [part.shards, part.records, sum(part.rejected.values()), sum(part.unusable.values())]
    texts = [_mean_and_most(summarise(part.of(name))) for name in ("turns", f"question_{measure}", f"answer_{measure}")]
    tiles = [_mean_and_most(summarise(part.of(name))) for name in ("tiles", "visual_tokens")]
    share = [] if part.share is None else [percent(part.share)]
    return [part.name, *(f"{count:,}" for count in counts), *texts, sizes, most, file, *tiles, *share]


def _mean_and_most(found: Summary | None) -> str:
    return "" if found is None else f"{number(found.mean)}, {number(found.most)}"


def reasons(found: SplitStatistics) -> list[list[str]]:
    """Return the table of what was left out or cannot be used, by source and reason; the header alone if nothing."""
    rows = [["source", "when", "reason", "records", "% of its records"]]
    for part in found.sources:
        for when, counts, of in (
            ("built", part.rejected, part.samples + sum(part.rejected.values())),
            ("read", part.unusable, part.records),
        ):
            ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            rows += [[part.name, when, printable(why), f"{n:,}", percent(n / of)] for why, n in ordered]
    return rows


def percentiles(part: SourceStatistics) -> list[list[str]]:
    """Return the table of percentiles of all quantities, header first."""
    rows = [["quantity", "values", "mean", *(f"{at} %" for at in PERCENTILES), "max"]]
    for quantity, title, scale in TITLES:
        if quantity in part.values or quantity == "pixels":
            summary = summarise(part.of(quantity))
            if summary is not None:
                figures = [number(value / scale) for value in (summary.mean, *summary.percentiles, summary.most)]
                rows.append([title, f"{summary.count:,}", *figures])
    return rows


def histograms(found: SplitStatistics) -> list[Histogram]:
    """Return a histogram of every quantity, a row for each source and, if they are several, one for all."""
    parts = (*found.sources, found.total) if len(found.sources) > 1 else found.sources
    known = {*found.quantities}
    return [
        Histogram.of(title, [(part.name, part.of(quantity)) for part in parts], scale)
        for quantity, title, scale in TITLES
        if quantity in known and (quantity != "system_characters" or len(found.total.of(quantity)))
    ]


def as_json(found: SplitStatistics) -> dict[str, Any]:
    """Return all figures and the bins of the histograms as JSON values; sizes in pixels and bytes."""
    bins = {}
    for quantity, _, _ in TITLES:
        if quantity in found.quantities:
            chart = Histogram.of("", [(part.name, part.of(quantity)) for part in found.sources])
            counts = {row.name: row.counts.tolist() for row in chart.rows}
            bins[quantity] = {"edges": chart.edges.tolist(), "counts": counts}
    return {
        "manifest": found.manifest,
        "split": found.split,
        "first": found.first,
        "rule": asdict(found.gauge.rule),
        "max_length": found.gauge.processor.max_length if found.gauge.processor else None,
        "over_length": found.over_length if found.gauge.processor else None,
        "sources": {part.name: _figures(part, found.quantities) for part in found.sources},
        "all": _figures(found.total, found.quantities),
        "histograms": bins,
    }


def _figures(part: SourceStatistics, quantities: Sequence[str]) -> dict[str, Any]:
    names = ("shards", "samples", "records", "rejected", "unusable", "share")
    figures: dict[str, Any] = {name: getattr(part, name) for name in names}
    for quantity in quantities:
        summary = summarise(part.of(quantity))
        figures[quantity] = summary and {
            "count": summary.count,
            "mean": summary.mean,
            "max": summary.most,
            "percentiles": dict(zip(map(str, PERCENTILES), summary.percentiles, strict=True)),
        }
    return figures


def print_statistics(found: SplitStatistics) -> None:
    """Print the tables to standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    tables = [(f"{found.split} of {found.manifest}: {caption(found)}", _rich(overview(found), total=True))]
    if len(bad := reasons(found)) > 1:
        tables.append(("left out when the shards were built, or unusable when they were read", _rich(bad)))
    tables.append(("percentiles over all sources", _rich(percentiles(found.total))))
    for title, table in tables:
        console.print(Text(printable(title), style="italic"), table, Text(), sep="\n")


def _rich(rows: Sequence[Sequence[str]], total: bool = False) -> Table:
    """Return rows of cells, header first, as a table of the terminal; none of them is markup."""
    table = Table(box=None, padding=(0, 1))
    for column, header in enumerate(rows[0]):
        table.add_column(Text(header), justify="left" if column == 0 else "right", overflow="fold")
    for place, row in enumerate(rows[1:], 2):
        table.add_row(*map(Text, row), style="bold" if total and place == len(rows) else None)
    return table


def write_statistics(found: SplitStatistics, file: Path) -> None:
    """Write a page, a picture or the figures alone, as the file's suffix has it: .html, .png or .json."""
    if file.suffix == ".html":
        file.write_text(_page(found), encoding="utf-8")
    elif file.suffix == ".png":
        heading = f"{found.split} of {Path(found.manifest).name}: {found.total.records:,} records"
        draw_histograms(histograms(found), heading).save(file)
    else:
        file.write_text(json.dumps(as_json(found), indent=1) + "\n", encoding="utf-8")


def _page(found: SplitStatistics) -> str:
    """Return the HTML file."""
    title = f"{found.split} of {found.manifest}"
    charts = "".join(f'<div class="sheet">{histogram_svg(chart)}</div>' for chart in histograms(found))
    bad = reasons(found)
    left_out = f'<h2>Left out or unusable</h2><div class="sheet">{html_table(bad)}</div>' if len(bad) > 1 else ""
    shown = [found.total, *(found.sources if len(found.sources) > 1 else ())]
    tables = "".join(
        f'<h2>Percentiles: {escape(part.name)}</h2><div class="sheet">{html_table(percentiles(part))}</div>'
        for part in shown
    )
    return html_page(
        printable(title),
        f'<h1>{escape(printable(title))}</h1><p class="notes">{escape(caption(found))}.</p>'
        f'<div class="sheet">{html_table(overview(found))}</div>{left_out}'
        f'<h2>Distributions</h2><p class="notes">Each row is one source, its highest bar at full height; the upright '
        f'line is its median. Bars say their numbers when pointed at.</p><div class="charts">{charts}</div>{tables}',
    )
