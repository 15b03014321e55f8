from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from dilformer_jax.io.geometry import corner_distance
from dilformer_jax.io.itk import read_displacement, write_displacement
from dilformer_jax.io.volumes import BadInput, Volume, read_image, write_image

SHAPE = (18, 22, 20)


def affine_of(directions: np.ndarray, spacing: tuple[float, ...], origin: tuple[float, ...]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = directions @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


# An oblique rotation, from the Cayley transform of a skew matrix.
SKEW = np.array([[0, -0.3, 0.2], [0.3, 0, -0.4], [-0.2, 0.4, 0]])
OBLIQUE = np.linalg.solve(np.eye(3) + SKEW, np.eye(3) - SKEW)
LIA = np.array([[-1, 0, 0], [0, 0, 1], [0, -1, 0]])
GRIDS = {
    "RAS": affine_of(np.eye(3), (1, 1, 1), (-8, 5, 30)),
    "LPS anisotropic": affine_of(np.diag([-1, -1, 1]), (0.7, 1.9, 3.1), (60, -40, 12)),
    "LIA": affine_of(LIA, (1, 1, 1), (90, -10, -80)),
    "oblique anisotropic": affine_of(OBLIQUE, (0.8, 1.3, 2.7), (-20, 33, 7)),
    "oblique anisotropic LIA": affine_of(OBLIQUE @ LIA, (2.2, 0.9, 1.4), (11, 80, -35)),
}


def smooth_displacement(seed: int) -> np.ndarray:
    """About two voxels, with a mean of its own along each axis, so that a swapped or flipped axis shows."""
    noise = np.random.default_rng(seed).normal(size=(*SHAPE, 3))
    smooth = ndimage.gaussian_filter(noise, (4, 4, 4, 0))
    return (smooth / smooth.std() + [0.5, -1.0, 1.5]).astype(np.float32)


def volume(path: Path, affine: np.ndarray, seed: int) -> Volume:
    """Noise, written by our own writer and read back."""
    array = np.random.default_rng(seed).uniform(size=SHAPE).astype(np.float32)
    header = nib.Nifti1Image(array, affine).header
    write_image(path, array, Volume(array, affine, path, header))
    return read_image(path)


def applied_by_itk(field: Path, fixed: Path, moving: Path) -> np.ndarray:
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(field), sitk.sitkVectorFloat64))
    moved = sitk.Resample(sitk.ReadImage(str(moving)), sitk.ReadImage(str(fixed)), transform, sitk.sitkLinear, -1)
    return sitk.GetArrayFromImage(moved).T


@pytest.mark.parametrize(
    ("fixed_grid", "moving_grid"),
    [*zip(GRIDS, GRIDS, strict=True), ("RAS", "oblique anisotropic LIA"), ("oblique anisotropic", "LPS anisotropic")],
)
def test_itk_moves_the_image_as_we_do(tmp_path, fixed_grid, moving_grid):
    fixed = volume(tmp_path / "fixed.nii.gz", GRIDS[fixed_grid], seed=1)
    moving = volume(tmp_path / "moving.nii.gz", GRIDS[moving_grid], seed=2)
    u = smooth_displacement(seed=3)
    write_displacement(tmp_path / "field.nii.gz", u, fixed, moving)

    sampled = np.moveaxis(np.indices(SHAPE), 0, -1) + u
    inside = ((sampled > 1e-3) & (sampled < np.array(SHAPE) - 1.001)).all(-1)
    assert inside.mean() > 0.5
    expected = ndimage.map_coordinates(moving.array, np.moveaxis(sampled, -1, 0), order=1)
    moved = applied_by_itk(tmp_path / "field.nii.gz", fixed.path, moving.path)
    np.testing.assert_allclose(moved[inside], expected[inside], atol=1e-4)


def test_the_file_says_that_it_is_an_itk_field(tmp_path):
    fixed = volume(tmp_path / "fixed.nii", GRIDS["oblique anisotropic"], seed=1)
    write_displacement(tmp_path / "field.nii.gz", smooth_displacement(0), fixed, fixed)
    image = nib.load(tmp_path / "field.nii.gz")
    header = image.header
    assert image.shape == (*SHAPE, 1, 3)
    assert header.get_data_dtype() == np.float32
    assert (header["intent_code"], header["sform_code"], header["qform_code"]) == (1007, 1, 1)
    assert header.get_xyzt_units()[0] == "mm"
    assert corner_distance(SHAPE, header.get_sform(), SHAPE, fixed.affine) < 1e-4
    assert corner_distance(SHAPE, header.get_qform(), SHAPE, fixed.affine) < 1e-4


