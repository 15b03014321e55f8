"""The cost volume of a pair's features, with a gradient that keeps no copies of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dilformer_jax.ops import slabs
from dilformer_jax.ops.conv_cpu import room

Features = Float[Array, "b d h w c"]


def correlation(fixed: Features, moved: Features) -> Float[Array, "b d h w 27"]:
    """How alike each fixed feature vector is to the moved one at each of the 27 voxels around it, (b, d, h, w, 27): the
    mean over channels of their products, offsets from (-1, -1, -1) to (1, 1, 1), the last axis fastest.

    The cost volume of PWC-Net (Sun et al., CVPR 2018), at reach 1.
    """
    padded = jnp.pad(slabs.extended(moved, 1, "border"), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    return _likeness(fixed.astype(jnp.float32), padded.astype(jnp.float32)).astype(fixed.dtype)


@jax.custom_vjp
def _likeness(fixed, padded):
    # Offset by offset, so that the product of one of them exists at a time; a product with a column of ones sums over
    # the channels several times faster than XLA's own reduction on the CPU.
    ones = jnp.full((fixed.shape[-1], 1), 1 / fixed.shape[-1], fixed.dtype)
    alike = lambda n: jnp.matmul(fixed * _window(padded, fixed, n), ones, precision=jax.lax.Precision.HIGHEST)
    maps = room((27, *fixed.shape[:-1]), fixed.dtype, padded)
    add = lambda n, maps: jax.lax.dynamic_update_index_in_dim(maps, alike(n)[..., 0], n, 0)
    return jnp.moveaxis(jax.lax.fori_loop(0, 27, add, maps), 0, -1)


def _window(padded, fixed, n):
    return jax.lax.dynamic_slice(padded, (0, *_corner(n), 0), fixed.shape)


def _corner(n):
    return n // 9, n // 3 % 3, n % 3


def _likeness_forward(fixed, padded):
    return _likeness(fixed, padded), (fixed, padded)


def _likeness_backward(saved, gradient):
    fixed, padded = saved
    gradient = jnp.moveaxis(gradient, -1, 0)[..., None] / fixed.shape[-1]

    def add(n, sums):
        to_fixed, to_padded = sums
        to_window = _window(to_padded, fixed, n) + gradient[n] * fixed
        to_padded = jax.lax.dynamic_update_slice(to_padded, to_window, (0, *_corner(n), 0))
        return to_fixed + gradient[n] * _window(padded, fixed, n), to_padded

    # Rolled, the sums stay where they are; derived, the gradient keeps all 27 windows.
    return jax.lax.fori_loop(0, 27, add, tuple(room(x.shape, x.dtype, gradient) for x in (fixed, padded)))


_likeness.defvjp(_likeness_forward, _likeness_backward)
