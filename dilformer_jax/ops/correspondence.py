"""Where a displacement takes points: the error at landmarks, and of a displacement against its inverse.

A displacement u is in voxels, (D, H, W, 3), and maps the voxel x of the fixed grid to x + u(x) in the moving one.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float, Float64, Num
from scipy import ndimage  # type: ignore[import-untyped]

Displacement = Float[np.ndarray, "_ _ _ 3"]
Landmarks = Num[np.ndarray, "_ 3"]
WORKERS = 2


def tre(
    fixed_points: Landmarks,
    moving_points: Landmarks,
    displacement: Displacement,
    spacing: Sequence[float | int],
    *,
    order: int = 1,
) -> Float64[np.ndarray, " _"]:
    """Target registration error |p + u(p) - q| of each pair of landmarks, in mm.

    p are `fixed_points`, in voxels of the fixed grid, and q the `moving_points` that belong to them, in voxels of the
    moving grid, whose `spacing` is mm per voxel along each array axis. u is interpolated linearly between voxels, as
    where images are warped; `order` 3 takes the cubic spline of Learn2Reg's evaluation (`compute_tre` in `utils.py` of
    MDL-UzL/L2R) and gives its numbers. At a landmark outside the grid u is 0, as there. Raises ValueError when there
    are not as many moving landmarks as fixed ones.
    """
    if fixed_points.shape != moving_points.shape:
        raise ValueError(f"landmarks come in pairs: {len(fixed_points)} are fixed and {len(moving_points)} moving")
    at = np.asarray(fixed_points, np.float64)
    error = at + _sampled(displacement, at, order) - moving_points
    return np.linalg.norm(error * np.asarray(spacing, float), axis=1)


def inverse_consistency(
    forward: Displacement, backward: Displacement, spacing: Sequence[float | int]
) -> dict[str, float]:
    """How far from where it started a point comes back: |v(x) + u(x + v(x))| of u `forward` and v `backward`.

    Both lie on one grid, whose `spacing` is mm per voxel along each array axis. "mean_mm", "p95_mm" (the 95th
    percentile) and "max_mm" are over the voxels x that v leaves inside the grid, between the centres of its first and
    last voxels; the others count in nothing, for nothing is known of u outside. NaN where v takes all of them outside.
    u is interpolated linearly. Raises ValueError when the shapes differ.
    """
    if forward.shape != backward.shape:
        raise ValueError(f"a displacement and its inverse share a grid; these are {forward.shape} and {backward.shape}")
    depth, height, width = forward.shape[:3]
    last = np.array([depth - 1, height - 1, width - 1])
    scale = np.asarray(spacing, float)

    def errors(plane: int) -> Float64[np.ndarray, " inside"]:
        v = backward[plane].reshape(-1, 3).astype(np.float64)
        x = np.stack(np.broadcast_arrays(plane, *np.indices((height, width))), axis=-1).reshape(-1, 3)
        inside = ((x + v >= 0) & (x + v <= last)).all(axis=1)
        v = v[inside]
        return np.linalg.norm((v + _sampled(forward, x[inside] + v, 1)) * scale, axis=1)

    with ThreadPoolExecutor(WORKERS) as pool:
        found = np.concatenate(list(pool.map(errors, range(depth))))
    if not len(found):
        return dict.fromkeys(("mean_mm", "p95_mm", "max_mm"), float("nan"))
    return {
        "mean_mm": float(found.mean()),
        "p95_mm": float(np.percentile(found, 95)),
        "max_mm": float(found.max()),
    }


def _sampled(displacement: Displacement, points: Float64[np.ndarray, "n 3"], order: int) -> Float64[np.ndarray, "n 3"]:
    """The displacement at the points, 0 outside the grid."""
    columns = [
        ndimage.map_coordinates(displacement[..., axis], points.T, np.float64, order=order, mode="constant")
        for axis in range(3)
    ]
    return np.stack(columns, axis=-1)
