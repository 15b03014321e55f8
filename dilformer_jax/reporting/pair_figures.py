"""The figures of a pair's report, readable on white and on black: alignment, deformation, scores of structures.

A pair comes upright (`shown.upright`); each figure has a row for each plane, through the fixed image's centre of mass.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from dilformer_jax.reporting import panels
from dilformer_jax.reporting.shown import Shown, borders, centre_of_mass, edges, pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLANES = ("sagittal", "coronal", "axial")
ENDS = ("LR", "PA", "IS")  # of each axis, upright
GREY = "#7d8792"  # text that can be read on white and on black
EDGE = (255, 190, 30, 255)
BEFORE, AFTER = "#9aa5b1", "#1f8fc0"
SQUARES = 7  # along the longer side


@dataclass(frozen=True, eq=False)
class Cut:
    """A plane of an upright pair: across `axis` at `index`; to the right runs `right`, upwards `up`."""

    shown: Shown
    axis: int
    index: int

    @property
    def across(self) -> list[int]:
        """The axis to the right and the axis upwards."""
        return [axis for axis in range(3) if axis != self.axis]

    @property
    def pixel(self) -> Float[np.ndarray, "2"]:
        """Width and height of a pixel in mm."""
        return self.shown.spacing[self.across]

    @property
    def place(self) -> str:
        """Where it lies, in mm from the world's origin; of an oblique plane its middle."""
        return place(self.shown, self.axis, self.index)

    def of(self, volume: np.ndarray) -> np.ndarray:
        """The slice of a volume (D, H, W, ...)."""
        return volume.take(self.index, self.axis)


def place(shown: Shown, axis: int, index: int) -> str:
    """Where the middle of a slice lies, such as "z = -12 mm"."""
    middle = (np.array(shown.fixed.shape) - 1) / 2
    middle[axis] = index
    return f"{'xyz'[axis]} = {(shown.affine[:3, :3] @ middle + shown.affine[:3, 3])[axis]:.0f} mm"


def alignment(shown: Shown) -> "Figure":
    """The fixed image and its edges on the moving image before, after the affine and after all; the checkerboard."""

    def plain(name: str, marked: bool) -> Callable[["Axes", Cut], None]:
        def draw(ax: "Axes", cut: Cut) -> None:
            _grey(ax, cut.of(shown.scaled(name)), cut.pixel)
            if marked:
                mask = edges(pixels(shown, cut.of(shown.scaled("fixed")), cut.axis))
                paint = np.where(mask[..., None], np.array(EDGE, np.uint8), np.uint8(0))
                size = np.array(shown.fixed.shape)[cut.across] * cut.pixel
                panels.image(ax, paint, size / mask.shape, interpolation="nearest")

        return draw

    def checkerboard(ax: "Axes", cut: Cut) -> None:
        fixed, moved = cut.of(shown.scaled("fixed")), cut.of(shown.scaled("moved"))
        _grey(ax, np.where(squares(fixed.shape, cut.pixel), moved, fixed), cut.pixel)

    columns = {
        "fixed": plain("fixed", False),
        "moving, edges of fixed": plain("moving", True),
        "after the affine": plain("aligned", True),
        "moved": plain("moved", True),
        "fixed and moved": checkerboard,
    }
    return _sheet(shown, columns)[0]


def outlines(shown: Shown) -> "Figure":
    """The borders of the structures of fixed, moving and moved, those that are given, each on its own image."""

    def draw(name: str, labels: np.ndarray) -> Callable[["Axes", Cut], None]:
        def draw_one(ax: "Axes", cut: Cut) -> None:
            _grey(ax, cut.of(shown.scaled(name)), cut.pixel)
            drawn = colours(pixels(shown, cut.of(labels), cut.axis))
            size = np.array(shown.fixed.shape)[cut.across] * cut.pixel
            panels.image(ax, drawn, size / drawn.shape[:2], interpolation="nearest")

        return draw_one

    columns = {}
    for name in ("fixed", "moving", "moved"):
        labels = getattr(shown, f"{name}_labels")
        if labels is not None:
            columns[f"structures of {name}"] = draw(name, labels)
    return _sheet(shown, columns)[0]


