"""What the HTML files about data share.

A page is one file that asks for nothing else, runs nothing, and is light or dark as the reader's system is.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pgp_lightning.evaluation.curve import COLOURS

__all__ = ["html_page", "html_table", "printable"]

# Of the colours of lines, those that are too dark for a dark page are lightened there.
_BARS = "\n".join(f".c{number} {{ fill: {colour}; }}" for number, colour in enumerate(COLOURS))
STYLE = f"""
:root {{ color-scheme: light dark; --paper: #f7f8fa; --sheet: #ffffff; --ink: #1d2433; --faint: #5b6475;
  --line: #dfe3ea; --bad: #b3260b; --box: #0072b2; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #14171d; --sheet: #1d222b; --ink: #e6e9ef; --faint: #9aa4b5;
  --line: #343b48; --bad: #ff8a70; --box: #6cc0f5; }} svg rect[class^="c"] {{ filter: brightness(1.25); }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1240px; padding: 24px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, Helvetica, Arial, sans-serif; }}
h1 {{ font-size: 24px; margin: 0 0 4px; }} h2 {{ font-size: 18px; margin: 28px 0 8px; }}
p {{ margin: 4px 0; }}
.sheet {{ background: var(--sheet); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px;
  margin: 12px 0; overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; white-space: nowrap; }}
th, td {{ padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--line); }}
tr:last-child td {{ border-bottom: 0; }}
th {{ color: var(--faint); font-weight: 600; vertical-align: bottom; white-space: normal; }}
th:first-child, td:first-child {{ text-align: left; font-weight: 600; }}
.faint {{ color: var(--faint); }} .notes {{ color: var(--faint); font-size: 13px; }}
.bad {{ color: var(--bad); font-weight: 600; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(520px, 100%), 1fr)); gap: 12px; }}
.charts .sheet {{ margin: 0; padding: 8px; }}
svg {{ max-width: 100%; height: auto; font-family: inherit; }}
svg text.ink, svg rect.mark {{ fill: var(--ink); }} svg .faint {{ fill: var(--faint); }} .grid {{ fill: var(--line); }}
{_BARS}
article {{ display: flex; flex-wrap: wrap; gap: 20px; align-items: flex-start; }}
article .turns {{ flex: 1 1 320px; min-width: 0; }}
article h2 {{ font-size: 16px; margin: 0; overflow-wrap: anywhere; }}
article img {{ display: block; max-width: 100%; height: auto; border-radius: 4px; }}
dl {{ margin: 8px 0; }} dt {{ font-weight: 600; margin-top: 10px; }} dd {{ margin: 2px 0; }}
dt, dd, pre, .bad {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
pre {{ font-size: 13px; }}
"""


def printable(text: str) -> str:
    """Return a text without what steers a terminal or cannot be written as UTF-8: such characters become `�`."""
    return "".join(mark if mark.isprintable() or mark == "\n" else "�" for mark in text)


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells, header first, as an HTML table."""
    head, *body = ([escape(cell) for cell in row] for row in rows)
    lines = ["<tr><th>" + "</th><th>".join(head) + "</th></tr>"]
    lines += ["<tr><td>" + "</td><td>".join(row) + "</td></tr>" for row in body]
    return f"<table>{''.join(lines)}</table>"


def html_page(title: str, body: str) -> str:
    """Return a document; the title is escaped, the body is HTML."""
    # Nothing may be loaded or run: should anything ever slip through unescaped, a browser would not execute it.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{policy}"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )
