"""Pictures of a registration and of a training run: Matplotlib figures without pyplot, hence without global state.

Matplotlib is an optional extra (`pip install dilformer-jax[plot]`) and is imported only when a figure is made.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Num

from dilformer_jax.io.volumes import replacing
from dilformer_jax.ops.folding import folded, jacobian_determinant
from dilformer_jax.reporting import panels
from dilformer_jax.reporting.panels import INK, PALE
from dilformer_jax.reporting.shown import centre_of_mass, window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Volume = Num[np.ndarray, "_ _ _"]
COLUMNS = ("fixed", "moving", "moved", "difference before", "difference after", "warped grid", "Jacobian determinant")
IMAGES = ("fixed", "moving", "moved")
# The low and high end of each axis of a volume in RAS order.
ENDS = ("LR", "PA", "IS")
AFTER = "#0b6e99"
DIFFERENCE, RATIO = "RdBu_r", "PuOr_r"
# Panels of the training figure: axis label, and the keys of metrics.jsonl that it shows.
CURVES = (
    ("loss", ("loss", "similarity")),
    ("regulariser", ("regulariser",)),
    ("Dice", ("dice", "dice_identity")),
    ("|u|, 95th percentile [voxels]", ("displacement_p95",)),
    ("folded voxels [%]", ("folding_percent",)),
)


def registration(
    fixed: Volume,
    moving: Volume,
    moved: Volume,
    displacement: Float[np.ndarray, "_ _ _ 3"],
    *,
    fixed_labels: Volume | None = None,
    moved_labels: Volume | None = None,
    spacing: Sequence[float | int] = (1, 1, 1),
    orientation: str = "",
) -> "Figure":
    """A row for each axis, sliced at the fixed image's centre of mass, and a column for each of `COLUMNS`.

    All volumes lie on the fixed grid; `displacement` is in voxels, `spacing` in mm per voxel. Slices are in array
    order: of the two axes left, the first runs to the right and the second up. Given the `orientation`, such as 'LPS'
    (where each array axis points to), everything is first turned to RAS: right is right, anterior and superior are up.

    The differences, moving − fixed and moved − fixed, share one scale. The grid is the moving image's, as registration
    carries it along. The Jacobian's colours are symmetric about 1, and folded voxels are marked. Labels are outlined, a
    structure in the same colour in both images; `index` is that of the array given. Raises ValueError for shapes that
    do not agree, and for an orientation that is none.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    volumes = {"fixed": fixed, "moving": moving, "moved": moved}
    labels = {"fixed": fixed_labels, "moved": moved_labels}
    volumes |= {f"{name} labels": volume for name, volume in labels.items() if volume is not None}
    for name, volume in volumes.items():
        if volume.shape != displacement.shape[:3]:
            raise ValueError(f"{name} is {volume.shape}, the displacement {displacement.shape}: both on the fixed grid")
    order, flips = _turn(orientation)
    volumes = {name: np.flip(volume.transpose(order), flips) for name, volume in volumes.items()}
    displacement = np.flip(displacement.transpose(*order, 3), flips)[..., order]
    displacement = displacement * np.where(np.isin(range(3), flips), -1, 1).astype(displacement.dtype)
    volumes["determinant"] = jacobian_determinant(displacement)
    sides = np.array([spacing[axis] for axis in order], float)
    size = np.array(volumes["fixed"].shape) * sides
    centre = centre_of_mass(volumes["fixed"])

    rows = []
    for axis in range(3):
        slices = {name: volume.take(centre[axis], axis) for name, volume in volumes.items()}
        slices |= {name: slices[name].astype(np.float32) for name in IMAGES}  # differences of unsigned integers wrap
        right, up = (a for a in range(3) if a != axis)
        rows.append((right, up, slices, displacement.take(centre[axis], axis)[..., [right, up]]))
    limits = {name: window(volumes["fixed" if name == "fixed" else "moving"]) for name in IMAGES}
    errors = [np.abs(slices[name] - slices["fixed"]).ravel() for *_, slices, _ in rows for name in ("moving", "moved")]
    worst = float(np.percentile(np.concatenate(errors), 99.5)) or 1.0
    changes = np.concatenate([np.abs(slices["determinant"] - 1).ravel() for *_, slices, _ in rows])
    reach = float(np.clip(np.nanpercentile(changes, 99.5), 0.1, 1.0))

    figure = Figure(facecolor="white")
    axes, bars = panels.place(figure, [(float(size[right]), float(size[up])) for right, up, *_ in rows], len(COLUMNS))
    for row, (right, up, slices, shift) in enumerate(rows):
        pixel = sides[[right, up]]
        for name, ax in zip(IMAGES, axes[row], strict=False):
            low, high = limits[name]
            ax.set_facecolor("black")
            panels.image(ax, slices[name], pixel, cmap="gray", vmin=low, vmax=high, interpolation="bilinear")
            if f"{name} labels" in slices:
                panels.outlines(ax, slices[f"{name} labels"], pixel)
        before, after, grid, jacobian = axes[row][3:]
        for ax, middle in ((before, DIFFERENCE), (after, DIFFERENCE), (jacobian, RATIO)):
            ax.set_facecolor(colormaps[middle](0.5))
        for name, ax in (("moving", before), ("moved", after)):
            error = slices[name] - slices["fixed"]
            difference = panels.image(ax, error, pixel, cmap=DIFFERENCE, vmin=-worst, vmax=worst)
        low, high = limits["moved"]
        panels.image(grid, slices["moved"], pixel, cmap="gray_r", vmin=low, vmax=low + 3 * (high - low))
        panels.grid(grid, shift, pixel, step=float(max(size)) / 26)
        ratio = panels.image(jacobian, slices["determinant"], pixel, cmap=RATIO, vmin=1 - reach, vmax=1 + reach)
        panels.marks(jacobian, ~(slices["determinant"] > 0), pixel)
        axis = 3 - right - up
        plane = ("sagittal", "coronal", "axial")[axis] if orientation else f"axis {axis}"
        index = volumes["fixed"].shape[axis] - 1 - centre[axis] if axis in flips else centre[axis]
        axes[row][0].set_ylabel(f"{plane}, index {index}", fontsize=8, color=PALE)
        if orientation:
            panels.letters(axes[row][0], ENDS[right], ENDS[up])
    for ax, title in zip(axes[0], COLUMNS, strict=True):
        ax.set_title(title, fontsize=10, color=INK)
    percent = 100 * float(np.mean(folded(displacement, determinant=volumes["determinant"])))
    panels.bar(figure, difference, bars(3, 4), "moving − fixed, moved − fixed")
    volume_ratio = f"volume in moving / in fixed\n{percent:.2g} % folded (magenta)"
    panels.bar(figure, ratio, bars(6, 6), volume_ratio, ticks=[1 - reach, 1.0, 1 + reach])
    return figure


