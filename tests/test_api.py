"""`dilformer_jax.register` for Python, from files and from images in memory."""

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import dilformer_jax
from dilformer_jax.io.volumes import BadInput, read_image


@pytest.fixture(scope="module")
def result(inputs: Path):
    return dilformer_jax.register(
        inputs / "fixed.nii.gz",
        nib.load(inputs / "moving.nii.gz"),
        weights=inputs / "weights",
        affine=np.diag([1, 1, 1.05, 1]),
        moving_labels=inputs / "moving_labels.nii.gz",
        fixed_labels=nib.load(inputs / "labels.nii.gz"),
    )


def test_the_function_is_also_the_command_s_module():
    from dilformer_jax import register

    assert register is dilformer_jax.register is sys.modules["dilformer_jax.register"] and callable(register.main)
    with pytest.raises(AttributeError, match="has no attribute 'registre'"):
        dilformer_jax.registre  # noqa: B018


def test_everything_lies_where_the_images_lie(result, inputs: Path):
    fixed, moving = (nib.load(inputs / f"{name}.nii.gz") for name in ("fixed", "moving"))
    np.testing.assert_array_equal(result.moved.affine, fixed.affine)
    voxels = np.moveaxis(np.indices(fixed.shape), 0, -1)
    there = nib.affines.apply_affine(fixed.affine, voxels) + result.displacement
    places = nib.affines.apply_affine(np.linalg.inv(moving.affine), there)
    expected = ndimage.map_coordinates(moving.get_fdata(), np.moveaxis(places, -1, 0), order=1)
    inside = ((places > 0) & (places < np.array(moving.shape) - 1)).all(-1)
    assert 0.3 < inside.mean() < 1
    np.testing.assert_allclose(result.moved.get_fdata()[inside], expected[inside], atol=1e-3)
    points = np.array([[3.0, 4.0, 5.0], [10.0, 2.0, 6.0]])
    start = nib.affines.apply_affine(fixed.affine, points)
    back = result.points(result.points(start), inverse=True)
    np.testing.assert_allclose(back, start, atol=0.1)
    i, j, k = 7, 9, 6
    np.testing.assert_allclose(
        result.points(nib.affines.apply_affine(fixed.affine, [[i, j, k]]))[0], there[i, j, k], atol=1e-3
    )
    assert result.inverse.shape == (*moving.shape, 3) and result.affine[2, 2] == 1.05


def test_other_images_are_carried_along(result, inputs: Path):
    np.testing.assert_array_equal(result.apply(inputs / "moving.nii.gz").get_fdata(), result.moved.get_fdata())
    labels = result.apply(nib.load(inputs / "moving_labels.nii.gz"), labels=True)
    np.testing.assert_array_equal(labels.get_fdata(), result.moved_labels.get_fdata())
    assert set(np.unique(labels.get_fdata())) <= {0, 3, 5} and labels.get_data_dtype().kind in "iu"
    back = result.apply(inputs / "fixed.nii.gz", inverse=True)
    np.testing.assert_array_equal(back.affine, nib.load(inputs / "moving.nii.gz").affine)
    smooth = result.apply(inputs / "moving.nii.gz", interpolation="cubic").get_fdata()
    assert 0 < np.abs(smooth - result.moved.get_fdata()).mean() < 5
    with pytest.raises(BadInput, match="lost.nii.gz does not exist"):
        result.apply("lost.nii.gz")


def test_it_is_saved_and_shown(result, inputs: Path, tmp_path: Path):
    folder = result.save(tmp_path / "out", formats=["voxel"])
    written = read_image(folder / "moved.nii.gz")
    np.testing.assert_array_equal(written.array, result.moved.get_fdata(dtype=np.float32))
    assert {"field.nii.gz", "inverse_field.nii.gz", "moved_labels.nii.gz", "run.json", "affine.txt"} <= {
        path.name for path in folder.iterdir()
    }
    pytest.importorskip("matplotlib")
    assert result._repr_png_().startswith(b"\x89PNG")


def test_what_is_refused(inputs: Path):
    with pytest.raises(BadInput, match="nan.nii.gz has"):
        dilformer_jax.register(inputs / "fixed.nii.gz", inputs / "nan.nii.gz")
    with pytest.raises(BadInput, match="affine weird is no file; give auto, search, none or"):
        dilformer_jax.register(inputs / "fixed.nii.gz", inputs / "moving.nii.gz", affine="weird")
    # Which reaches the network, that of the bundle here.
    with pytest.raises(BadInput, match="weights was trained for no smoothness but its own, 1"):
        dilformer_jax.register(
            inputs / "fixed.nii.gz", inputs / "moving.nii.gz", weights=inputs / "weights", smoothness=2.0
        )
    with pytest.raises(BadInput, match="smoothness is asked of a network; leave it out"):
        dilformer_jax.register(inputs / "fixed.nii.gz", inputs / "moving.nii.gz", weights=None, smoothness=2.0)
