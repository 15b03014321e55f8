"""The grid that a pair is registered on, which both images are resampled to whatever grids their files have.

For a network it is the grid of its training images, laid around what the fixed image shows; otherwise a box of the
fixed image's own voxels around what both images show, so that neither padding nor the size of the world changes
anything. Nothing is stretched: what lies where in mm is kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Real

from dilformer_jax.io.geometry import apply_affine, orientation, spacing
from dilformer_jax.io.volumes import BadInput, Volume
from dilformer_jax.ops.foreground import box, content
from dilformer_jax.ops.resampling import resampled, smoothed

MARGIN = 4  # voxels around what the images show
ROOM = 0.25  # of the fixed image's box, the most that what the moving image shows adds to it on either side
ISOTROPIC = 1.3  # the largest ratio of voxel sides that count as a cube
LARGEST = 2**23  # voxels of a grid made here
SMOOTHED = 1.2  # voxels that are larger by more than this are made of blurred ones
HEAD_ML = 2700.0  # of what is brighter than a tenth of the brightest; brains have up to 2,100 ml, heads 3,300 or more
ENDS = ("LR", "PA", "IS")
SIZES = 0.3, 3.0  # of the longest side of what an image shows, to that of a network's grid

Matrix = Real[np.ndarray, "4 4"]


@dataclass(frozen=True, eq=False)
class Grid:
    """A grid of voxels: its shape, its affine to the fixed image's RAS mm, and to the voxels of the fixed image."""

    shape: tuple[int, int, int]
    affine: Float64[np.ndarray, "4 4"]
    voxels: Float64[np.ndarray, "4 4"]


def model_grid(fixed: Volume, declared: Mapping[str, Any]) -> Grid:
    """The grid that a network declares, {"shape", "spacing_mm", "orientation"}, around what the fixed image shows and
    along its axes.

    Where it has the fixed image's voxel size and axes, its voxels are voxels of the fixed image: with the same shape
    all of them. Without an orientation it has that of the fixed image.
    """
    d, h, w = (int(n) for n in declared["shape"])
    sides = np.array(declared["spacing_mm"], float)
    here = orientation(fixed.affine)
    affine = np.eye(4)
    for column, letter in enumerate(declared["orientation"] or here):
        # The fixed image's own axes, however they run: it is not turned, only its axes are renamed.
        axis = next(k for k, other in enumerate(here) if any({letter, other} <= set(ends) for ends in ENDS))
        sign = 1 if here[axis] == letter else -1
        affine[:3, column] = sign * sides[column] * _right_angled(fixed.affine)[:, axis]
    low, high = box(content(fixed.array))
    middle = apply_affine(fixed.affine, (low + high) / 2)
    affine[:3, 3] = middle - affine[:3, :3] @ (np.array([d, h, w]) - 1) / 2
    voxels = np.linalg.inv(fixed.affine) @ affine
    whole = np.rint(voxels)
    ones = np.abs(whole[:3, :3])
    if np.abs(voxels - whole)[:3, :3].max() < 1e-3 and (ones.sum(axis=0) == 1).all() and (ones.sum(axis=1) == 1).all():
        if np.array_equal(whole[:3, :3], np.eye(3)) and fixed.array.shape == (d, h, w):
            whole[:3, 3] = 0
        return Grid((d, h, w), fixed.affine @ whole, whole)
    return Grid((d, h, w), affine, voxels)


