"""Affine alignment of phantoms whose affine is known."""

import itertools
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from dilformer_jax.data.phantoms import phantom
from dilformer_jax.io.geometry import apply_affine
from dilformer_jax.io.volumes import BadInput, Volume
from dilformer_jax.registration import affine, content

MM = 2.5  # a voxel
TURNED = np.diag([-1.0, 1, -1, 1])  # upside down


def volume(array, matrix):
    return Volume(np.asarray(array, np.float32), np.asarray(matrix, np.float64), Path("a.nii"), nib.Nifti1Header())


def moved(matrix, given):
    """The volume where the matrix carries it."""
    return replace(given, affine=matrix @ given.affine)


@pytest.fixture(scope="module")
def fixed():
    matrix = np.diag([MM, MM, MM, 1])
    matrix[:3, 3] = -75, -95, -70
    return volume(np.pad(phantom(3, (56, 68, 56))[0], 3), matrix)


@pytest.fixture(scope="module")
def known():
    """Turned by 30 degrees and moved by 40 mm, scaled and sheared a little."""
    matrix = np.eye(4)
    turn = Rotation.from_rotvec(np.deg2rad(30) * np.array([2, -1, 2]) / 3).as_matrix()
    matrix[:3, :3] = turn @ [[1.1, 0.03, 0], [0, 0.95, 0.02], [0, 0, 1.05]]
    matrix[:3, 3] = 40 * np.array([0.6, -0.64, 0.48])
    return matrix


@pytest.fixture(scope="module")
def disturbed(fixed, known):
    """The fixed image carried by the known affine onto a grid that is oblique, sheared, of flat voxels and stored the
    other way round."""
    grid = np.diag([-2.0, 2.2, 4.0, 1])
    grid[:3, :3] = (
        Rotation.from_rotvec([0.1, 0.2, -0.1]).as_matrix() @ [[1, 0.1, 0], [0, 1, 0], [0, 0, 1]] @ grid[:3, :3]
    )
    shape = (120, 112, 60)
    middle = apply_affine(known @ fixed.affine, np.array(fixed.array.shape) / 2)
    grid[:3, 3] = middle - grid[:3, :3] @ (np.array(shape) / 2)
    across = np.linalg.inv(known @ fixed.affine) @ grid
    array = ndimage.affine_transform(fixed.array, across[:3, :3], across[:3, 3], output_shape=shape, order=1)
    return volume(array.transpose(2, 0, 1), grid[:, [2, 0, 1, 3]])


def corner_error(fixed, found, expected):
    """The largest distance in mm at the corners of the fixed image's content."""
    low, high = (f(np.argwhere(fixed.array > 0), axis=0) for f in (np.min, np.max))
    points = apply_affine(fixed.affine, low + np.array(list(itertools.product((0, 1), repeat=3))) * (high - low))
    return np.linalg.norm(apply_affine(found, points) - apply_affine(expected, points), axis=1).max()


