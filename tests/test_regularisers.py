"""Regularisers against fields whose derivatives are known, and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_terms_by_hand import SHAPE, compiled, image, points

from dilformer_jax.ops import regularisers

GRADIENT = np.array([[0.5, -0.2, 0.1], [0.0, 0.3, -0.4], [0.7, 0.0, 0.2]])
# u_i = x^T H_i x / 2: second derivatives are the entries of H_i.
HESSIANS = np.array([np.diag([0.1, -0.2, 0.3]), [[0, 0.2, 0], [0.2, 0, -0.1], [0, -0.1, 0]], 0.05 * np.ones((3, 3))])


def linear(shape: tuple[int, ...]) -> np.ndarray:
    return points(shape) @ GRADIENT.T + 2.0


def quadratic(shape: tuple[int, ...]) -> np.ndarray:
    x = points(shape)
    return np.einsum("...a,iab,...b->...i", x, HESSIANS, x) / 2


def test_diffusion_of_voxels_that_are_no_cubes():
    size = np.array([1.0, 2.0, 4.0])
    found = regularisers.diffusion(jnp.asarray(linear(SHAPE)), jnp.asarray(size, jnp.float32))
    assert found == pytest.approx(((GRADIENT * size[:, None] / size) ** 2).mean(), rel=1e-5)


def test_bending_of_voxels_that_are_no_cubes():
    size = np.array([1.0, 2.0, 4.0])
    found = regularisers.bending(jnp.asarray(quadratic(SHAPE)), jnp.asarray(size, jnp.float32))
    expected = (HESSIANS * size[:, None, None] / size[:, None] / size) ** 2
    assert found == pytest.approx(expected.sum((1, 2)).mean(), rel=1e-4)


def test_diffusion_of_known_fields():
    ramp, curve = linear(SHAPE), quadratic(SHAPE)
    still, sloped, batch, curved, noisy = compiled(
        lambda ramp, curve, noise: [
            regularisers.diffusion(jnp.full_like(ramp, 3)),
            regularisers.diffusion(ramp),
            regularisers.diffusion(jnp.stack([ramp, 3 * ramp])),
            regularisers.diffusion(curve),
            regularisers.diffusion(noise),
        ],
        ramp,
        curve,
        image(*SHAPE, 3),
    )
    assert still == 0
    # The mean over the nine components of the gradient.
    assert sloped == pytest.approx((GRADIENT**2).mean(), rel=1e-5)
    assert batch == pytest.approx(5 * (GRADIENT**2).mean(), rel=1e-5)
    # Forward differences of the parabola: its slope halfway to the next voxel, h (x + 1/2).
    halfway = 0.0
    for axis in range(3):
        inner = points(SHAPE)[tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))]
        inner = inner + 0.5 * np.eye(3)[axis]
        halfway += (np.einsum("ib,...b->...i", HESSIANS[:, axis], inner) ** 2).mean() / 3
    assert curved == pytest.approx(halfway, rel=1e-4)
    assert noisy == pytest.approx(
        np.mean([(np.diff(image(*SHAPE, 3), axis=a) ** 2).mean() for a in range(3)]), rel=1e-5
    )


def test_bending_of_known_fields():
    straight, curved, batch, gradient = compiled(
        lambda ramp, curve: [
            regularisers.bending(ramp),
            regularisers.bending(curve),
            regularisers.bending(jnp.stack([ramp, 2 * curve])),
            jax.grad(regularisers.bending)(ramp),
        ],
        linear(SHAPE),
        quadratic(SHAPE),
    )
    # Σ over a, b of (d²u / da db)², mixed ones twice, the mean over the three components.
    expected = (HESSIANS**2).sum((1, 2)).mean()
    assert straight == pytest.approx(0, abs=1e-8)
    assert curved == pytest.approx(expected, rel=1e-4)
    assert batch == pytest.approx(2 * expected, rel=1e-4)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_bending_looks_no_further_than_the_neighbours():
    """One voxel moved by 1, far from the faces: 1, -2, 1 along each axis and ±1/4 at the corners of each plane."""
    u = np.zeros((9, 9, 9, 3))
    u[4, 4, 4, 1] = 1
    expected = (3 * (1 + 4 + 1) + 2 * 3 * 4 / 16) / (7**3 * 3)
    assert compiled(regularisers.bending, u) == pytest.approx(expected, rel=1e-5)


def test_regularisers_refuse_an_axis_too_short_to_differ_along(unchecked):
    with pytest.raises(ValueError, match="two voxels an axis"):
        regularisers.diffusion(jnp.ones((4, 1, 4, 3)))
    with pytest.raises(ValueError, match="three voxels an axis"):
        regularisers.bending(jnp.ones((4, 4, 2, 3)))
