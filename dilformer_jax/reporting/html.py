"""A report as one HTML file that needs nothing beside it: text, tables and pictures inside."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from dilformer_jax.reporting.tables import text, write_text

STYLE = """
:root { color-scheme: light dark; --ink: #22272e; --pale: #6b7480; --line: #e1e4e8; --paper: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --pale: #9aa4ad; --line: #3a4048; --paper: #16191d; } }
body { margin: 3rem auto; max-width: 76rem; padding: 0 1.5rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.8rem; font-weight: 600; margin: 0 0 2rem; }
h2 { font-size: 1.2rem; font-weight: 600; margin: 2.5rem 0 .6rem; padding-top: 1.2rem;
     border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; white-space: pre-line; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { color: var(--pale); font-weight: 500; text-align: left; }
th, td { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--line); }
.number { text-align: right; }
img { max-width: 100%; height: auto; margin: 1rem 0; background: #ffffff; border-radius: 4px; }
"""


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
    body = "\n".join(_section(section) for section in sections)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
    write_text(path, page)


def _section(section: Section) -> str:
    parts = [f"<section>\n<h2>{escape(section.heading)}</h2>"]
    parts += [f"<p>{escape(paragraph.strip())}</p>" for paragraph in section.text.split("\n\n") if paragraph.strip()]
    if section.figure is not None:
        data = base64.b64encode(section.figure).decode("ascii")
        parts.append(f'<img alt="{escape(section.heading)}" src="data:image/png;base64,{data}">')
    if section.table:
        parts.append(_table(section.table))
    return "\n".join([*parts, "</section>"])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(rows[0])
    words = {column for column in columns if any(isinstance(row.get(column), str) for row in rows)}
    kinds = {column: "" if column in words else ' class="number"' for column in columns}
    head = "".join(f"<th{kinds[column]}>{escape(column)}</th>" for column in columns)
    lines = ["".join(f"<td{kinds[column]}>{escape(text(row.get(column)))}</td>" for column in columns) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
