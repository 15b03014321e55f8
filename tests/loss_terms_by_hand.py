"""What tests of similarities, regularisers and losses share: random images, and LNCC by its definition."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SHAPE = (7, 6, 5)


def single(array: Any) -> jax.Array:
    return jnp.asarray(array, jnp.float32)


def compiled(function: Callable, *operands: Any) -> Any:
    """What one program gives for float32 operands, as NumPy arrays."""
    return jax.tree.map(np.asarray, jax.jit(function)(*jax.tree.map(single, operands)))


def image(*shape: int, seed: int = 0) -> np.ndarray:
    """Random intensities from 0 to 1, exact in float32."""
    return np.random.default_rng(seed).random(shape).astype(np.float32).astype(np.float64)


def points(shape: tuple[int, ...]) -> np.ndarray:
    return np.moveaxis(np.indices(shape, np.float64), 0, -1)


def lncc_by_loop(fixed: np.ndarray, moved: np.ndarray, window: int, border: str, epsilon: float = 1e-5) -> float:
    """The definition, a window at a time, for volumes (d, h, w)."""
    reach = window // 2
    if border == "zeros":
        fixed, moved = np.pad(fixed, reach), np.pad(moved, reach)
    centres = [range(reach, n - reach) if border == "zeros" else range(n) for n in fixed.shape]
    total, count = 0.0, 0
    for centre in itertools.product(*centres):
        around = tuple(slice(max(c - reach, 0), c + reach + 1) for c in centre)
        f, m = (volume[around] - volume[around].mean() for volume in (fixed, moved))
        total += (f * m).sum() ** 2 / ((f**2).sum() * (m**2).sum() + epsilon)
        count += 1
    return total / count
