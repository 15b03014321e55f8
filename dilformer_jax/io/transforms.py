"""Transforms in world space: where the points of one image lie in another.

A transform takes points of the fixed image to points of the moving image, in RAS mm. It is a sequence of steps of which
the first acts first; a step is an affine matrix (4, 4) or a `Field`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Real
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax.io.geometry import apply_affine, spacing

Points = Float64[np.ndarray, "n 3"]
Matrix = Real[np.ndarray, "4 4"]
INVERSE_ITERATIONS = 100
INVERSE_TOLERANCE = 1e-3  # of a field's smallest voxel side
FITTED = 4096  # voxels of a field, at most, that its affine part is fitted to


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


def inverted(points: Points, transform: Transform) -> tuple[Points, Float64[np.ndarray, " n"]]:
    """The points that the transform takes to these, and how far from these it takes them, in mm.

    A field is inverted by p <- p + M^-1 (q - T(p)) at each point (Chen et al., Med Phys 2008), M being its affine part,
    so that fields which hold a large affine map have an inverse too. Where there is none, as in a fold, the error stays
    above INVERSE_TOLERANCE of the field's smallest voxel side.
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
    for _ in range(INVERSE_ITERATIONS):
        here = found[going]
        error = points[going] - here - displaced(here, field)
        wrong = np.linalg.norm(error, axis=1) > tolerance
        going, error = going[wrong], error[wrong]
        if not going.size:
            break
        found[going] += error @ back[:3, :3].T
    return found
