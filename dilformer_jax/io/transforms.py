"""Transforms in world space: where the points of one image lie in another.

A transform takes points of the fixed image to points of the moving image, in RAS mm. It is a sequence of steps of which
the first acts first; a step is an affine matrix (4, 4) or a `Field`.
"""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from jaxtyping import Float, Float32, Float64, Real
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax.io.geometry import apply_affine, corner_distance, spacing
from dilformer_jax.io.volumes import Volume
from dilformer_jax.ops.resampling import SLAB, WORKERS

Points = Float64[np.ndarray, "n 3"]
Matrix = Real[np.ndarray, "4 4"]
INVERSE_ITERATIONS = 200
INVERSE_TOLERANCE = 1e-3  # of a field's smallest voxel side
SLOW = 0.8  # of its error, which a point keeps in a step, and more: it takes half the step from then on
LEAST_RATE = 0.25
FITTED = 4096  # voxels of a field, at most, that its affine part is fitted to
CHECKED = 1000  # points at which a written file is compared with what it should hold
CHECK_TOLERANCE = 1e-3  # of the grid's smallest voxel side


@dataclass(frozen=True, eq=False)
class Field:
    """Points moved by a field of vectors: p -> p + displacement(p), all in RAS mm.

    `affine` takes the voxels of `displacement` (D, H, W, 3) to RAS mm; between voxels it is linear, beyond the faces it
    has its border value.
    """

    displacement: Float[np.ndarray, "d h w 3"]
    affine: Matrix


Step = Matrix | Field
Transform = Sequence[Step]


class Grid(NamedTuple):
    """Where the voxels of a volume of this shape lie: `affine` takes their indices to RAS mm."""

    shape: tuple[int, ...]
    affine: Matrix


def grid_of(place: Volume | Grid) -> Grid:
    return place if isinstance(place, Grid) else Grid(place.array.shape, place.affine)


def carried(points: Points, transform: Transform) -> Points:
    """The points (n, 3), in RAS mm, where the transform takes them."""
    for step in transform:
        points = points + displaced(points, step) if isinstance(step, Field) else apply_affine(step, points)
    return points


def displaced(points: Points, field: Field) -> Points:
    """The vectors (n, 3) in mm that a field has at the points."""
    shape = np.array(field.displacement.shape[:3])
    voxels = np.clip(apply_affine(np.linalg.inv(field.affine), points), 0, shape - 1).T
    return np.stack(
        [
            ndimage.map_coordinates(field.displacement[..., axis], voxels, np.float64, order=1, mode="nearest")
            for axis in range(3)
        ],
        axis=-1,
    )


def right_angled(grid: Grid) -> tuple[Grid, str]:
    """The grid as NIfTI's rotation, spacing and offset hold it; where shear keeps them from that, the nearest one that
    covers it, and a sentence."""
    header = nib.nifti1.Nifti1Header()
    header.set_qform(grid.affine, code=1)
    affine = header.get_qform()
    sizes = np.array(spacing(grid.affine))
    if corner_distance(grid.shape, affine, grid.shape, grid.affine) < 0.1 * sizes.min():
        return Grid(grid.shape, affine), ""
    corners = np.array(list(itertools.product(*((0, n - 1) for n in grid.shape))))
    inside = apply_affine(np.linalg.inv(affine) @ grid.affine, corners)
    first, last = inside.min(axis=0), inside.max(axis=0)
    shape = tuple(int(n) for n in np.ceil(last - first - 1e-3) + 1)
    covering = affine.copy()
    covering[:3, 3] = apply_affine(affine, first)
    header.set_qform(covering, code=1)
    by = "x".join(str(n) for n in shape)
    return Grid(shape, header.get_qform()), (
        f"the grid is sheared, which this format cannot hold, so the field lies on one of right angles, {by} voxels."
    )


