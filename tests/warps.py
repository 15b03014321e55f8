"""Random volumes and displacements, and their warps by SciPy: what test_warp.py and test_fields.py compare with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage  # type: ignore[import-untyped]

SHAPE = (7, 6, 5)
# With zeros, points less than one voxel outside still see the border: SciPy's 'grid-constant', not its 'constant'.
SCIPY_MODE = {"border": "nearest", "zeros": "grid-constant"}


def single(array: Any) -> jax.Array:
    return jnp.asarray(array, jnp.float32)


def compiled(function: Callable, *operands: Any) -> Any:
    """What one program gives for float32 operands, as NumPy arrays."""
    return jax.tree.map(np.asarray, jax.jit(function)(*jax.tree.map(single, operands)))


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Random float32 numbers, as float64."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(np.float64)


def points(shape: tuple[int, ...]) -> np.ndarray:
    return np.moveaxis(np.indices(shape, np.float64), 0, -1)


def off_the_voxels(shape: tuple[int, ...], volume: tuple[int, ...], seed: int = 1) -> np.ndarray:
    """Displacements to places in and around the volume, all at least a tenth of a voxel from where a slope jumps."""
    rng = np.random.default_rng(seed)
    places = np.stack([rng.integers(-3, n + 2, shape[:-1]) for n in volume], -1) + rng.uniform(0.1, 0.9, shape)
    return (places - points(shape[-4:-1])).astype(np.float32).astype(np.float64)


def warp_by_scipy(image: np.ndarray, u: np.ndarray, order: int = 1, padding: str = "border") -> np.ndarray:
    """The image (d, h, w, c) warped by u (e, f, g, 3)."""
    coordinates = np.moveaxis(points(u.shape[:3]) + u, -1, 0)
    sampled = [
        ndimage.map_coordinates(image[..., c], coordinates, order=order, mode=SCIPY_MODE[padding], prefilter=False)
        for c in range(image.shape[-1])
    ]
    return np.stack(sampled, axis=-1)


def equations(jaxpr):
    """Every equation of a program, with those of its inner programs."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
