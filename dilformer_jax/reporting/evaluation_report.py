"""What `evaluate` leaves to be looked at: pictures of the best, the median and the worst pair, Dice of each structure,
Dice against folding, and one page with all of it."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dilformer_jax.data.protocols import Task
from dilformer_jax.io.bare import is_bare
from dilformer_jax.io.geometry import orientation, spacing
from dilformer_jax.io.volumes import normalise
from dilformer_jax.registration import evaluation
from dilformer_jax.registration.methods import Method
from dilformer_jax.registration.pipeline import warp_image, warp_labels
from dilformer_jax.reporting import figures, html, score_figures, tables

# What depends on the number of pairs and on their labels.
PICTURES = ("first.png", "best.png", "median.png", "worst.png", "dice_per_label.png", "dice_folding.png")


def write(
    folder: Path,
    title: str,
    task: Task,
    method: Method,
    rows: Sequence[Mapping[str, Any]],
    summary: tables.Summary,
    definition: Mapping[str, str],
) -> bool:
    """Writes report.html into the folder, and `PICTURES` unless Matplotlib is missing, which it returns."""
    pictures = importlib.util.find_spec("matplotlib") is not None
    sections = [html.Section("Summary", tables.STATISTICS, [{"metric": k, **v} for k, v in summary.items()])]
    if pictures:
        sections += [*_pairs(folder, task, method, rows), *_structures(folder, task, rows)]
    columns = ["name", *(metric for metric in tables.METRICS if any(metric in row for row in rows))]
    sections += [
        html.Section("Pairs", table=[{column: row.get(column) for column in columns} for row in rows]),
        html.Section("Definitions", "\n\n".join(f"{name}: {text}" for name, text in definition.items())),
    ]
    html.report(folder / "report.html", title, sections)
    return pictures


def _pairs(folder: Path, task: Task, method: Method, rows: Sequence[Mapping[str, Any]]) -> list[html.Section]:
    """The worst, the median and the best pair; of pairs without labels the first."""
    scored = sorted(
        (k for k, row in enumerate(rows) if np.isfinite(row.get("dice", np.nan))), key=lambda k: rows[k]["dice"]
    )
    chosen = {"first": 0}
    if scored:
        chosen = {"best": scored[-1], "median": scored[len(scored) // 2], "worst": scored[0]}
    sections = []
    for rank, k in chosen.items():
        if k in list(chosen.values())[: list(chosen).index(rank)]:
            continue  # of one or two pairs, one is several of these
        case = evaluation.registered(task.pairs[k], method)
        moving_labels, u = case.moving_labels, case.displacement
        fixed, moving = (normalise(volume.array, "minmax") for volume in (case.fixed, case.moving))
        figure = figures.registration(
            fixed,
            moving,
            warp_image(moving, u),
            u,
            fixed_labels=_kept(case.fixed_labels, task.labels),
            moved_labels=None if moving_labels is None else _kept(warp_labels(moving_labels, u), task.labels),
            spacing=spacing(case.fixed.affine),
            orientation="" if is_bare(case.fixed.path) else orientation(case.fixed.affine),
        )
        figures.save(folder / f"{rank}.png", figure)
        score = f"Dice {rows[k]['dice_before']:.4f} -> {rows[k]['dice']:.4f}" if scored else ""
        sections.append(html.Section(f"The {rank} pair: {case.pair.name}", score, figure=figures.png(figure)))
    return sections


def _structures(folder: Path, task: Task, rows: Sequence[Mapping[str, Any]]) -> list[html.Section]:
    scored = [row for row in rows if np.isfinite(row.get("dice", np.nan))]
    if not scored:
        return []
    before, after = (
        np.array([[row[f"{metric}_per_label"][label] for label in task.labels] for row in scored])
        for metric in ("dice_before", "dice")
    )
    if len(scored) == 1:
        before, after = before[0], after[0]
    names = [task.names.get(label, str(label)) for label in task.labels]
    shown = {
        "dice_per_label": ("Dice of each structure", score_figures.dice_per_label(names, before, after)),
        "dice_folding": ("Dice against folding, a dot for each pair", score_figures.scatter(scored)),
    }
    sections = []
    for name, (heading, figure) in shown.items():
        figures.save(folder / f"{name}.png", figure)
        sections.append(html.Section(heading, figure=figures.png(figure)))
    return sections


def _kept(labels: np.ndarray | None, wanted: Sequence[int]) -> np.ndarray | None:
    """The label map with nothing but the labels that are scored."""
    return None if labels is None else np.where(np.isin(labels, wanted), labels, 0)