def deformation(shown: Shown) -> "Figure":
    """What is left of the difference at each stage, the warped grid, the displacement's length and log J."""
    from matplotlib import colormaps

    fixed = shown.scaled("fixed")
    differences = {name: shown.scaled(name) - fixed for name in ("moving", "aligned", "moved")}
    worst = float(np.percentile(np.abs(differences["moving"]), 99.5)) or 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.log(shown.determinant)
    reach = (
        float(np.clip(np.percentile(np.abs(log[np.isfinite(log)]), 99.5), 0.1, 2)) if np.isfinite(log).any() else 1.0
    )
    longest = float(np.percentile(shown.millimetres, 99.8)) or 1.0
    step = float(max(np.array(fixed.shape) * shown.spacing)) / 30
    low, high = 0.0, 3.0  # the image is faint under the grid's lines

    def difference(name: str) -> Callable[["Axes", Cut], Any]:
        return lambda ax, cut: panels.image(
            ax, cut.of(differences[name]), cut.pixel, cmap="RdBu_r", vmin=-worst, vmax=worst
        )

    def grid(ax: "Axes", cut: Cut) -> None:
        ax.set_facecolor("white")
        panels.image(ax, cut.of(shown.scaled("moved")), cut.pixel, cmap="gray_r", vmin=low, vmax=high)
        panels.grid(ax, cut.of(shown.displacement)[..., cut.across], cut.pixel, step)

    def length(ax: "Axes", cut: Cut) -> Any:
        return panels.image(ax, cut.of(shown.millimetres), cut.pixel, cmap="viridis", vmin=0, vmax=longest)

    def jacobian(ax: "Axes", cut: Cut) -> Any:
        ax.set_facecolor(colormaps["PuOr_r"](0.5))
        drawn = panels.image(ax, cut.of(log), cut.pixel, cmap="PuOr_r", vmin=-reach, vmax=reach)
        panels.marks(ax, ~(cut.of(shown.determinant) > 0), cut.pixel)
        return drawn

    columns = {
        "moving − fixed": difference("moving"),
        "after the affine − fixed": difference("aligned"),
        "moved − fixed": difference("moved"),
        "warped grid": grid,
        "displacement": length,
        "log Jacobian": jacobian,
    }
    figure, drawn, bars = _sheet(shown, columns)
    panels.bar(figure, drawn[0], bars(0, 2), "of the range of intensities shown", colour=GREY)
    panels.bar(figure, drawn[4], bars(4, 4), "mm", ticks=[0, longest], colour=GREY)
    percent = 100 * float(np.mean(~(shown.determinant > 0)))
    panels.bar(
        figure,
        drawn[5],
        bars(5, 5),
        f"log of volume in moving / in fixed\n{percent:.2g} % folded (magenta)",
        ticks=[-reach, 0.0, reach],
        colour=GREY,
    )
    return figure


