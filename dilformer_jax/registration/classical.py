"""Classical methods as the rows beside a network's: affine alignment alone, and SyN.

Of the volume's Jacobian determinant J an affine map makes its own determinant at every voxel, so that of `affine`
nothing is folded and log J has no spread: not because it is measured otherwise, but because there is no deformation.
On one grid an alignment mirrors nothing, and so it changes no sign of J in front of a deformation either.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Float32
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax.io.volumes import Volume
from dilformer_jax.io.voxel_fields import displacement
from dilformer_jax.registration import syn as ants
from dilformer_jax.registration.affine import align
from dilformer_jax.registration.syn import Syn

Image = Float32[np.ndarray, "_ _ _"]
Displacement = Float32[np.ndarray, "_ _ _ 3"]


def aligned(fixed: Volume, moving: Volume) -> Displacement:
    """The affine alignment of two images, on one grid or not, as u (D, H, W, 3) on the fixed grid: moved[x] =
    moving[x + u[x]], in voxels of the moving array. Raises BadInput as `align`."""
    return displacement((align(fixed, moving).matrix,), fixed, moving)


def affine(fixed: Image, moving: Image, names: tuple[Any, Any], spacing: Sequence[float]) -> Displacement:
    """The affine alignment of two images on one grid, in voxels; `spacing` is mm per voxel along each axis. Raises
    BadInput, saying which of `names` it is, for an image that shows nothing."""
    # How the axes lie in the world is no matter where both images share them.
    place = np.diag([*spacing, 1.0])
    pair = zip((fixed, moving), names, strict=True)
    return aligned(*(Volume(array, place, Path(name), nib.nifti1.Nifti1Header()) for array, name in pair))


@functools.cache
def compile_affine() -> None:
    """Compiles what `affine` runs, which is the same for every shape, so that the first pair takes no longer."""
    seen = ndimage.gaussian_filter(np.pad(np.ones((6, 8, 7), np.float32), 5), 1)
    affine(seen, seen, ("fixed", "moving"), (1, 1, 1))


def syn(
    fixed: Image, moving: Image, names: tuple[Any, Any], spacing: Sequence[float], how: Syn | None = None
) -> Displacement:
    """SyN's displacement of two images on one grid, in voxels. Raises BadInput as `syn.displacement`."""
    return ants.displacement(fixed, moving, spacing, how, names)
