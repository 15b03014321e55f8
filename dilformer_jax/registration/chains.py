"""Chains of transforms, each of them forwards or backwards, followed point by point so that images are sampled once."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, Num, Real

from dilformer_jax.io.geometry import apply_affine, spacing
from dilformer_jax.io.transforms import Field, Grid, Points, Transform, carried, inverted
from dilformer_jax.ops.resampling import SLAB, WORKERS, resampled
from dilformer_jax.registration.warps import DIGITS

MISSED = 0.01  # voxels of the field: where an inverse is farther off than this, there is none


@dataclass(frozen=True, eq=False)
class Link:
    """A transform of a chain, or its inverse."""

    transform: Transform
    inverse: bool = False


Chain = Sequence[Link]


def backwards(chain: Chain) -> tuple[Link, ...]:
    """The inverse of a chain: its links from last to first, each the other way."""
    return tuple(replace(link, inverse=not link.inverse) for link in reversed(chain))


def followed(points: Points, chain: Chain) -> tuple[Points, Float64[np.ndarray, " n"]]:
    """Where points (n, 3), RAS mm, come to through the links, first to last; and how far off the worst of the inverses
    on the way is for each of them, in the smallest voxel sides of its field."""
    errors = np.zeros(len(points))
    for link in chain:
        if link.inverse:
            sides = [min(spacing(step.affine)) for step in link.transform if isinstance(step, Field)]
            points, error = inverted(points, link.transform)
            errors = np.maximum(errors, error / min(sides, default=np.inf))
        else:
            points = carried(points, link.transform)
    return points, errors


def places(grid: Grid, chain: Chain) -> tuple[Float64[np.ndarray, "n 3"], Float64[np.ndarray, " n"]]:
    """`followed` for every voxel of a grid, in the array's order; computed in slabs."""
    size = int(np.prod(grid.shape))
    points, errors = np.empty((size, 3)), np.empty(size)

    def fill(first: int) -> None:
        here = slice(first, min(first + SLAB, size))
        voxels = np.stack(np.unravel_index(np.arange(here.start, here.stop), grid.shape), axis=-1)
        points[here], errors[here] = followed(apply_affine(grid.affine, voxels), chain)

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(fill, range(0, size, SLAB)))
    return points, errors


def seen(
    array: Num[np.ndarray, "d h w"],
    affine: Real[np.ndarray, "4 4"],
    points: Float64[np.ndarray, "n 3"],
    shape: tuple[int, ...],
    kind: str = "linear",
    outside: float | int = 0,
) -> Num[np.ndarray, "e f g"]:
    """A volume at the points, RAS mm, that belong to the voxels of a grid of this shape, in the array's order.

    `kind` is one of `ops.resampling`; `outside` stands beyond the volume's field of view.
    """
    back = np.linalg.inv(affine)

    def indices(voxels: np.ndarray) -> np.ndarray:
        index = np.ravel_multi_index(tuple(voxels.astype(int).T), shape)
        return apply_affine(back, points[index]).round(DIGITS)

    return resampled(array, shape, indices, kind, outside)
