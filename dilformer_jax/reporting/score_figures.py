"""Pictures of scores: of each structure, against folding, and of several methods.

As in `figures`, Matplotlib is imported only when a figure is made.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from dilformer_jax.reporting.comparison import Scored
from dilformer_jax.reporting.figures import AFTER, plain
from dilformer_jax.reporting.panels import INK, PALE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE = "#aab4be"
GREYS = ("#aab4be", "#6b7580")  # of the identity and the affine
# Told apart by colour-blind readers (Okabe and Ito's, and two of Paul Tol's), and by the shapes of their dots.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#882255")
SHAPES = "os^DvPX<"


def dice_per_label(
    names: Sequence[str], before: Float[np.ndarray, "*pairs labels"], after: Float[np.ndarray, "*pairs labels"]
) -> "Figure":
    """Dice of each structure before and after registration, best first: bars, or boxes over several pairs.

    `before` and `after` are (labels,) or (pairs, labels); NaN, a structure that is absent, is left out.
    Raises ValueError where they do not fit the names.
    """
    from matplotlib.figure import Figure

    if before.shape != after.shape or before.ndim not in (1, 2) or before.shape[-1] != len(names):
        raise ValueError(f"{len(names)} names do not go with Dice of shapes {before.shape} and {after.shape}")
    columns = {
        (when, colour): [values[np.isfinite(values)] for values in np.atleast_2d(scores).T]
        for when, colour, scores in (("before", BEFORE, before), ("after", AFTER, after))
    }
    means = [values.mean() if len(values) else -1.0 for values in columns["after", AFTER]]
    ranks = sorted(range(len(names)), key=lambda k: means[k])
    figure = Figure(figsize=(6.4, 0.9 + 0.21 * len(names)), layout="constrained")
    ax = figure.add_subplot()
    places = np.arange(len(names))
    for (when, colour), values in columns.items():
        offset = 0.2 if when == "before" else -0.2  # before stands above after
        ranked = [values[k] for k in ranks]
        if before.ndim == 1:
            ax.barh(places + offset, [v[0] if len(v) else 0 for v in ranked], 0.38, color=colour, label=when)
        else:
            boxes = ax.boxplot(
                ranked,
                positions=places + offset,
                widths=0.3,
                orientation="horizontal",
                patch_artist=True,
                boxprops={"facecolor": colour, "linewidth": 0},
                medianprops={"color": "white", "linewidth": 1},
                whiskerprops={"color": colour},
                showcaps=False,
                flierprops={"marker": ".", "markersize": 3, "markeredgecolor": colour},
            )
            boxes["boxes"][0].set_label(when)
    ax.set_yticks(places, [names[k] for k in ranks], fontsize=8)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xlim(0, 1)
    ax.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), fontsize=8, labelcolor=INK)
    plain(ax, "Dice", "")
    ax.grid(visible=False, axis="y")
    return figure


def scatter(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Dice against the percentage of folded voxels, a dot for each row of results that has both.

    The percentage is on a logarithmic axis that begins with a linear piece, so that 0 is on it. The pair of the worst
    Dice and the one that folds most are named.
    """
    from matplotlib.figure import Figure

    shown = [
        (float(row["folding_percent"]), float(row["dice"]), str(row.get("name", "")))
        for row in rows
        if _is_number(row.get("dice")) and _is_number(row.get("folding_percent"))
    ]
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    ax = figure.add_subplot()
    folding, dice = (np.array([row[k] for row in shown], float) for k in (0, 1))
    ax.scatter(folding, dice, s=26, color=AFTER, alpha=0.7, linewidths=0)
    _folding_axis(ax, folding)
    if len(shown) > 1:
        for k in dict.fromkeys((int(np.argmin(dice)), int(np.argmax(folding)))):
            on_the_right = ax.transAxes.inverted().transform(ax.transData.transform((folding[k], dice[k])))[0] > 0.5
            ax.annotate(
                shown[k][2],
                (folding[k], dice[k]),
                xytext=(-6 if on_the_right else 6, 0),
                textcoords="offset points",
                ha="right" if on_the_right else "left",
                va="center",
                fontsize=7,
                color=PALE,
            )
    plain(ax, "folded voxels [%]", "Dice")
    return figure


def comparison(rows: Sequence[Scored], structures: Sequence[str]) -> "Figure":
    """Dice of several methods: boxes over the pairs, Dice against folding if that is known, each structure's mean.

    A method has one colour and one shape of dot throughout, its name at its box, and its mean at the right of it.
    Structures are ranked by the method of the best mean Dice. Every row has Dice of at least one pair. Raises
    ValueError where the structures are not those of the rows.
    """
    from matplotlib.figure import Figure

    if any(row.dice.shape[1] != len(structures) for row in rows):
        raise ValueError(f"{len(structures)} structures do not go with Dice of {[row.dice.shape for row in rows]}")
    looks = _looks(rows)
    folding = any("folding_percent" in row.values for row in rows)
    tall = 0.7 + 0.4 * len(rows)
    height = max(tall + 2.6 * folding, 0.9 + 0.17 * len(structures))
    figure = Figure(figsize=(10.5 if structures else 5.2, height), layout="constrained")
    # Boxes take what the methods need, and dots what is left of the column, but hardly more than a square.
    scattered = min(height - tall, 5.2)
    grid = figure.add_gridspec(
        3, 2 if structures else 1, height_ratios=(tall, scattered + 1e-3, height - tall - scattered + 1e-3)
    )
    _boxes(figure.add_subplot(grid[0, 0]), rows, looks)
    if folding:
        _dots(figure.add_subplot(grid[1, 0]), rows, looks)
    if structures:
        _structures(figure.add_subplot(grid[:, 1]), rows, looks, structures)
    return figure


