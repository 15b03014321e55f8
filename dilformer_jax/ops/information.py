"""Mutual information: likeness of images whose intensities are related, but not by a line."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Scalar = Float[Array, ""]
CHUNK = 2**15  # samples whose windows are in memory at once


def nmi(
    fixed: Float[Array, "*n"],
    moved: Float[Array, "*n"],
    *,
    bins: int = 32,
    weights: Float[Array, "*n"] | None = None,
) -> Scalar:
    """Normalised mutual information, (H(F) + H(M)) / H(F, M) of Studholme et al. (Pattern Recognition 1999): 1 where
    nothing is told of one by the other, and at most 2.

    The entropies are those of a joint histogram in which each sample is a cubic B-spline in both intensities, four
    bins wide (Mattes et al., TMI 2003), so that the value is twice differentiable; that windows overlap keeps it below
    2 even for equal images. Intensities 0 and 1 lie one bin within the first and the last, those beyond count as 0 and
    1. Samples have `weights` of 0 and above, by default 1; where none has any, the value is 1. It takes memory for
    the windows of 2^15 samples however many there are.

    Raises:
      ValueError: fewer than four bins.
    """
    if bins < 4:
        raise ValueError(f"A histogram of windows of four bins has four bins or more, got {bins}.")
    weights = jnp.ones(fixed.shape) if weights is None else weights
    f, m, w = (x.astype(jnp.float32).reshape(-1) for x in (fixed, moved, weights))
    joint = _histogram(f, m, w, bins)
    total = joint.sum()
    joint = joint / jnp.where(total == 0, 1, total)
    both = jnp.where(total == 0, 1, _entropy(joint))
    return jnp.where(total == 0, 1, (_entropy(joint.sum(0)) + _entropy(joint.sum(1))) / both)


def _histogram(fixed: Array, moved: Array, weights: Array, bins: int) -> Float[Array, "bins bins"]:
    """The weight of the samples in each pair of bins, chunk by chunk; the gradient makes the windows anew."""
    size = min(len(fixed), CHUNK)
    # Of chunks that are filled up with samples of no weight.
    chunks = [jnp.pad(x, (0, -len(x) % max(size, 1))).reshape(-1, size) for x in (fixed, moved, weights)]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(joint, chunk):
        f, m, w = chunk
        return joint + jnp.matmul(_windows(f, bins) * w, _windows(m, bins).T, precision=lax.Precision.HIGHEST), None

    return lax.scan(add, jnp.zeros((bins, bins)), chunks)[0]


def _windows(x: Float[Array, " n"], bins: int) -> Float[Array, "bins n"]:
    """Each sample's share of each bin, a cubic B-spline of their distance."""
    place = 1 + jnp.clip(x, 0, 1) * (bins - 3)
    distance = jnp.abs(place - jnp.arange(bins, dtype=jnp.float32)[:, None])
    return (jnp.maximum(2 - distance, 0) ** 3 - 4 * jnp.maximum(1 - distance, 0) ** 3) / 6


def _entropy(shares: Array) -> Scalar:
    # No share changes from zero at a finite rate: its part of the gradient is none.
    shares = jnp.where(shares <= 0, 1.0, shares)
    return -(shares * jnp.log(shares)).sum()
