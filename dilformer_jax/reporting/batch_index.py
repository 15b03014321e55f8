"""The page that indexes a batch of pairs: verdicts, thumbnails, figures and failures, sortable by column."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from dilformer_jax.registration.checks import VERDICTS
from dilformer_jax.reporting import html
from dilformer_jax.reporting.tables import text

STYLE = """
td img { margin: 0; border-radius: 4px; display: block; width: 288px; max-width: none; }
tbody td { vertical-align: middle; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
a { color: var(--accent); }
.sentence { max-width: 30rem; }
"""
SCRIPT = """
document.querySelectorAll("th button").forEach((button, column) => button.addEventListener("click", () => {
  const head = button.parentElement, body = document.querySelector("tbody");
  const sign = head.getAttribute("aria-sort") == "ascending" ? -1 : 1;
  const key = row => row.cells[column].dataset.sort;
  document.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", sign == 1 ? "ascending" : "descending");
  [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x == "" || y == "") return (x == "") - (y == "");  // what is missing stands last, either way
    return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, {numeric: true}) : x - y);
  }).forEach(row => body.append(row));
}));
"""
STOPPED = "stopped"
# Column, attribute of an entry.
NUMBERS = (
    ("Dice before", "dice_before"),
    ("Dice", "dice"),
    ("folding [%]", "folding_percent"),
    ("inverse error, mean [mm]", "inverse_mean_mm"),
    ("time [s]", "seconds"),
)


@dataclass(frozen=True)
class Entry:
    """A pair of the batch: its verdict and numbers, or the sentence that says why it has none.

    `report` is the address of its report as the page sees it, such as "S01_S02/report.html"; `thumbnail` what
    `pair_report.thumbnail` gave.
    """

    name: str
    verdict: str = STOPPED
    failure: str = ""
    report: str = ""
    thumbnail: bytes | None = None
    dice_before: float | None = None
    dice: float | None = None
    folding_percent: float | None = None
    inverse_mean_mm: float | None = None
    seconds: float | None = None


def write(path: Path, rows: Sequence[Entry], title: str = "Registered pairs") -> None:
    """Write the page, a row an entry, in one piece. Raises BadInput where the file cannot be written."""
    kinds = (*VERDICTS, STOPPED)
    counts = {kind: sum(row.verdict == kind for row in rows) for kind in kinds}
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    scores = [row.dice for row in rows if row.dice is not None and math.isfinite(row.dice)]
    mean = f"; mean Dice {text(sum(scores) / len(scores))} over {len(scores)}" if scores else ""
    numbers = [(name, key) for name, key in NUMBERS if any(getattr(row, key) is not None for row in rows)]
    names = ["pair", "verdict", *(name for name, _ in numbers)]
    head = "".join(f'<th><button type="button">{escape(name)}</button></th>' for name in names)
    body = "\n".join(_row(row, [key for _, key in numbers], kinds.index(row.verdict)) for row in rows)
    table = (
        f'<div class="wide"><table>\n<thead><tr>{head}<th></th></tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
    )
    summary = html.paragraphs(
        f"{len(rows)} pairs: {said or 'none'}{mean}.\n"
        "Pictures: edges of the moved image on the fixed one, middle slices. Click a column's name to sort by it."
    )
    html.write(path, title, [summary, table], STYLE, SCRIPT)


def _row(row: Entry, keys: Sequence[str], rank: int) -> str:
    name = f'<a href="{escape(row.report)}">{escape(row.name)}</a>' if row.report else escape(row.name)
    cells = [
        f'<td data-sort="{escape(row.name)}">{name}</td>',
        f'<td data-sort="{rank}" class="{"fail" if row.verdict == STOPPED else row.verdict}">{row.verdict}</td>',
    ]
    for key in keys:
        value = getattr(row, key)
        known = value is not None and math.isfinite(value)
        cells.append(f'<td class="number" data-sort="{float(value) if known else ""}">{text(value)}</td>')
    if row.thumbnail is not None:
        picture = f'<img alt="edges of moved on fixed" src="{html.data_url(row.thumbnail)}">'
        cells.append(f'<td><a href="{escape(row.report)}">{picture}</a></td>' if row.report else f"<td>{picture}</td>")
    else:
        cells.append(f'<td class="sentence">{escape(row.failure)}</td>')
    return f"<tr>{''.join(cells)}</tr>"