def test_one_voxel_along_the_first_axis_is_its_length_to_the_left_in_lps(tmp_path):
    fixed = volume(tmp_path / "fixed.nii", np.diag([2.0, 3.0, 5.0, 1.0]), seed=1)
    u = np.broadcast_to(np.float32([1, 2, 3]), (*SHAPE, 3)).copy()
    write_displacement(tmp_path / "field.nii", u, fixed, fixed)
    vectors = np.asarray(nib.load(tmp_path / "field.nii").dataobj)
    np.testing.assert_array_equal(vectors, np.broadcast_to([-2, -6, 15], vectors.shape))


def test_what_is_written_is_read_back(tmp_path):
    fixed = volume(tmp_path / "fixed.nii", GRIDS["oblique anisotropic"], seed=1)
    moving = volume(tmp_path / "moving.nii", GRIDS["LIA"], seed=1)
    u = smooth_displacement(5)
    write_displacement(tmp_path / "field.nii.gz", u, fixed, moving)
    np.testing.assert_allclose(read_displacement(tmp_path / "field.nii.gz", fixed, moving), u, atol=1e-4)


def test_a_field_written_by_itk_is_read(tmp_path):
    fixed = volume(tmp_path / "fixed.nii", GRIDS["LPS anisotropic"], seed=1)
    u = smooth_displacement(6)
    # LPS array axes: components along LPS are those along the array, times the spacing.
    vectors = sitk.GetImageFromArray((u * np.float32([0.7, 1.9, 3.1])).transpose(2, 1, 0, 3), isVector=True)
    vectors.CopyInformation(sitk.ReadImage(str(fixed.path)))
    sitk.WriteImage(vectors, str(tmp_path / "field.nii.gz"))
    np.testing.assert_allclose(read_displacement(tmp_path / "field.nii.gz", fixed, fixed), u, atol=1e-4)


def test_a_file_that_reads_back_otherwise_is_never_named(tmp_path, monkeypatch):
    fixed = volume(tmp_path / "fixed.nii", GRIDS["RAS"], seed=1)
    u = smooth_displacement(7)
    monkeypatch.setattr("dilformer_jax.io.itk.read_displacement", lambda *_: u + np.float32(0.01))
    with pytest.raises(RuntimeError, match=r"field.nii reads back 0.01"):
        write_displacement(tmp_path / "field.nii", u, fixed, fixed)
    assert [path.name for path in tmp_path.iterdir()] == ["fixed.nii"]


def test_refused_fields(tmp_path):
    fixed = volume(tmp_path / "fixed.nii", GRIDS["RAS"], seed=1)
    elsewhere = volume(tmp_path / "elsewhere.nii", GRIDS["LIA"], seed=1)
    write_displacement(tmp_path / "field.nii", smooth_displacement(0), fixed, fixed)
    larger = Volume(np.zeros((18, 22, 21), np.float32), fixed.affine, tmp_path / "larger.nii", fixed.header)
    bad = nib.load(tmp_path / "field.nii")
    vectors = bad.get_fdata(caching="unchanged")
    vectors[0, 0, 0, 0, :2] = np.nan
    nib.Nifti1Image(vectors, None, bad.header).to_filename(tmp_path / "nan.nii")
    bad.header.set_intent("none")
    nib.Nifti1Image(bad.get_fdata(), None, bad.header).to_filename(tmp_path / "plain.nii")
    for name, grid, found in (
        ("fixed.nii", fixed, r"\(18, 22, 20\)"),
        ("plain.nii", fixed, "intent code 0"),
        ("nan.nii", fixed, "2 NaN"),
        ("field.nii", elsewhere, "mm away"),
        ("field.nii", larger, r"\(18, 22, 21\)"),
    ):
        with pytest.raises(BadInput, match=rf"{name} .*{found}.*; .*\.$"):
            read_displacement(tmp_path / name, grid, grid)


def test_refused_displacements(tmp_path):
    fixed = volume(tmp_path / "fixed.nii", GRIDS["RAS"], seed=1)
    sheared = GRIDS["RAS"].copy()
    sheared[0, 1] = 0.3
    slanted = volume(tmp_path / "slanted.nii", sheared, seed=1)
    u = smooth_displacement(0)
    with pytest.raises(BadInput, match=r"slanted.nii has a sheared affine.*; .*\.$"):
        write_displacement(tmp_path / "field.nii.gz", u, slanted, fixed)
    with pytest.raises(BadInput, match=r"field.mha .*; .*\.$"):
        write_displacement(tmp_path / "field.mha", u, fixed, fixed)
    with pytest.raises(ValueError, match="NaN"):
        write_displacement(tmp_path / "field.nii.gz", u * np.float32(np.nan), fixed, fixed)
    with pytest.raises(ValueError, match="shape"):
        write_displacement(tmp_path / "field.nii.gz", u[1:], fixed, fixed)
    assert not list(tmp_path.glob("*field*"))
    # A sheared moving image is no obstacle: only the fixed grid becomes ITK's.
    write_displacement(tmp_path / "field.nii.gz", u, fixed, slanted)
