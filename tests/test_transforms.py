"""Inverses of fields, point by point."""

import numpy as np

from dilformer_jax.io.transforms import Field, carried, inverted


def test_a_field_that_enlarges_fourfold_is_inverted():
    """Along x the slope is 4 between voxels 10 and 12 and 0.7 to 1 elsewhere; whole steps would overshoot there."""
    x = np.arange(40.0)
    ends = np.interp(x, [0, 10, 12, 39], [0, 7, 15, 42])
    u = np.zeros((40, 4, 4, 3), np.float32)
    u[..., 0] = (ends - x)[:, None, None]
    affine = np.diag([-2.0, 3, 3, 1])
    field = Field(u * np.float32([-2, 3, 3]), affine)
    asked = np.linspace(1, 41, 161)
    points = np.stack([-2 * asked, np.full(161, 4.0), np.full(161, 5.0)], axis=-1)
    found, errors = inverted(points, (field,))
    assert errors.max() < 2.1e-3
    np.testing.assert_allclose(found[:, 0] / -2, np.interp(asked, ends, x), atol=2e-3)
    np.testing.assert_allclose(carried(found, (field,)), points, atol=2.1e-3)


def test_where_none_is_found_the_error_says_so():
    u = np.zeros((60, 4, 4, 3), np.float32)
    u[30:, ..., 0] = 200  # a tear: hardly a point comes to lie between 29 and 230
    found, errors = inverted(np.array([[90.0, 1, 1], [2.5, 1, 1], [240, 1, 1]]), (Field(u, np.eye(4)),))
    assert errors[0] > 0.5 and errors[1:].max() < 1e-2
    np.testing.assert_allclose(found[1:], [[2.5, 1, 1], [40, 1, 1]], atol=1e-2)
