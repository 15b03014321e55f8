"""Volumes sampled at points, and whole grids of points slab by slab, on the host.

NumPy and SciPy: any shape without compilation, and no more memory for a larger grid than its result. What needs
gradients or an accelerator is `ops.spatial`'s.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float, Float64, Num
from scipy import ndimage  # type: ignore[import-untyped]

Points = Float64[np.ndarray, "n 3"]
KINDS = ("linear", "cubic", "nearest", "argmax")
SLAB = 1 << 18  # points at a time
WORKERS = 2
# Of a Gaussian whose full width at half maximum is 1.
WIDTH = 1 / np.sqrt(8 * np.log(2))


def sampled(
    array: Num[np.ndarray, "d h w"], points: Points, kind: str = "linear", outside: float | int | None = None
) -> Num[np.ndarray, " n"]:
    """The values of a volume at points (n, 3), in voxels, in the array's own type where `kind` mixes no values.

    kind: 'linear'; 'cubic', where `array` is what `coefficients` gives; 'nearest'; 'argmax', for label maps, the label
    with the largest share of the linear weights (ties go to the corner that comes first). Up to half a voxel beyond the
    faces the volume is continued by its border value, and everywhere beyond where `outside` is None; else `outside`
    stands there, as in ITK.

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"a volume is sampled by {', '.join(KINDS)}, not {kind!r}")
    last = np.array(array.shape) - 1.0
    inner = np.clip(points, 0, last)
    if kind == "argmax":
        found = _argmax(array, inner)
    elif kind == "nearest":
        found = array[tuple(np.floor(inner + 0.5).astype(int).T)]
    else:
        order = {"linear": 1, "cubic": 3}[kind]
        found = ndimage.map_coordinates(array, inner.T, np.float32, order=order, mode="mirror", prefilter=False)
    if outside is not None:
        within = ((points >= -0.5) & (points < last + 0.5)).all(axis=1)
        found = np.where(within, found, np.asarray(outside, found.dtype))
    return found


def resampled(
    array: Num[np.ndarray, "d h w"],
    shape: Sequence[int],
    places: Callable[[Points], Points],
    kind: str = "linear",
    outside: float | int | None = None,
) -> Num[np.ndarray, "e f g"]:
    """A volume on another grid: `places` takes voxels of the grid of this `shape` to voxels of the array.

    `kind` and `outside` as in `sampled`; a cubic one prepares its coefficients here.
    """
    source = coefficients(array) if kind == "cubic" else array
    result = np.empty(tuple(shape), np.float32 if kind in ("linear", "cubic") else array.dtype)
    flat = result.reshape(-1)

    def fill(first: int) -> None:
        index = np.arange(first, min(first + SLAB, flat.size))
        points = np.stack(np.unravel_index(index, result.shape), axis=-1).astype(np.float64)
        flat[index[0] : index[-1] + 1] = sampled(source, places(points), kind, outside)

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(fill, range(0, flat.size, SLAB)))
    return result


def coefficients(array: Num[np.ndarray, "d h w"]) -> Float[np.ndarray, "d h w"]:
    """The cubic B-spline whose values at the voxels are the array's (Unser et al., IEEE TSP 1993)."""
    return ndimage.spline_filter(array, order=3, output=np.float64, mode="mirror")


def smoothed(array: Num[np.ndarray, "d h w"], factors: Sequence[float]) -> Num[np.ndarray, "d h w"]:
    """The volume blurred as voxels `factors` times as large along each axis would see it; unchanged along an axis
    whose factor is 1 or less.

    A Gaussian of full width √(factor² − 1) at half maximum, which takes a voxel's own width to that of the larger one
    (Cardoso et al., MICCAI 2015).
    """
    sigma = [WIDTH * np.sqrt(max(factor**2 - 1, 0)) for factor in factors]
    return ndimage.gaussian_filter(array.astype(np.float32), sigma, mode="nearest") if any(sigma) else array


def _argmax(labels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The label of the largest linear weight among the eight voxels around each point, which lies in the volume."""
    low = np.minimum(points.astype(int), np.maximum(np.array(labels.shape) - 2, 0))
    part = points - low
    corners, weights = [], []
    for offset in np.ndindex(2, 2, 2):
        index = np.minimum(low + offset, np.array(labels.shape) - 1)
        corners.append(labels[tuple(index.T)])
        weights.append(np.where(offset, part, 1 - part).prod(axis=1))
    shares = [sum(w * (other == corner) for other, w in zip(corners, weights, strict=True)) for corner in corners]
    best = np.argmax(shares, axis=0)
    return np.stack(corners)[best, np.arange(len(points))]
