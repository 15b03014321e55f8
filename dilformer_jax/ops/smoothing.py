"""Gaussian smoothing of displacements and images."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def gaussian(
    x: Float[Array, "d h w c"], sigma: Float[Array, "3"] | Sequence[float], *, radius: int
) -> Float[Array, "d h w c"]:
    """Smooths a volume by a Gaussian of these standard deviations, in voxels along each axis.

    Beyond its faces the volume has its border value.
    The kernel reaches `radius` voxels to either side and sums to 1. A sigma of 0 leaves its axis as it is. Equals
    `scipy.ndimage.gaussian_filter(mode="nearest", radius=radius)`.

    Raises:
      ValueError: a radius below 1.
    """
    if radius < 1:
        raise ValueError(f"A Gaussian reaches 1 voxel or more to either side, got a radius of {radius}.")
    d, h, w, c = x.shape
    offsets = jnp.arange(-radius, radius + 1, dtype=jnp.float32)
    for axis, deviation in enumerate(jnp.asarray(sigma, jnp.float32)):
        weights = jnp.exp(-0.5 * jnp.square(offsets / jnp.maximum(deviation, 1e-3)))
        weights /= weights.sum()
        # The barriers keep XLA from computing the padding anew at every voxel: half of the time on the CPU.
        wide = jnp.pad(x, [(radius, radius) if a == axis else (0, 0) for a in range(4)], mode="edge")
        wide, size, stride = lax.optimization_barrier(wide), x.shape[axis], 1
        if axis == 2:  # rows of voxels and channels together are long enough for vector instructions
            wide, stride = wide.reshape(d, h, (w + 2 * radius) * c), c
        parts = [
            weights[i] * lax.slice_in_dim(wide, i * stride, (i + size) * stride, axis=axis)
            for i in range(2 * radius + 1)
        ]
        x = lax.optimization_barrier(sum(parts, jnp.float32(0)).reshape(d, h, w, c))
    return x


def radius(sigma: float) -> int:
    """Returns the radius, in voxels, at which to cut a Gaussian: three standard deviations, at least 1."""
    return max(1, math.ceil(3 * sigma))
