"""The report of one registered pair: verdict, a viewer, figures, numbers with their definitions, and where they come
from, in one HTML file that needs nothing beside it, works without a network and, but for the viewer, without a script.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from dilformer_jax.registration.checks import Check, verdict
from dilformer_jax.reporting import html, pair_figures, viewer
from dilformer_jax.reporting.shown import Shown, locations, upright
from dilformer_jax.reporting.tables import text
from dilformer_jax.reporting.viewer import thumbnail

__all__ = ["Facts", "Shown", "thumbnail", "write"]

STYLE = """
.verdict { border-left: 6px solid; padding: .2rem 0 .2rem 1rem; margin: 0 0 1.5rem; font-size: 1.1rem; }
.verdict strong { font-size: 1.4rem; text-transform: capitalize; margin-right: .6rem; }
.verdict span { color: var(--ink); }
ul.warnings { padding-left: 1.2rem; } .warnings li { overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
"""
PICTURES = """\
Planes lie along the fixed grid's axes, turned so that right is right and left is left (neurological convention), \
through the fixed image's centre of mass. Moving is where the headers alone put it."""
DEFORMATION = """\
The deformable part alone, on the fixed grid: moved(x) = aligned(x + u(x)). log J is the logarithm of the Jacobian \
determinant of x + u(x): above 0 the voxel's tissue takes up more room in the moving image than in the fixed one, and \
where J <= 0 the map folds. The grid is the moving image's, carried along."""


@dataclass(frozen=True)
class Facts:
    """What a report says beside its pictures.

    `metrics` are rows as `measures.rows` makes them. `structures` has for each structure the keys `structure` (its name
    or id), `dice_before`, `dice_after`, `hd95_before` and `hd95_after` (mm; None or NaN where there is none). `headers`
    has what `provenance.header` found of "fixed" and of "moving", and of label maps where they are of interest.
    """

    metrics: Sequence[Mapping[str, Any]]
    checks: Sequence[Check]
    structures: Sequence[Mapping[str, Any]] = ()
    headers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


def write(path: Path, title: str, shown: Shown, facts: Facts) -> None:
    """Write the report, replaced in one piece. Raises BadInput where the file cannot be written."""
    turned = upright(shown)
    compare = [viewer.viewer(turned), "<noscript><p>The figures below show the same without a script.</p></noscript>"]
    compare.append(html.paragraphs("Hold a picture to see the fixed image in its place. " + PICTURES))
    labelled = turned.fixed_labels is not None or turned.moved_labels is not None
    parts = [
        _verdict(facts.checks),
        *_warnings(facts.warnings),
        html.section("Compare", *compare),
        html.section("Alignment", _figure(pair_figures.alignment(turned), "fixed, moving, aligned and moved image")),
        *([_outlines(turned)] if labelled else []),
        html.section(
            "Deformation",
            html.paragraphs(DEFORMATION),
            _figure(pair_figures.deformation(turned), "differences, warped grid, displacement and log Jacobian"),
            html.table(locations(shown)),
        ),
        html.section("Measures", html.table(facts.metrics)),
        *_structures(facts.structures),
    ]
    if facts.headers:
        names = list(dict.fromkeys(name for header in facts.headers.values() for name in header))
        rows = [{"": name} | {which: h.get(name) for which, h in facts.headers.items()} for name in names]
        parts.append(html.section("Headers", html.table(rows)))
    origin = [f"<pre>{escape(facts.command)}</pre>"] if facts.command else []
    if facts.versions:
        origin.append(html.paragraphs(", ".join(f"{name} {version}" for name, version in facts.versions.items())))
    if origin:
        parts.append(html.section("Command and versions", *origin))
    html.write(path, title, parts, viewer.STYLE + STYLE, viewer.SCRIPT)


def _verdict(checks: Sequence[Check]) -> str:
    found = verdict(checks)
    counts = {kind: sum(check.verdict == kind for check in checks) for kind in ("pass", "warn", "fail")}
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "nothing was checked"
    beyond = "; ".join(
        f"{check.name} {text(check.value)} {check.unit}".strip() for check in checks if check.verdict != "pass"
    )
    rows = [
        {
            "check": check.name,
            "value": f"{text(check.value)} {check.unit}".strip(),
            "thresholds": check.thresholds,
            "verdict": check.verdict,
            "meaning": check.meaning,
        }
        for check in checks
    ]
    sentence = f"Checks: {said}." + (f" Look at: {beyond}." if beyond else "")
    banner = f'<div class="verdict {found}"><strong>{found}</strong><span>{escape(sentence)}</span></div>'
    return banner + (html.table(rows) if rows else "")


def _warnings(warnings: Sequence[str]) -> list[str]:
    if not warnings:
        return []
    return [f'<ul class="warnings warn">{"".join(f"<li>{escape(warning)}</li>" for warning in warnings)}</ul>']


def _outlines(shown: Shown) -> str:
    return html.section("Structures on the images", _figure(pair_figures.outlines(shown), "borders"))


def _structures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    columns = {
        "structure": "structure",
        "Dice before": "dice_before",
        "Dice after": "dice_after",
        "HD95 before [mm]": "hd95_before",
        "HD95 after [mm]": "hd95_after",
    }
    told = [{name: row.get(key) for name, key in columns.items()} for row in rows]
    return [
        html.section(
            "Dice and HD95 of each structure",
            _figure(pair_figures.structures(rows), "Dice and HD95 of each structure before and after"),
            f"<details><summary>Table</summary>{html.table(told)}</details>",
        )
    ]


def _figure(figure: Any, description: str) -> str:
    return html.picture(pair_figures.webp(figure), description)