def total_displacement(transform: Transform, grid: Grid) -> Float32[np.ndarray, "d h w 3"]:
    """What a transform adds to the place of each voxel of a grid, RAS mm; computed in slabs.

    Raises ValueError where that is NaN or infinite.
    """
    result = np.empty((*grid.shape, 3), np.float32)
    flat = result.reshape(-1, 3)

    def fill(first: int) -> None:
        index = np.arange(first, min(first + SLAB, len(flat)))
        points = apply_affine(grid.affine, np.stack(np.unravel_index(index, grid.shape), axis=-1))
        flat[index[0] : index[-1] + 1] = carried(points, transform) - points

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(fill, range(0, len(flat), SLAB)))
    if not np.isfinite(result).all():
        raise ValueError(f"the transform has {np.count_nonzero(~np.isfinite(result))} NaN or infinite values")
    return result


def check_agreement(path: Path, found: Transform, wanted: Transform, grid: Grid) -> None:
    """Raises RuntimeError unless `found`, read back from the file that gets the name `path`, takes 1,000 random voxels
    of the grid to where `wanted` takes them, to CHECK_TOLERANCE of the smallest voxel side."""
    voxels = np.random.default_rng(0).integers(0, grid.shape, (CHECKED, 3))
    points = apply_affine(grid.affine, voxels)
    distances = np.linalg.norm(carried(points, found) - carried(points, wanted), axis=1)
    error = float(distances.max()) / min(spacing(grid.affine))
    if not error <= CHECK_TOLERANCE:
        raise RuntimeError(f"{path} reads back {error:.3g} voxels away from what was written")


def inverted(points: Points, transform: Transform) -> tuple[Points, Float64[np.ndarray, " n"]]:
    """The points that the transform takes to these, and how far from these it takes them, in mm.

    A field is inverted by p <- p + M^-1 (q - T(p)) at each point (Chen et al., Med Phys 2008), M being its affine part,
    so that fields which hold a large affine map have an inverse too, and by parts of that step where whole ones lessen
    the error by little. Where none is found, as in a tear, the error stays above INVERSE_TOLERANCE of the field's
    smallest voxel side; where a field folds, one of several points is.
    """
    found = points
    for step in reversed(transform):
        found = _inverted_field(found, step) if isinstance(step, Field) else apply_affine(np.linalg.inv(step), found)
    return found, np.linalg.norm(carried(found, transform) - points, axis=1)


def affine_part(field: Field) -> Float64[np.ndarray, "4 4"]:
    """The affine map nearest to a field, by least squares over its voxels, RAS mm to RAS mm."""
    shape = field.displacement.shape[:3]
    stride = max(1, int(np.ceil((np.prod(shape) / FITTED) ** (1 / 3))))
    voxels = np.stack(np.meshgrid(*(np.arange(0, n, stride) for n in shape), indexing="ij"), axis=-1)
    points = apply_affine(field.affine, voxels.reshape(-1, 3))
    ends = points + field.displacement[::stride, ::stride, ::stride].reshape(-1, 3)
    # About their middle, in units of their reach: a grid far from the origin is as well fitted, whatever its unit.
    middle = points.mean(axis=0)
    reach = np.abs(points - middle).max() or 1.0
    known = np.column_stack([(points - middle) / reach, np.ones(len(points))])
    fitted = np.linalg.lstsq(known, ends - points, rcond=None)[0]
    matrix = np.eye(4)
    matrix[:3, :3] += fitted[:3].T / reach
    matrix[:3, 3] = fitted[3] - fitted[:3].T @ middle / reach
    return matrix


def _inverted_field(points: Points, field: Field) -> Points:
    back = np.linalg.inv(affine_part(field))
    tolerance = INVERSE_TOLERANCE * min(spacing(field.affine))
    found = apply_affine(back, points)
    going = np.arange(len(points))
    # Where a field enlarges by more than 2, whole steps overshoot ever farther: those points take shorter ones.
    rates, last = np.ones(len(points)), np.full(len(points), np.inf)
    for _ in range(INVERSE_ITERATIONS):
        here = found[going]
        error = points[going] - here - displaced(here, field)
        distance = np.linalg.norm(error, axis=1)
        wrong = distance > tolerance
        going, error, distance = going[wrong], error[wrong], distance[wrong]
        if not going.size:
            break
        slow = distance > SLOW * last[going]
        rates[going[slow]] = np.maximum(rates[going[slow]] / 2, LEAST_RATE)
        last[going] = distance
        found[going] += rates[going, None] * (error @ back[:3, :3].T)
    return found
