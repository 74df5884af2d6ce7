"""Numbers and tables as text: Markdown, CSV cells and JSON values of the reports."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from pgp_lightning.evaluation.scoring import Interval

__all__ = ["as_json", "budget", "interval", "markdown_table", "number", "percent", "plain", "transposed", "unit"]

PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float | None) -> str:
    """Write a count or a measurement: whole numbers as they are, others to a tenth or three digits; "" for None."""
    if value is None or not math.isfinite(value):
        return ""
    if value == round(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """Write a share in per cent, to a tenth; "" for None."""
    return "" if share is None or not math.isfinite(share) else f"{100 * share:.1f}"


def budget(ratio: float | None) -> str:
    """Write a keep ratio; "" for None."""
    return "" if ratio is None else f"{100 * ratio:.3g} %"


def interval(value: Interval | None, signed: bool = False) -> str:
    """Write a share and its interval in per cent: "93.4 [91.0, 95.2]"; signed for differences; "" for None."""
    if value is None:
        return ""
    sign = "+" if signed else ""
    mean = f"{100 * value.mean:{sign}.1f}"
    if not math.isfinite(value.low):
        return mean
    return f"{mean} [{100 * value.low:{sign}.1f}, {100 * value.high:{sign}.1f}]"


def unit(values: Iterable[float | None]) -> tuple[float, str]:
    """Return the scale, and its prefix, in which the greatest of some values is a number of one to three digits."""
    most = max((value for value in values if value is not None), default=0.0)
    return next(((scale, prefix) for scale, prefix in PREFIXES if most >= scale), (1.0, ""))


def transposed(columns: Sequence[tuple[str, Sequence[str]]]) -> list[list[str]]:
    """Return columns, a header and cells each, as rows, the headers first."""
    return [list(row) for row in zip(*([header, *cells] for header, cells in columns), strict=True)]


def plain(words: str) -> str:
    """Return a text that Markdown shows as it is, on one line and in one cell."""
    flat = " ".join(words.split()).replace("&", "&amp;").replace("<", "&lt;")
    # Underscores inside a word, and brackets that no address follows, mean nothing.
    return re.sub(r"[\\`*|]|(?<!\w)_|_(?!\w)|\](?=[(\[:])", lambda found: f"\\{found[0]}", flat)


def markdown_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return rows of cells, header first, as a Markdown table, aligned right but for the first columns."""
    head, *body = ([plain(cell) for cell in row] for row in rows)
    rule = [":---" if column < left else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def as_json(value: object) -> object:
    """Return a value as JSON has it: intervals as objects, numbers that are none as null."""
    if isinstance(value, Interval):
        return {name: as_json(end) for name, end in value._asdict().items()}
    if isinstance(value, Mapping):
        return {key: as_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