def _looks(rows: Sequence[Scored]) -> list[dict[str, Any]]:
    greys, colours = iter(GREYS), iter(range(len(rows)))
    found = []
    for row in rows:
        if row.baseline:
            colour, shape = next(greys, GREYS[-1]), "o"
        else:
            k = next(colours)
            colour, shape = COLOURS[k % len(COLOURS)], SHAPES[(k + k // len(COLOURS)) % len(SHAPES)]
        found.append({"color": colour, "marker": shape})
    return found


def _boxes(ax: "Axes", rows: Sequence[Scored], looks: Sequence[Mapping[str, Any]]) -> None:
    for place, (row, look) in enumerate(zip(rows, looks, strict=True)):
        values = row.values["dice"][np.isfinite(row.values["dice"])]
        ax.boxplot(
            [values],
            positions=[place],
            widths=0.55,
            orientation="horizontal",
            patch_artist=True,
            boxprops={"facecolor": look["color"], "linewidth": 0},
            medianprops={"color": "white", "linewidth": 1.5},
            whiskerprops={"color": look["color"]},
            showcaps=False,
            flierprops={"marker": ".", "markersize": 4, "markeredgecolor": look["color"]},
        )
        ax.text(
            1.01, place, f"{values.mean():.3f}", transform=ax.get_yaxis_transform(), va="center", fontsize=8, color=INK
        )
    ax.set_yticks(range(len(rows)), [textwrap.fill(row.name, 24) for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.text(1.01, 1, "mean", transform=ax.transAxes, va="bottom", fontsize=7, color=PALE)
    plain(ax, "Dice of each pair", "")
    ax.grid(visible=False, axis="y")


def _dots(ax: "Axes", rows: Sequence[Scored], looks: Sequence[Mapping[str, Any]]) -> None:
    seen = [np.zeros(0)]
    for row, look in zip(rows, looks, strict=True):
        folding = row.values["folding_percent"]
        seen.append(folding[np.isfinite(folding) & np.isfinite(row.values["dice"])])
        ax.scatter(folding, row.values["dice"], s=20 if len(rows) < 6 else 12, alpha=0.75, linewidths=0, **look)
    _folding_axis(ax, np.concatenate(seen))
    plain(ax, "folded voxels [%]", "Dice of each pair")


def _structures(
    ax: "Axes", rows: Sequence[Scored], looks: Sequence[Mapping[str, Any]], structures: Sequence[str]
) -> None:
    known = np.isfinite(np.stack([row.dice for row in rows]))
    totals = np.where(known, np.stack([row.dice for row in rows]), 0).sum(axis=1)
    means = np.divide(totals, known.sum(axis=1), out=np.full(totals.shape, np.nan), where=known.any(axis=1))
    best = int(np.argmax([np.nanmean(row.values["dice"]) for row in rows]))
    ranks = np.argsort(np.where(np.isfinite(means[best]), means[best], -1), kind="stable")
    places = np.arange(len(structures))
    some = [k for k in ranks if np.isfinite(means[:, k]).any()]
    ends = [(np.nanmin(means[:, k]), np.nanmax(means[:, k])) for k in some]
    ax.hlines([places[list(ranks).index(k)] for k in some], *zip(*ends, strict=True), color="#d5dade", linewidth=1)
    for mean, look in zip(means, looks, strict=True):
        ax.scatter(mean[ranks], places, s=22 if len(rows) < 6 else 15, linewidths=0, zorder=3, **look)
    ax.set_yticks(places, [structures[k] for k in ranks])
    ax.set_ylim(-0.7, len(structures) - 0.3)
    plain(ax, "mean Dice of each structure", "")
    ax.tick_params(axis="y", labelsize=7, length=0)
    ax.grid(visible=False, axis="y")


def _folding_axis(ax: "Axes", percent: Float[np.ndarray, " values"]) -> None:
    """Makes x logarithmic from the decade of the smallest positive value on, with 0 a step before it."""
    positive = percent[percent > 0]
    if not len(positive):
        ax.set_xlim(-0.05, 1)
        ax.set_xticks([0], ["0"])
        return
    first = math.floor(math.log10(positive.min()))
    last = max(math.floor(math.log10(1.5 * positive.max())), first + 1)
    ax.set_xscale("symlog", linthresh=10.0**first, linscale=0.6)
    ax.set_xlim(-0.25 * 10.0**first, max(1.5 * positive.max(), 1.2 * 10.0 ** (first + 1)))
    decades = range(first, last + 1, max(1, math.ceil((last - first) / 5)))
    ticks = [0.0, *(10.0**decade for decade in decades)]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xticks([], minor=True)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(float(value))
