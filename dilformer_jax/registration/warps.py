"""Volumes seen through transforms, each sampled once on another's grid; on the host, without JAX."""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Num, Real

from dilformer_jax.io.geometry import apply_affine
from dilformer_jax.io.transforms import Transform, carried
from dilformer_jax.io.volumes import Volume
from dilformer_jax.ops.resampling import resampled

DIGITS = 6  # of a voxel: what falls on voxels, or halfway between them, but for rounding does so exactly


def warped(
    volume: Volume,
    transform: Transform,
    shape: tuple[int, ...],
    affine: Real[np.ndarray, "4 4"],
    kind: str = "linear",
    outside: float | int = 0,
) -> Num[np.ndarray, "d h w"]:
    """The volume on the grid of this shape and affine, whose points the transform takes to the volume's, in RAS mm.

    `kind` is one of `ops.resampling`; `outside` stands beyond the volume's field of view.
    """
    back = np.linalg.inv(volume.affine)

    def places(voxels: np.ndarray) -> np.ndarray:
        return apply_affine(back, carried(apply_affine(affine, voxels), transform)).round(DIGITS)

    return resampled(volume.array, shape, places, kind, outside)


def background(volume: Volume) -> float:
    """What stands where there is nothing to see: 0, or the least value where that is less."""
    return min(0.0, float(volume.array.min()))


def masked(volume: Volume, mask: Bool[np.ndarray, "d h w"] | None) -> Volume:
    """The image with nothing but `background` outside of the mask."""
    if mask is None:
        return volume
    return replace(volume, array=np.where(mask, volume.array, np.float32(background(volume))))