def training(records: Sequence[Mapping[str, Any]]) -> "Figure":
    """The curves of `CURVES` over the steps of metrics.jsonl's records, a panel for each that has a value to show.

    A curve of more than 60 points is drawn pale, under its running mean. The best validation Dice is marked.
    """
    from matplotlib.figure import Figure

    series = {key: _series(records, key) for _, keys in CURVES for key in keys}
    shown = [(label, [key for key in keys if len(series[key][0])]) for label, keys in CURVES]
    shown = [(label, keys) for label, keys in shown if keys]
    columns = min(max(len(shown), 1), 3)
    lines = max(math.ceil(len(shown) / columns), 1)
    figure = Figure(figsize=(3.6 * columns, 2.8 * lines), layout="constrained")
    if not shown:
        figure.text(0.5, 0.5, "no records yet", ha="center", va="center", color=PALE)
    for k, (label, keys) in enumerate(shown):
        ax = figure.add_subplot(lines, columns, k + 1)
        for key in keys:
            steps, values = series[key]
            colour = AFTER if key == keys[0] and key != "dice_identity" else PALE
            name, line = ("before registration", "--") if key == "dice_identity" else (key, "-")
            if key == "dice":
                best = int(np.argmax(values))
                name = f"dice, best {values[best]:.3f} at {steps[best]:g}"
                ax.plot(steps[best], values[best], "o", color=colour, markersize=5)
            if len(steps) > 60:
                ax.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
                steps, values = _smooth(steps, values)
            marker = "o" if len(steps) < 3 else ""
            ax.plot(steps, values, color=colour, linestyle=line, linewidth=1.6, marker=marker, label=name)
        if label == "folded voxels [%]":
            ax.set_ylim(bottom=0)
        if len(keys) > 1 or label == "Dice":
            ax.legend(frameon=False, fontsize=8, labelcolor=INK)
        plain(ax, "step", label)
        # Few enough that numbers of five digits do not touch.
        ax.locator_params(axis="x", nbins=5, integer=True)
    return figure


def png(figure: "Figure", dpi: int = 150) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def save(path: Path, figure: "Figure", dpi: int = 150) -> None:
    """The figure as a PNG file, replaced in one piece. Raises BadInput where it cannot be written."""
    with replacing(path) as partial:
        partial.write_bytes(png(figure, dpi))


def plain(ax: "Axes", x: str, y: str) -> None:
    """Gives axes their labels and the look of all plots."""
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)
    ax.tick_params(labelsize=8, color=PALE, labelcolor=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(PALE)
    ax.grid(color="#e6e9ec", linewidth=0.8)
    ax.set_axisbelow(True)


def _turn(orientation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The transposition and then the flips that turn an array of this orientation to RAS."""
    if not orientation:
        return (0, 1, 2), ()
    order = [next((k for k, code in enumerate(orientation) if code in ends), -1) for ends in ENDS]
    if len(orientation) != 3 or sorted(order) != [0, 1, 2]:
        raise ValueError(
            f"orientation {orientation!r} is none: it is three letters such as 'RAS', where each axis points"
        )
    return tuple(order), tuple(axis for axis in range(3) if orientation[order[axis]] == ENDS[axis][0])


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(record["step"], record[key]) for record in records if record.get(key) is not None and "step" in record]
    table = np.array([pair for pair in pairs if math.isfinite(pair[1])], float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The running mean over a thirtieth of the curve, at the middles of its windows."""
    window = max(2, len(values) // 30)
    kernel = np.full(window, 1 / window)
    return np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid")
