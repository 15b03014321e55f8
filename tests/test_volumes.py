from pathlib import Path

import numpy as np
import pytest
from nifti_files import AFFINE, SHAPE, noise, save

from dilformer_jax.io.volumes import (
    BadInput,
    Volume,
    check_same_grid,
    normalise,
    read_image,
    read_labels,
    write_labels,
)


def volume(path: Path, affine: np.ndarray = AFFINE, shape: tuple[int, ...] = SHAPE) -> Volume:
    return read_image(save(path, noise(shape=shape), affine))


def test_read_image_gives_float32_and_the_place(tmp_path):
    image = read_image(str(save(tmp_path / "a.nii.gz", noise(np.int16))))
    assert image.array.dtype == np.float32
    assert image.path == tmp_path / "a.nii.gz"
    np.testing.assert_array_equal(image.array, noise())
    np.testing.assert_array_equal(image.affine, AFFINE)


def test_read_image_applies_slope_and_intercept(tmp_path):
    image = read_image(save(tmp_path / "a.nii", noise(np.uint8), scl=(0.5, -3)))
    np.testing.assert_array_equal(image.array, 0.5 * noise() - 3)


@pytest.mark.parametrize("tail", [(1,), (1, 1)])
def test_trailing_single_axes_are_dropped(tmp_path, tail):
    array = noise(shape=(*SHAPE, *tail))
    assert read_image(save(tmp_path / "a.nii", array)).array.shape == SHAPE
    np.testing.assert_array_equal(read_labels(save(tmp_path / "b.nii", array)).array, array.reshape(SHAPE))


def test_thin_and_single_slices_are_read(tmp_path):
    assert read_image(save(tmp_path / "a.nii", noise(shape=(5, 6, 1)))).array.shape == (5, 6, 1)


def shifted(mm: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 3] += mm
    return affine


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float64])
def test_labels_of_any_type_are_int32(tmp_path, dtype):
    labels = read_labels(save(tmp_path / "a.nii", noise(dtype))).array
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, noise(np.int32))


def test_labels_with_a_slope_that_leaves_whole_numbers(tmp_path):
    # 0.1 is no float32: 10 * slope is 1.0000000149.
    raw = 10 * noise(np.int16)
    np.testing.assert_array_equal(read_labels(save(tmp_path / "a.nii", raw, scl=(0.1, 2))).array, noise(np.int32) + 2)


def test_one_grid_within_the_tolerance(tmp_path):
    a = volume(tmp_path / "a.nii")
    check_same_grid(a, volume(tmp_path / "b.nii", shifted(0.09)))
    check_same_grid(a, volume(tmp_path / "c.nii", shifted(3)), tolerance_mm=4.0)


def test_different_grids(tmp_path):
    a = volume(tmp_path / "a.nii")
    with pytest.raises(BadInput, match=r"b\.nii .*a\.nii .* up to 0\.25 mm apart; resample .*\.$"):
        check_same_grid(a, volume(tmp_path / "b.nii", shifted(0.25)))
    with pytest.raises(BadInput, match=r"c\.nii has 5x6x8 voxels where .*a\.nii has 5x6x7; resample .*\.$"):
        check_same_grid(a, volume(tmp_path / "c.nii", shape=(5, 6, 8)))
    # Same first voxel, other voxel size: 0.05 mm a voxel is 0.3 mm over the 7 slices.
    with pytest.raises(BadInput, match=r"1x2x3 mm.*0\.3 mm apart"):
        check_same_grid(a, volume(tmp_path / "d.nii", AFFINE @ np.diag([1, 1, 3.05 / 3, 1])))


def test_normalise():
    x = np.array([-2, 0, 1, 3, 8])
    np.testing.assert_array_equal(normalise(x, "max"), [-0.25, 0, 0.125, 0.375, 1])
    np.testing.assert_allclose(normalise(x, "minmax"), [0, 0.2, 0.3, 0.5, 1])
    np.testing.assert_array_equal(normalise(x, "none"), x)
    assert {normalise(x, m).dtype for m in ("max", "minmax", "percentile", "none")} == {np.dtype(np.float32)}


def test_normalise_by_percentiles_of_what_is_not_background():
    # Nonzero voxels 1000, 1001, ..., 2000: the 0.1 % percentile is 1001, the 99.9 % one is 1999.
    x = np.concatenate([np.zeros(5000), np.arange(1000, 2001)])
    y = normalise(x, "percentile")
    assert (y[:5000] == 0).all()
    np.testing.assert_allclose(y[5000:], np.clip((np.arange(1000, 2001) - 1001) / 998, 0, 1), atol=1e-6)


def test_normalise_refuses_an_empty_range():
    for x, method in (
        (np.array([-3, -1]), "max"),
        (np.array([2, 2]), "minmax"),
        (np.array([0, 5, 5]), "percentile"),
        (np.zeros(4), "percentile"),
    ):
        with pytest.raises(BadInput, match=rf"'{method}'; choose another"):
            normalise(x, method)
    with pytest.raises(ValueError, match="not 'median'"):
        normalise(np.arange(3), "median")


@pytest.mark.data
def test_real_brains(shared_data, tmp_path):
    image = read_image(shared_data / "lpba40" / "S35_t1.nii.gz")
    labels = read_labels(shared_data / "lpba40" / "S35_seg.nii.gz")
    check_same_grid(image, labels)
    assert image.array.shape == (160, 192, 160)
    assert len(np.unique(labels.array)) == 57  # 56 regions and background
    write_labels(tmp_path / "labels.nii.gz", labels.array, like=image)
    np.testing.assert_array_equal(read_labels(tmp_path / "labels.nii.gz").array, labels.array)


@pytest.mark.data
def test_a_real_whole_head_with_slope(shared_data):
    subject = shared_data / "ixi_2mm_native" / "IXI034-HH-1260_T1"
    image, labels = read_image(f"{subject}.nii.gz"), read_labels(f"{subject}_DLMUSE.nii.gz")
    check_same_grid(image, labels)
    assert image.array.shape == (120, 120, 90)
    inside = labels.array > 0
    assert image.array[inside].mean() > 2 * image.array[~inside].mean()