def structures(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Dice and, where there is one, HD95 of each structure: a dot before, a dot after, best Dice first.

    Rows as `pair_report.Facts` has them. A value that is missing or no number has no dot.
    """
    from matplotlib.figure import Figure

    order = sorted(rows, key=lambda row: np.nan_to_num(_number(row, "dice_after"), nan=-1))
    measures = [("dice", "Dice")]
    if any(np.isfinite(_number(row, "hd95_after")) for row in rows):
        measures.append(("hd95", "HD95 [mm]"))
    figure = Figure(figsize=(8.5, 0.8 + 0.17 * len(rows)), layout="constrained", facecolor="none")
    axes = np.atleast_1d(figure.subplots(1, len(measures), sharey=True))
    places = np.arange(len(order))
    for ax, (key, label) in zip(axes, measures, strict=True):
        before, after = (np.array([_number(row, f"{key}_{when}") for row in order]) for when in ("before", "after"))
        ax.hlines(places, before, after, color=BEFORE, linewidth=1.2)
        ax.plot(before, places, "o", color=BEFORE, markersize=4, label="before")
        ax.plot(after, places, "o", color=AFTER, markersize=5, label="after")
        ax.set_facecolor("none")
        ax.set_xlabel(label, fontsize=9, color=GREY)
        ax.tick_params(labelsize=8, color=GREY, labelcolor=GREY, length=0)
        ax.spines[:].set_visible(False)
        ax.grid(color=GREY, alpha=0.25, linewidth=0.6)
        ax.set_xlim(0, 1 if key == "dice" else None)
    axes[0].set_yticks(places, [str(row["structure"]) for row in order], fontsize=8)
    axes[0].set_ylim(-0.7, len(order) - 0.3)
    axes[0].legend(frameon=False, fontsize=8, labelcolor=GREY, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def squares(shape: tuple[int, ...], pixel: Float[np.ndarray, "2"]) -> Bool[np.ndarray, "width height"]:
    """A checkerboard of squares in mm, `SQUARES` along the longer side."""
    side = max(n * width for n, width in zip(shape, pixel, strict=True)) / SQUARES
    x, y = (np.floor((np.arange(n) + 0.5) * width / side) for n, width in zip(shape, pixel, strict=True))
    return (x[:, None] + y) % 2 == 1


def colours(labels: np.ndarray) -> UInt8[np.ndarray, "width height 4"]:
    """The borders of the structures in a slice of labels, each in its colour, on nothing."""
    palette = np.array([tuple(bytes.fromhex(colour[1:])) + (255,) for colour in panels.OUTLINES], np.uint8)
    # A border is drawn on the pixels of the structure itself, also where it ends at the background.
    border = (borders(labels) | borders(labels[::-1, ::-1])[::-1, ::-1]) & (labels != 0)
    return np.where(border[..., None], palette[labels % len(palette)], np.uint8(0))


def webp(figure: "Figure", dpi: int = 170) -> bytes:
    """The figure as a WebP file's bytes: transparent like PNG, and as small as JPEG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", dpi=dpi, pil_kwargs={"quality": 82})
    return buffer.getvalue()


def _sheet(
    shown: Shown, columns: Mapping[str, Callable[["Axes", Cut], Any]]
) -> "tuple[Figure, list[Any], Callable[[int, int], Axes]]":
    """The figure of these columns, what each drew last, and the function that makes the axes of colour bars."""
    from matplotlib.figure import Figure

    cuts = [Cut(shown, axis, index) for axis, index in enumerate(centre_of_mass(shown.fixed))]
    size = np.array(shown.fixed.shape) * shown.spacing
    figure = Figure(facecolor="none")
    axes, bars = panels.place(
        figure, [(float(size[cut.across[0]]), float(size[cut.across[1]])) for cut in cuts], len(columns)
    )
    drawn: list[Any] = []
    for row, cut in zip(axes, cuts, strict=True):
        drawn = []
        for ax, draw in zip(row, columns.values(), strict=True):
            ax.set_facecolor("black")
            drawn.append(draw(ax, cut))
        row[0].set_ylabel(f"{PLANES[cut.axis]}, {cut.place}", fontsize=8, color=GREY)
        panels.letters(row[0], *(ENDS[axis] for axis in cut.across))
    for ax, title in zip(axes[0], columns, strict=True):
        ax.set_title(title, fontsize=9, color=GREY)
    return figure, drawn, bars


def _grey(ax: "Axes", pixels: np.ndarray, pixel: np.ndarray) -> None:
    panels.image(ax, pixels, pixel, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")


def _number(row: Mapping[str, Any], key: str) -> float:
    value = row.get(key)
    return float("nan") if value is None else float(value)
