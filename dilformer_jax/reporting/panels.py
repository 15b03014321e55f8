"""Panels of slices: where they stand in a figure, and what is drawn on them, in mm about each panel's middle.

A slice is (width, height): its first axis runs to the right, its second up; `pixel` is its two sides in mm. Axes and
figures come in as arguments: nothing here imports Matplotlib, which is an optional extra.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Integer, Num

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PALE = "#22272e", "#8b949e"
MARK = (255, 0, 200, 255)
OUTLINES = ("#ff5a5f", "#31c7ff", "#ffd23f", "#7bd65a", "#d58cff", "#ff9d3c", "#4fe0c0", "#ff86c2")


def place(
    figure: "Figure", sizes: Sequence[tuple[float, float]], columns: int
) -> "tuple[list[list[Axes]], Callable[[int, int], Axes]]":
    """Give the figure a row of panels for each (width, height) in mm, all at one scale in columns of one width.

    Returns the rows, and the function that makes the axes of a colour bar under a first to a last column.
    """
    column, gap, top, bottom, left = 1.7, 0.05, 0.3, 0.72, 0.28
    width = max(width for width, _ in sizes)
    heights = [column * height / width for _, height in sizes]
    total = (left + columns * (column + gap), top + sum(heights) + gap * len(heights) + bottom)
    figure.set_size_inches(*total)
    panels, y = [], total[1] - top
    for (_, height_mm), height in zip(sizes, heights, strict=True):
        y -= height
        row = []
        for k in range(columns):
            box = (left + k * (column + gap)) / total[0], y / total[1], column / total[0], height / total[1]
            ax = figure.add_axes(box)
            ax.set(xticks=[], yticks=[], xlim=(-width / 2, width / 2), ylim=(-height_mm / 2, height_mm / 2))
            ax.spines[:].set_visible(False)
            row.append(ax)
        panels.append(row)
        y -= gap

    def bars(first: int, last: int) -> "Axes":
        start, end = left + first * (column + gap), left + last * (column + gap) + column
        inset = 0.15 * column + 0.2 * (end - start - column)
        box = (start + inset) / total[0], 0.54 / total[1], (end - start - 2 * inset) / total[0], 0.09 / total[1]
        return figure.add_axes(box)

    return panels, bars


def image(ax: "Axes", pixels: Num[np.ndarray, "width height *rgba"], pixel: np.ndarray, **look: Any) -> Any:
    """Draws the slice in mm about the panel's middle, first axis to the right and second axis up."""
    w, h = (float(n * side / 2) for n, side in zip(pixels.shape, pixel, strict=False))
    return ax.imshow(pixels.swapaxes(0, 1), origin="lower", extent=(-w, w, -h, h), aspect="auto", **look)


def places(shape: tuple[int, ...], pixel: np.ndarray) -> list[np.ndarray]:
    """Where the centres of the pixels lie along each axis of a panel, in mm."""
    return [(np.arange(n) - (n - 1) / 2) * side for n, side in zip(shape, pixel, strict=True)]


def outlines(ax: "Axes", labels: Integer[np.ndarray, "width height"], pixel: np.ndarray) -> None:
    """Draws the border of each structure but the background, in a colour that depends on its label alone."""
    x, y = places(labels.shape, pixel)
    for label in np.unique(labels[labels != 0]):
        colour = OUTLINES[int(label) % len(OUTLINES)]
        ax.contour(x, y, (labels == label).T.astype(np.float32), [0.5], colors=colour, linewidths=0.7)


def grid(ax: "Axes", shift: Num[np.ndarray, "width height 2"], pixel: np.ndarray, step: float) -> None:
    """The moving image's grid as registration carries it along: a line for every `step` mm of x + u(x)."""
    x, y = places(shift.shape[:2], pixel)
    for axis, origin in enumerate((x[:, None], y[None, :])):
        source = origin + shift[..., axis] * pixel[axis]
        reach = float(np.nanmax(np.abs(source)))
        levels = np.arange(-math.floor(reach / step), math.floor(reach / step) + 1) * step
        levels = levels[(levels > np.nanmin(source)) & (levels < np.nanmax(source))]
        if len(levels):
            ax.contour(x, y, source.T, levels, colors=INK, linewidths=0.6, linestyles="solid")


def marks(ax: "Axes", mask: Bool[np.ndarray, "width height"], pixel: np.ndarray) -> None:
    """Paints the pixels of the mask."""
    paint = np.zeros((*mask.shape, 4), np.uint8)
    paint[mask] = MARK
    image(ax, paint, pixel, interpolation="nearest")


def letters(ax: "Axes", right: str, up: str) -> None:
    """Writes the low and the high end of the axis to the right, and of the axis upwards, at the panel's sides."""
    for letter, x, y in zip(right + up, (0.04, 0.96, 0.5, 0.5), (0.5, 0.5, 0.05, 0.95), strict=True):
        ax.text(x, y, letter, transform=ax.transAxes, color="white", fontsize=8, ha="center", va="center")


def bar(
    figure: "Figure",
    mapped: Any,
    ax: "Axes",
    label: str,
    ticks: Sequence[float | int] | None = None,
    colour: str = INK,
) -> None:
    """Draws the colour bar of a mapped image into the axes, its text in `colour`."""
    bar = figure.colorbar(mapped, cax=ax, orientation="horizontal", extend="both", ticks=ticks)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=2, color=PALE, labelcolor=colour)
    bar.ax.xaxis.set_major_formatter("{x:.2g}")
    bar.set_label(label, fontsize=8, color=colour)
