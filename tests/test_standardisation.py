"""Axes exchanged and voxels shifted, against a loop over voxels."""

import itertools

import numpy as np
import pytest

from dilformer_jax.data.standardisation import Grid, Settings, _window, grid_of
from dilformer_jax.io.geometry import orientation, spacing


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_whole_voxels_are_moved_as_a_loop_would(axes):
    generator = np.random.default_rng(axes)
    array = generator.integers(1, 99, (4, 5, 6))
    for signs in itertools.product((1, -1), repeat=3):
        places = np.zeros((4, 4), int)
        places[axes, range(3)], places[3, 3] = signs, 1
        for _ in range(5):
            places[:3, 3] = generator.integers(-9, 10, 3)
            shape = tuple(int(n) for n in generator.integers(1, 9, 3))
            expected = np.full(shape, -7)
            for place in np.ndindex(shape):
                there = places[:3, :3] @ place + places[:3, 3]
                if (there >= 0).all() and (there < array.shape).all():
                    expected[place] = array[tuple(there)]
            np.testing.assert_array_equal(_window(array, places, shape, -7), expected)


def test_a_grid_covers_what_the_file_covers_unless_it_is_told_how_much():
    affine = np.array([[0, 0, 2.0, 5], [-1, 0, 0, 3], [0, 1.5, 0, -4], [0, 0, 0, 1]])  # PSR
    file = Grid((10, 20, 30), affine)
    same = grid_of(file, Settings(), None)
    assert same.shape == file.shape and np.array_equal(same.affine, affine)
    turned = grid_of(file, Settings(orientation="LIA", spacing=(3.0, 3.0, 3.0)), None)
    assert turned.shape == (20, 10, 4)  # 60, 30 and 10 mm
    assert orientation(turned.affine) == "LIA" and spacing(turned.affine) == (3, 3, 3)
    low, high = (np.array(corner) - 0.5 for corner in ((0, 0, 0), turned.shape))
    corners = np.stack([affine[:3, :3] @ p + affine[:3, 3] for p in ((-0.5,) * 3, (9.5, 19.5, 29.5))])
    faces = np.stack([turned.affine[:3, :3] @ p + turned.affine[:3, 3] for p in (low, high)])
    np.testing.assert_allclose(np.sort(faces, 0)[:, (0, 2)], np.sort(corners, 0)[:, (0, 2)])
    assert np.ptp(faces[:, 1]) == pytest.approx(12) and faces[:, 1].mean() == pytest.approx(corners[:, 1].mean())
    told = grid_of(file, Settings(grid=(4, 5, 6), spacing=(2.0, 2.0, 2.0)), np.array([1.0, 2, 3]))
    np.testing.assert_allclose(told.affine[:3, :3] @ (1.5, 2, 2.5) + told.affine[:3, 3], (1, 2, 3))
