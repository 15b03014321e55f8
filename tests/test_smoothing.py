"""Gaussian smoothing against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from dilformer_jax.ops import smoothing


def test_a_gaussian_equals_scipys():
    x = np.random.default_rng(0).normal(size=(9, 12, 7, 3)).astype(np.float32)
    for sigma, radius in (((1.0, 1.0, 1.0), 3), ((0.5, 0.0, 1.4), 2)):
        found = jax.jit(lambda x, s: smoothing.gaussian(x, s, radius=radius))(x, jnp.array(sigma))  # noqa: B023
        expected = ndimage.gaussian_filter(x, (*sigma, 0), mode="nearest", radius=(radius, radius, radius, 0))
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_gaussian_keeps_a_constant_and_reaches_three_deviations():
    np.testing.assert_allclose(smoothing.gaussian(jnp.full((5, 5, 5, 1), 3.0), (1.0, 1.0, 1.0), radius=3), 3, rtol=1e-6)
    assert [smoothing.radius(sigma) for sigma in (0.0, 0.3, 0.5, 1.0)] == [1, 1, 2, 3]
    with pytest.raises(ValueError, match="1 voxel or more to either side"):
        smoothing.gaussian(jnp.zeros((4, 4, 4, 1)), (1.0, 1.0, 1.0), radius=0)
