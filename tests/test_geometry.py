import itertools

import nibabel as nib
import numpy as np
import pytest

from dilformer_jax.io.geometry import (
    apply_affine,
    centred_affine,
    corner_distance,
    is_singular,
    orientation,
    spacing,
    to_world,
)


def rotation(axis: int, degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.roll(np.array([[1, 0, 0], [0, c, -s], [0, s, c]]), (axis, axis), (0, 1))


def oblique(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    turns = [rotation(axis, angle) for axis, angle in enumerate(rng.uniform(-30, 30, 3))]
    affine[:3, :3] = turns[0] @ turns[1] @ turns[2] @ np.diag(rng.uniform(0.5, 3, 3))
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    return affine


def test_spacing_of_a_rotated_grid():
    affine = np.eye(4)
    affine[:3, :3] = rotation(0, 20) @ rotation(1, -35) @ np.diag([0.8, -1.5, 5])
    assert spacing(affine) == pytest.approx((0.8, 1.5, 5))


@pytest.mark.parametrize(
    ("columns", "codes"),
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], "RAS"),
        ([[-1, 0, 0], [0, -1, 0], [0, 0, 1]], "LPS"),
        ([[-1, 0, 0], [0, 0, -1], [0, 1, 0]], "LIA"),
        ([[0, -1, 0], [0, 0, 1], [1, 0, 0]], "PSR"),
    ],
)
def test_orientation(columns, codes):
    """Each column is where one array axis points to in RAS; a turn by 25 degrees and anisotropy change no name."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(1, 25) @ np.transpose(columns) @ np.diag([1, 2, 5])
    assert orientation(affine) == codes


def test_singular_is_a_question_of_shape_and_not_of_size():
    sheared = np.eye(4)
    sheared[0, 1] = 0.4
    flat, parallel, undefined = np.diag([1.0, 0, 1, 1]), np.eye(4), np.eye(4)
    parallel[:3, 1] = [2, 0, 0]
    undefined[1, 3] = np.nan
    assert [is_singular(a) for a in (sheared, np.diag([1e-3, 1e-3, 1e-3, 1]))] == [False, False]
    assert [is_singular(a) for a in (flat, parallel, undefined)] == [True, True, True]


def test_apply_affine_is_nibabels():
    points = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32) * 100
    np.testing.assert_allclose(apply_affine(oblique(0), points), nib.affines.apply_affine(oblique(0), points))


def test_corner_distance_of_a_shift_and_of_a_turn():
    shifted = np.eye(4)
    shifted[:3, 3] = [3, 4, 0]
    assert corner_distance((5, 6, 7), np.eye(4), (5, 6, 7), shifted) == pytest.approx(5)
    # A turn about the first voxel by t moves a corner at distance r from the axis by the chord 2 r sin(t / 2).
    turned = np.eye(4)
    turned[:3, :3] = rotation(2, 1)
    chord = 2 * np.hypot(100, 200) * np.sin(np.radians(0.5))
    assert corner_distance((101, 201, 9), np.eye(4), (101, 201, 9), turned) == pytest.approx(chord)


def test_corner_distance_of_two_shapes_with_one_field_of_view():
    # First and last voxel centres coincide: 9 voxels at 2 mm and 17 at 1 mm both span 16 mm.
    assert corner_distance((9, 9, 9), np.diag([2, 2, 2, 1]), (17, 17, 17), np.eye(4)) == pytest.approx(0)
    assert corner_distance((9, 9, 9), np.diag([2, 2, 2, 1]), (17, 17, 20), np.eye(4)) == pytest.approx(3)


def test_to_world_is_the_definition_voxel_by_voxel():
    u = np.random.default_rng(1).normal(size=(3, 4, 2, 3)).astype(np.float32)
    fixed, moving = oblique(2), oblique(3)
    expected = np.zeros(u.shape)
    for x in itertools.product(range(3), range(4), range(2)):
        expected[x] = (moving @ np.append(np.array(x) + u[x], 1) - fixed @ np.append(x, 1))[:3]
    np.testing.assert_allclose(to_world(u, fixed, moving), expected, rtol=1e-6)


def test_to_world_on_one_grid_ignores_the_origin():
    affine = np.diag([-2.0, 1.0, 3.0, 1.0])
    affine[:3, 3] = 1e6
    u = np.zeros((2, 2, 2, 3), np.float32)
    assert not to_world(u, affine, affine).any()
    np.testing.assert_array_equal(to_world(u + 1, affine, affine)[1, 0, 1], [-2, 1, 3])


@pytest.mark.parametrize("axes", list(itertools.permutations(("RL", "AP", "SI"))))
def test_a_centred_grid_has_the_axes_that_its_letters_say(axes):
    for letters in itertools.product(*axes):
        affine = centred_affine((3, 4, 6), (1.0, 1.5, 2.0), "".join(letters))
        assert nib.aff2axcodes(affine) == letters and spacing(affine) == (1, 1.5, 2)
        np.testing.assert_allclose(apply_affine(affine, np.array([1, 1.5, 2.5])), 0, atol=1e-12)