@pytest.fixture(scope="module")
def coarse():
    """Grids of half the size, an eighth of the samples: what follows is no matter of precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(content, "SIZES", tuple(size // 2 for size in content.SIZES))
        yield


@pytest.fixture(scope="module")
def aligned(fixed, disturbed, coarse):
    return affine.align(fixed, disturbed)


def test_a_known_affine_is_found(fixed, disturbed, known):
    found = affine.align(fixed, disturbed)
    assert len(content.content(fixed).foreground) == content.SIZES[-1] == 64
    assert corner_error(fixed, found.matrix, known) < MM / 2
    assert found.similarity.correlation > 0.95 > 0.6 > found.similarity_before.correlation
    assert found.similarity.nmi > found.similarity_before.nmi
    assert found.overlap == 1 and found.warnings == ()


def test_without_a_search_a_head_that_lies_upside_down_warns(fixed, disturbed):
    assert any("little alike" in warning for warning in affine.align(fixed, moved(TURNED, disturbed)).warnings)


# --- On the coarser grids from here on ---


def test_the_other_way_it_is_the_inverse(fixed, disturbed, known, aligned):
    assert corner_error(fixed, aligned.matrix, known) < MM
    back = affine.align(disturbed, fixed)
    np.testing.assert_allclose(back.matrix @ aligned.matrix, np.eye(4), atol=1e-9)


def test_neither_origin_nor_unit_of_the_world_matters(fixed, disturbed, aligned):
    shift = np.eye(4)
    shift[:3, 3] = 256, -512, 1024
    exact = [replace(v, affine=v.affine.astype(np.float32).astype(np.float64)) for v in (fixed, disturbed)]
    here, there = affine.align(*exact), affine.align(*(moved(shift, v) for v in exact))
    np.testing.assert_array_equal(there.matrix[:3, :3], here.matrix[:3, :3])
    np.testing.assert_allclose(there.matrix, shift @ here.matrix @ np.linalg.inv(shift), rtol=0, atol=1e-9)
    for scale in (1e3, 1e-3):
        world = np.diag([scale, scale, scale, 1])
        found = affine.align(moved(world, fixed), moved(world, disturbed))
        np.testing.assert_allclose(np.linalg.inv(world) @ found.matrix @ world, aligned.matrix, atol=1e-2)


def test_padding_changes_nothing(fixed, disturbed, aligned):
    def padded(given, widths):
        matrix = given.affine.copy()
        matrix[:3, 3] -= matrix[:3, :3] @ [before for before, _ in widths]
        return volume(np.pad(given.array, widths), matrix)

    found = affine.align(padded(fixed, [(30, 5), (0, 41), (17, 0)]), padded(disturbed, [(0, 9), (25, 0), (60, 2)]))
    assert corner_error(fixed, found.matrix, aligned.matrix) < 0.01


def test_images_that_do_not_overlap_start_from_their_middles(fixed, disturbed, known, coarse):
    far = np.eye(4)
    far[:3, 3] = 0, 900, 0
    found = affine.align(fixed, moved(far, disturbed))
    assert corner_error(fixed, found.matrix, far @ known) < MM
    assert found.start.startswith("centres of mass")
    (warning,) = found.warnings
    assert warning.startswith("fields of view do not overlap (centres 8") and "mm apart" in warning


def test_search_finds_a_head_that_lies_upside_down(fixed, disturbed, known, coarse):
    found = affine.align(fixed, moved(TURNED, disturbed), search=True)
    assert corner_error(fixed, found.matrix, TURNED @ known) < MM
    assert found.start == "centres of mass, R A S to L A I" and found.warnings == ()
    mirrored = affine.align(fixed, moved(np.diag([-1.0, 1, 1, 1]), disturbed), search=True)
    assert np.linalg.det(mirrored.matrix) > 0
    assert "a mirror image is more alike" in mirrored.warnings[0]


def test_masks_decide_what_is_seen(fixed, disturbed, known, coarse):
    """Something bright beside the brain is left out; a mask that leaves nothing is refused."""
    array = fixed.array.copy()
    array[:3], array[-3:] = 2, 2
    odd = replace(fixed, array=array)
    found = affine.align(odd, disturbed, fixed_mask=fixed.array > 0)
    assert corner_error(fixed, found.matrix, known) < MM
    with pytest.raises(BadInput, match="a.nii shows nothing"):
        affine.align(fixed, disturbed, moving_mask=np.zeros(disturbed.array.shape, bool))
    with pytest.raises(ValueError, match="the mask of a.nii is"):
        affine.align(fixed, disturbed, fixed_mask=np.ones((2, 2, 2), bool))


def test_what_does_not_match_warns(fixed, coarse):
    blobs = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=fixed.array.shape), 4)
    found = affine.align(fixed, replace(fixed, array=np.float32(np.maximum(blobs, 0))))
    assert any("little alike" in warning for warning in found.warnings)
    thick = affine.align(fixed, moved(np.diag([1, 1, 2.0, 1]), fixed))
    assert any("scales lengths by" in warning for warning in thick.warnings)
    half = replace(fixed, array=fixed.array[:, :, :28])
    assert any("foreground lies in the moving" in warning for warning in affine.align(fixed, half).warnings)
