"""Grids of several orientations, plumb and oblique, of both signs of the determinant, and a transform between them."""

from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from dilformer_jax.io.transforms import Field
from dilformer_jax.io.volumes import Volume

SHAPES = {"fixed": (9, 8, 7), "moving": (8, 10, 9)}
# An oblique rotation, from the Cayley transform of a skew matrix.
SKEW = np.array([[0, -0.3, 0.2], [0.3, 0, -0.4], [-0.2, 0.4, 0]])
OBLIQUE = np.linalg.solve(np.eye(3) + SKEW, np.eye(3) - SKEW)
LIA = np.array([[-1, 0, 0], [0, 0, 1], [0, -1, 0]])
DIRECTIONS = {
    "RAS": (np.eye(3), (2, 2, 2)),
    "LAS anisotropic": (np.diag([-1, 1, 1]), (1.5, 2.2, 2.9)),
    "LIA": (LIA, (2, 2, 2)),
    "oblique anisotropic": (OBLIQUE, (1.6, 2.1, 2.7)),
    "oblique anisotropic LIA": (OBLIQUE @ LIA, (2.2, 1.8, 1.4)),
    "oblique anisotropic LAS": (OBLIQUE @ np.diag([-1, 1, 1]), (2.2, 1.8, 1.4)),
}
PAIRS = [*zip(DIRECTIONS, DIRECTIONS, strict=True), *zip(DIRECTIONS, [*DIRECTIONS][1:], strict=False)]


def volume(path: Path, orientation: str, role: str = "fixed", array: np.ndarray | None = None) -> Volume:
    """A file written by nibabel whose middle lies near the origin, and the volume that it is."""
    directions, sizes = DIRECTIONS[orientation]
    shape = SHAPES[role]
    affine = np.eye(4)
    affine[:3, :3] = directions @ np.diag(sizes)
    affine[:3, 3] = [3, -2, 5] - affine[:3, :3] @ (np.array(shape) - 1) / 2
    array = np.random.default_rng(0).uniform(1, 9, shape).astype(np.float32) if array is None else array
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, 1), image.set_sform(affine, 1)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)
    return Volume(array, affine, path, image.header)


def wavy(seed: int = 0) -> tuple[Field, np.ndarray]:
    """A smooth field of about 0.7 mm on a grid of its own around all of these, then an affine map."""
    rng = np.random.default_rng(seed)
    vectors = ndimage.gaussian_filter(rng.normal(size=(16, 15, 14, 3)), (1.5, 1.5, 1.5, 0)) * 5
    matrix = np.eye(4)
    matrix[:3, :3] += rng.normal(size=(3, 3)) * 0.05
    matrix[:3, 3] = rng.normal(size=3)
    grid = np.eye(4)
    grid[:3, :3] = OBLIQUE * 2.4
    grid[:3, 3] = [3, -2, 5] - grid[:3, :3] @ [7.5, 7, 6.5]
    return Field(vectors, grid), matrix


def voxels_of(shape: tuple[int, ...]) -> np.ndarray:
    return np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), axis=-1)
