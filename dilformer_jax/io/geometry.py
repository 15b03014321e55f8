"""Where voxels lie: affines, distances between grids, displacements between voxels and world.

An affine maps voxel indices to RAS mm: world = affine[:3, :3] @ voxel + affine[:3, 3].
"""

import itertools
from collections.abc import Sequence

import nibabel as nib
import numpy as np
from jaxtyping import Float32, Float64, Real


def spacing(affine: Real[np.ndarray, "4 4"]) -> tuple[float, float, float]:
    """Distance in mm between neighbouring voxels along each array axis."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def orientation(affine: Real[np.ndarray, "4 4"]) -> str:
    """Where each array axis points to, nearest anatomical direction first: 'RAS', 'LIA', ..."""
    return "".join(nib.orientations.aff2axcodes(affine))


def is_singular(affine: Real[np.ndarray, "4 4"]) -> bool:
    """Whether the affine has no usable inverse; sheared affines do, and so does any voxel size, microns included."""
    sizes = np.array(spacing(affine))
    if not np.isfinite(affine).all() or not sizes.all():
        return True
    return bool(abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-6)


def is_sheared(affine: Real[np.ndarray, "4 4"]) -> bool:
    """Whether the array axes stand at other than right angles, by more than 1e-4 rad: a NIfTI qform and ITK cannot."""
    directions = affine[:3, :3] / np.array(spacing(affine))
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() > 1e-4)


def is_orientation(letters: str) -> bool:
    """Whether the letters name three array axes as `orientation` does: one each of R or L, A or P, S or I."""
    return len(letters) == 3 and all(len(set(letters) & set(axis)) == 1 for axis in ("RL", "AP", "SI"))


def centred_affine(shape: tuple[int, ...], sizes: Sequence[float], letters: str) -> Float64[np.ndarray, "4 4"]:
    """The affine of a grid whose middle lies at the origin: voxels of `sizes` mm, axes that point as `letters` say."""
    affine = np.eye(4)
    for axis, (row, sign) in enumerate(nib.orientations.axcodes2ornt(letters)):
        affine[:3, axis] = np.eye(3)[int(row)] * sign * sizes[axis]
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def apply_affine(affine: Real[np.ndarray, "4 4"], points: Real[np.ndarray, "*n 3"]) -> Float64[np.ndarray, "*n 3"]:
    """The points (..., 3) carried by the affine, in float64: float32 would lose microns far from the origin."""
    return np.asarray(points, np.float64) @ affine[:3, :3].T + affine[:3, 3]


def corner_distance(
    shape_a: tuple[int, ...],
    affine_a: Real[np.ndarray, "4 4"],
    shape_b: tuple[int, ...],
    affine_b: Real[np.ndarray, "4 4"],
) -> float:
    """Largest distance in mm between matching corner voxels of two grids.

    An affine map's largest error over a box is at a corner, so this bounds the distance of every pair of voxels.
    """
    corners = np.array(list(itertools.product((0, 1), repeat=3)))
    a = apply_affine(affine_a, corners * (np.array(shape_a) - 1))
    b = apply_affine(affine_b, corners * (np.array(shape_b) - 1))
    return float(np.linalg.norm(a - b, axis=-1).max())


def to_world(
    u: Real[np.ndarray, "d h w 3"], fixed_affine: Real[np.ndarray, "4 4"], moving_affine: Real[np.ndarray, "4 4"]
) -> Float32[np.ndarray, "d h w 3"]:
    """Displacement in RAS mm, moving_affine(x + u(x)) - fixed_affine(x), at each voxel x of the fixed grid.

    u is in voxels: moved(x) = moving[x + u(x)], indices of the moving array.
    """
    world = np.asarray(u, np.float64) @ moving_affine[:3, :3].T + _gap(u.shape[:3], moving_affine, fixed_affine)
    return world.astype(np.float32)


def reframed(
    vectors: Real[np.ndarray, "d h w 3"],
    start: Real[np.ndarray, "4 4"],
    through: Real[np.ndarray, "4 4"],
    back: Real[np.ndarray, "4 4"],
) -> Float32[np.ndarray, "d h w 3"]:
    """through(start(x) + vectors(x)) - back(x) at each voxel x: displacements between other frames than they were.

    `start` takes voxels to where the vectors begin, `through` where they end to the new frame, `back` voxels to it.
    """
    result = np.empty(vectors.shape, np.float32)
    for plane, (old, new) in enumerate(zip(vectors, result, strict=True)):
        voxels = np.insert(np.moveaxis(np.indices(old.shape[:2]), 0, -1), 0, plane, axis=-1)
        new[:] = apply_affine(through, apply_affine(start, voxels) + old) - apply_affine(back, voxels)
    return result


def _gap(shape: tuple[int, ...], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a(x) - b(x) in mm at each voxel x (D, H, W, 3); exactly zero where the affines are equal."""
    voxels = np.moveaxis(np.indices(shape), 0, -1)
    return apply_affine(np.asarray(a, np.float64) - b, voxels)
