"""Masks: which voxels of an image count, from files that may lie on other grids."""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Real
from nibabel.spatialimages import SpatialImage
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax.io.headers import ASKING, BadInput, Reading
from dilformer_jax.io.volumes import Volume, finite, read_volume

LEAST_SEEN = 0.9  # of a mask, by the image


def read_mask(
    source: str | Path | SpatialImage, image: Volume, reading: Reading = ASKING, name: str = "mask"
) -> Bool[np.ndarray, "d h w"]:
    """Whether each voxel of the image (D, H, W) lies inside the mask, which is where the mask's nearest voxel is not 0.

    Raises BadInput as read_image does, for a mask that is empty, and for one of which less than 90 % lies inside the
    image's field of view.
    """
    mask = finite(read_volume(source, reading, name), reading)
    inside = mask.array != 0
    if not inside.any():
        raise BadInput(f"{mask.path} is empty (every voxel is 0); give a mask of what {image.path} shows.")
    field_of_view = np.ones(image.array.shape, bool)
    seen = _nearest(field_of_view, image.affine, inside.shape, mask.affine)
    share = np.count_nonzero(inside & seen) / np.count_nonzero(inside)
    found = f"has {100 * share:.3g} % of its voxels inside the field of view of {image.path}"
    if share >= LEAST_SEEN:
        inside = _nearest(inside, mask.affine, image.array.shape, image.affine)
        found = f"has no voxel nearest to any of {image.path}"
    if share < LEAST_SEEN or not inside.any():
        raise BadInput(f"{mask.path} {found}; give the mask of this image.")
    return inside


def _nearest(
    array: Bool[np.ndarray, "a b c"], affine: np.ndarray, shape: tuple[int, ...], onto: Real[np.ndarray, "4 4"]
) -> Bool[np.ndarray, "d h w"]:
    """The array at the voxels of another grid, False beyond its voxels' outer faces."""
    index = np.linalg.inv(affine) @ onto
    # 'grid-constant', as 'constant' ends at the centres of the outer voxels.
    found = ndimage.affine_transform(
        array.astype(np.uint8), index[:3, :3], index[:3, 3], shape, order=0, mode="grid-constant"
    )
    return found.astype(bool)
