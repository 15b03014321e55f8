"""Landmarks and inverses against closed forms, SciPy's sampling and stored numbers."""

import numpy as np
import pytest
from scipy import ndimage

from dilformer_jax.ops.correspondence import inverse_consistency, tre

SHAPE = (10, 12, 9)
SPACING = (0.7, 2.0, 1.3)


def affine(matrix: np.ndarray, shift: np.ndarray, shape=SHAPE) -> np.ndarray:
    """u with x + u(x) = matrix @ x + shift: linear interpolation has it exactly."""
    points = np.stack(np.indices(shape), axis=-1)
    return (points @ (matrix - np.eye(3)).T + shift).astype(np.float32)


MATRIX = np.array([[1.05, 0.02, -0.03], [0.04, 0.96, 0.01], [-0.02, 0.03, 1.02]])
SHIFT = np.array([0.3, -0.4, 0.2])


def test_tre_is_in_millimetres_between_voxels():
    rng = np.random.default_rng(0)
    fixed = rng.uniform(0, np.array(SHAPE) - 1, (20, 3))
    offsets = rng.normal(size=(20, 3))
    moving = fixed @ MATRIX.T + SHIFT + offsets
    found = tre(fixed, moving, affine(MATRIX, SHIFT), SPACING)
    np.testing.assert_allclose(found, np.sqrt(((offsets * SPACING) ** 2).sum(axis=1)), atol=1e-5)
    # Without a displacement it is how far the landmarks were apart.
    before = tre(fixed, moving, np.zeros((*SHAPE, 3), np.float32), SPACING)
    np.testing.assert_allclose(before, np.sqrt((((moving - fixed) * SPACING) ** 2).sum(axis=1)))


def test_tre_samples_as_scipy_does():
    rng = np.random.default_rng(1)
    u = rng.normal(size=(*SHAPE, 3)).astype(np.float32)
    fixed = rng.uniform(0, np.array(SHAPE) - 1, (30, 3))
    corners = np.floor(fixed).astype(int)
    part = fixed - corners
    expected = np.zeros((30, 3))
    for step in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(step, part, 1 - part), axis=1)
        at = np.minimum(corners + step, np.array(SHAPE) - 1)
        expected += weight[:, None] * u[tuple(at.T)]
    np.testing.assert_allclose(tre(fixed, fixed, u, (1, 1, 1)), np.linalg.norm(expected, axis=1), rtol=1e-5)
    # `compute_tre` of Learn2Reg takes SciPy's cubic spline of each component.
    cubic = np.stack([ndimage.map_coordinates(u[..., axis], fixed.T) for axis in range(3)], axis=-1)
    found = tre(fixed, fixed[::-1], u, SPACING, order=3)
    np.testing.assert_allclose(found, np.linalg.norm((fixed + cubic - fixed[::-1]) * SPACING, axis=1), rtol=1e-6)
    assert np.abs(found - tre(fixed, fixed[::-1], u, SPACING)).max() > 0.05


def test_landmarks_may_be_whole_numbers_and_outside():
    u = affine(np.eye(3), np.array([1.0, 2.0, 2.0]))
    points = np.array([[0, 0, 0], [9, 11, 8], [4, 5, -1]])
    np.testing.assert_allclose(tre(points, points, u, (1, 1, 1)), [3, 3, 0])
    with pytest.raises(ValueError, match="3 are fixed and 2 moving"):
        tre(points, points[:2], u, (1, 1, 1))


def test_an_inverse_takes_points_back():
    inverse = np.linalg.inv(MATRIX)
    found = inverse_consistency(affine(MATRIX, SHIFT), affine(inverse, -inverse @ SHIFT), SPACING)
    assert [*found] == ["mean_mm", "p95_mm", "max_mm"]
    np.testing.assert_allclose([*found.values()], 0, atol=1e-5)


def test_an_inverse_that_is_off_is_off_by_so_many_millimetres():
    # Shifts by 2 forth and by 1.5, 1 and 0.5 voxels back, in thirds of the planes along axis 1; 2 mm a voxel there.
    back = np.zeros((*SHAPE, 3), np.float32)
    back[:, 2:, :, 1] = -np.repeat([1.5, 1.0, 0.5], [2, 4, 4])[None, :, None]
    forth = np.zeros((*SHAPE, 3), np.float32)
    forth[..., 1] = 2
    found = inverse_consistency(forth, back, SPACING)
    errors = 2 * np.repeat([2, 0.5, 1, 1.5], [2, 2, 4, 4])
    assert found == pytest.approx({"mean_mm": errors.mean(), "p95_mm": np.percentile(errors, 95), "max_mm": 4})


def test_voxels_taken_outside_the_grid_do_not_count():
    # Back by 3.5 along axis 0: of ten planes, those from 4 on stay inside, and come back 0.5 short, 0.7 mm a voxel.
    back, forth = np.zeros((*SHAPE, 3), np.float32), np.zeros((*SHAPE, 3), np.float32)
    back[..., 0], forth[..., 0] = -3.5, 3.0
    back[:4, ..., 1] = 1  # of voxels outside it may be anything
    assert inverse_consistency(forth, back, SPACING) == pytest.approx(
        dict.fromkeys(("mean_mm", "p95_mm", "max_mm"), 0.35)
    )
    back[..., 0] = 20
    assert np.isnan([*inverse_consistency(forth, back, SPACING).values()]).all()
    with pytest.raises(ValueError, match=r"\(10, 12, 9, 3\) and \(10, 12, 8, 3\)"):
        inverse_consistency(forth, back[:, :, :8], SPACING)
