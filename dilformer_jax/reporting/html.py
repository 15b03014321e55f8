"""A report as one HTML file that needs nothing beside it: text, tables and pictures inside."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from dilformer_jax.registration.checks import VERDICTS
from dilformer_jax.reporting.tables import text, write_text

STYLE = """
:root { color-scheme: light dark; --ink: #22272e; --pale: #6b7480; --line: #e1e4e8; --paper: #ffffff;
        --accent: #0b6e99; --pass: #1f7a44; --warn: #9a6a00; --fail: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --pale: #9aa4ad; --line: #3a4048; --paper: #16191d;
          --accent: #1f8fc0; --pass: #5fc98a; --warn: #e0b040; --fail: #ff8a80; } }
body { margin: 3rem auto; max-width: 76rem; padding: 0 1.5rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.8rem; font-weight: 600; margin: 0 0 2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; font-weight: 600; margin: 2.5rem 0 .6rem; padding-top: 1.2rem;
     border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; white-space: pre-line; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { color: var(--pale); font-weight: 500; text-align: left; }
th, td { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.number { text-align: right; white-space: nowrap; }
.pass { color: var(--pass); } .warn { color: var(--warn); } .fail { color: var(--fail); }
td.pass, td.warn, td.fail { font-weight: 600; }
img { max-width: 100%; height: auto; margin: 1rem 0; }
img.plate { background: #ffffff; border-radius: 4px; }
@media (max-width: 40rem) { body { margin: 1.2rem auto; padding: 0 .9rem; } img { max-width: none; width: 60rem; } }
@media print { body { margin: 0; max-width: none; font-size: 10pt; } section { break-inside: avoid-page; }
               img { max-width: 100%; width: auto; } .wide { overflow: visible; } }
"""
# The first bytes of a picture, and its kind.
KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs with a blank line between them, and where given a picture (PNG) and a table's rows."""

    heading: str
    text: str = ""
    table: Sequence[Mapping[str, Any]] | None = None
    figure: bytes | None = None


def report(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the sections into one HTML file, replaced in one piece. Whatever is text is escaped.

    A table has the columns of its first row. Raises BadInput where the file cannot be written.
    """
    write(path, title, [_section(entry) for entry in sections])


def write(path: Path, title: str, parts: Sequence[str], style: str = "", script: str = "") -> None:
    """Write a page of these parts, which are HTML, under a title, which is text; replaced in one piece.

    Raises BadInput where the file cannot be written.
    """
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts, *([f"<script>{script}</script>"] if script else [])])
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
    write_text(path, page)


def section(heading: str, *parts: str) -> str:
    """A section of a page: its heading, which is text, and its parts, which are HTML."""
    return "\n".join([f"<section>\n<h2>{escape(heading)}</h2>", *parts, "</section>"])


def paragraphs(content: str) -> str:
    """Text whose paragraphs have a blank line between them."""
    return "\n".join(f"<p>{escape(part.strip())}</p>" for part in content.split("\n\n") if part.strip())


def picture(data: bytes, description: str, kind: str = "") -> str:
    """A picture (PNG, JPEG or WebP) with the words for who cannot see it; the class "plate" puts it on white."""
    image = f'<img alt="{escape(description)}"{_class(kind)} src="{data_url(data)}">'
    return f'<div class="wide">{image}</div>'


def data_url(data: bytes) -> str:
    """A picture (PNG, JPEG or WebP) as the address of an image."""
    kind = next(kind for start, kind in KINDS.items() if data.startswith(start))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with the columns of the first row; numbers to the right, verdicts in their colours."""
    columns = list(rows[0])
    words = {column for column in columns if any(isinstance(row.get(column), str) for row in rows)}
    kinds = {column: "" if column in words else "number" for column in columns}
    head = "".join(f"<th{_class(kinds[column])}>{escape(column)}</th>" for column in columns)
    lines = ["".join(_cell(row.get(column), kinds[column]) for column in columns) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _section(entry: Section) -> str:
    parts = [paragraphs(entry.text)] if entry.text.strip() else []
    if entry.figure is not None:
        parts.append(picture(entry.figure, entry.heading, "plate"))
    return section(entry.heading, *parts, *([table(entry.table)] if entry.table else []))


def _cell(value: Any, kind: str) -> str:
    return f"<td{_class(value if isinstance(value, str) and value in VERDICTS else kind)}>{escape(text(value))}</td>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