def content_grid(fixed: Volume, moving: Volume, affine: Matrix) -> Grid:
    """The fixed image's voxels around what it shows and what the moving image shows there by `affine`, RAS mm of the
    fixed to RAS mm of the moving image. Where these are no cubes, or more than `LARGEST`, cubes of the same volume, or
    larger ones, along the same axes."""
    low, high = box(content(fixed.array))
    shown = np.argwhere(content(moving.array))
    shown = shown[:: max(1, len(shown) // 100_000)]
    there = apply_affine(np.linalg.inv(affine @ fixed.affine) @ moving.affine, shown).round(6)
    room = ROOM * (high - low + 1)
    first = np.floor(np.maximum(np.minimum(low, there.min(axis=0)), low - room)) - MARGIN
    last = np.ceil(np.minimum(np.maximum(high, there.max(axis=0)), high + room)) + MARGIN
    size = last - first + 1
    sides = np.array(spacing(fixed.affine))
    axes = _right_angled(fixed.affine)
    straight = np.array_equal(axes, fixed.affine[:3, :3] / sides)
    if sides.max() <= ISOTROPIC * sides.min() and straight and size.prod() <= LARGEST:
        shape = _rounded(size)
        voxels = np.eye(4)
        voxels[:3, 3] = first - (np.array(shape) - size) // 2
        return Grid(shape, fixed.affine @ voxels, voxels)
    extent = size * sides
    side = max(sides.prod(), extent.prod() / LARGEST) ** (1 / 3)
    shape = _rounded(np.ceil(extent / side))
    grid = np.eye(4)
    grid[:3, :3] = axes * side
    grid[:3, 3] = apply_affine(fixed.affine, (first + last) / 2) - grid[:3, :3] @ (np.array(shape) - 1) / 2
    return Grid(shape, grid, np.linalg.inv(fixed.affine) @ grid)


def on_grid(volume: Volume, grid: Grid, affine: Matrix) -> Float32[np.ndarray, "d h w"]:
    """The image on the grid, RAS mm of which `affine` takes to the image's; continued by its border value."""
    # Rounded, so that voxels which coincide do so exactly.
    places = (np.linalg.inv(volume.affine) @ affine @ grid.affine).round(9)
    factors = np.linalg.norm(places[:3, :3], axis=1)
    factors = np.where(factors > SMOOTHED, factors, 1.0)
    array = smoothed(volume.array, factors.tolist())
    return resampled(array, grid.shape, lambda points: apply_affine(places, points), "linear").astype(np.float32)


def outside_percent(fixed: Volume, grid: Grid) -> float:
    """How much of what the fixed image shows lies outside the grid, in percent."""
    shown = np.argwhere(content(fixed.array))
    points = apply_affine(np.linalg.inv(grid.voxels), shown)
    inside = ((points > -0.5) & (points < np.array(grid.shape) - 0.5)).all(axis=1)
    return 100 * float(1 - inside.mean())


def is_head(volume: Volume) -> bool:
    """Whether the image shows more than a brain: a whole head, by the volume of what is bright."""
    voxel = abs(np.linalg.det(volume.affine[:3, :3])) / 1000
    return bool(np.count_nonzero(content(volume.array, 0.1)) * voxel > HEAD_ML)


def check_size(volume: Volume, declared: Mapping[str, Any]) -> None:
    """Raises BadInput where the image shows nothing of a size that a network with this grid can have seen."""
    low, high = box(content(volume.array))
    longest = float(((high - low + 1) * spacing(volume.affine)).max())
    known = float(np.max(np.array(declared["shape"]) * np.array(declared["spacing_mm"], float)))
    if not SIZES[0] <= longest / known <= SIZES[1]:
        sides = "x".join(f"{side:.4g}" for side in spacing(volume.affine))
        raise BadInput(
            f"{volume.path} shows something {longest:.4g} mm across, where the weights' grid is {known:.4g} mm: its "
            f"voxel size, {sides} mm, is probably wrong; correct its header, or do without a network "
            "(--weights none)."
        )


def _right_angled(affine: Matrix) -> np.ndarray:
    """The directions of the axes, or where they are sheared the right-angled ones that are nearest."""
    axes = affine[:3, :3] / np.array(spacing(affine))
    if np.abs(axes.T @ axes - np.eye(3)).max() < 1e-3:
        return axes
    u, _, v = np.linalg.svd(axes)
    return u @ v


def _rounded(size: np.ndarray) -> tuple[int, int, int]:
    """Up to shapes of which there are few, since each is compiled for."""
    d, h, w = (int(n + -n % (16 if n > 64 else 8)) for n in size.astype(int))
    return d, h, w
