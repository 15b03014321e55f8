import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import scipy.io
import SimpleITK as sitk
from scipy import ndimage

from dilformer_jax.io.geometry import apply_affine, corner_distance
from dilformer_jax.io.itk import read_affine, read_field, write_affine, write_field
from dilformer_jax.io.transforms import Field, Grid, carried
from dilformer_jax.io.volumes import BadInput, Volume, read_image, write_image
from dilformer_jax.ops.resampling import resampled

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


def applied_by_itk(field: Path, fixed: Path, moving: Path, outside: float = -1) -> np.ndarray:
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(field), sitk.sitkVectorFloat64))
    moved = sitk.Resample(sitk.ReadImage(str(moving)), sitk.ReadImage(str(fixed)), transform, sitk.sitkLinear, outside)
    return sitk.GetArrayFromImage(moved).T


def test_the_file_says_that_it_is_an_itk_field(tmp_path):
    fixed = volume(tmp_path / "fixed.nii", GRIDS["oblique anisotropic"], seed=1)
    write_field(tmp_path / "field.nii.gz", (Field(smooth_displacement(0), fixed.affine),), fixed)
    image = nib.load(tmp_path / "field.nii.gz")
    header = image.header
    assert image.shape == (*SHAPE, 1, 3)
    assert header.get_data_dtype() == np.float32
    assert (header["intent_code"], header["sform_code"], header["qform_code"]) == (1007, 1, 1)
    assert header.get_xyzt_units()[0] == "mm"
    assert corner_distance(SHAPE, header.get_sform(), SHAPE, fixed.affine) < 1e-4
    assert corner_distance(SHAPE, header.get_qform(), SHAPE, fixed.affine) < 1e-4


def test_a_step_to_the_right_and_forwards_is_negative_in_lps(tmp_path):
    fixed = volume(tmp_path / "fixed.nii", np.diag([2.0, 3.0, 5.0, 1.0]), seed=1)
    step = np.broadcast_to(np.float32([2, 6, 15]), (*SHAPE, 3))
    write_field(tmp_path / "field.nii", (Field(step, fixed.affine),), fixed)
    vectors = np.asarray(nib.load(tmp_path / "field.nii").dataobj)
    np.testing.assert_array_equal(vectors, np.broadcast_to([-2, -6, 15], vectors.shape))


def test_a_field_written_by_itk_is_read(tmp_path):
    fixed = volume(tmp_path / "fixed.nii", GRIDS["LPS anisotropic"], seed=1)
    vectors = smooth_displacement(6)
    image = sitk.GetImageFromArray(vectors.transpose(2, 1, 0, 3), isVector=True)
    image.CopyInformation(sitk.ReadImage(str(fixed.path)))
    sitk.WriteImage(image, str(tmp_path / "field.nii.gz"))
    found = read_field(tmp_path / "field.nii.gz")
    np.testing.assert_allclose(found.displacement, vectors * [-1, -1, 1], atol=1e-4)
    np.testing.assert_allclose(found.affine, fixed.affine, atol=1e-4)


# --- Transforms with affine and field: `write_field`, `read_field`, `write_affine`, `read_affine` ---

SMALL = (9, 8, 7)
ROTATIONS = [
    np.eye(3)[list(order)] * np.array(signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def wavy(seed: int) -> tuple[Field, np.ndarray]:
    """A field of about 0.7 mm on a grid of its own, then an affine map."""
    rng = np.random.default_rng(seed)
    vectors = ndimage.gaussian_filter(rng.normal(size=(12, 11, 10, 3)), (1, 1, 1, 0)) * 4
    matrix = np.eye(4)
    matrix[:3, :3] += rng.normal(size=(3, 3)) * 0.05
    matrix[:3, 3] = rng.normal(size=3)
    return Field(vectors, affine_of(OBLIQUE, (2, 2.2, 2.4), (-11, -14, -9))), matrix


def centred(directions: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    linear = directions @ np.diag(spacing)
    return affine_of(directions, spacing, tuple(-linear @ (np.array(SMALL) - 1) / 2))


def test_itk_applies_our_field_as_we_resample_in_every_orientation(tmp_path):
    """48 orientations x plumb and oblique x isotropic and anisotropic."""
    array = np.random.default_rng(0).uniform(size=SMALL).astype(np.float32)
    assert len(ROTATIONS) == 48
    worst, outside = 0.0, 0
    for number, (turn, tilt, sizes) in enumerate(
        itertools.product(ROTATIONS, (np.eye(3), OBLIQUE), ((1.5, 1.5, 1.5), (0.9, 1.6, 2.3)))
    ):
        fixed = centred(tilt @ turn, sizes)
        moving = centred(ROTATIONS[(7 * number) % 48], sizes[::-1])
        names = [tmp_path / f"{name}.nii" for name in ("fixed", "moving", "field")]
        for name, affine in zip(names[:2], (fixed, moving), strict=True):
            image = nib.Nifti1Image(array, affine)
            image.set_qform(affine, 1)
            image.to_filename(name)
        transform = wavy(number % 5)
        assert write_field(names[2], transform, Grid(SMALL, fixed)) == ""
        places = lambda x, fixed=fixed, moving=moving, transform=transform: apply_affine(
            np.linalg.inv(moving), carried(apply_affine(fixed, x), transform)
        )
        ours = resampled(array, SMALL, places, "linear", 0)
        worst = max(worst, float(np.abs(applied_by_itk(names[2], *names[:2], outside=0) - ours).max()))
        outside += np.count_nonzero(ours == 0)
    assert worst < 1e-3
    assert 0.05 < outside / (192 * array.size) < 0.6  # some of each image comes from beyond the other


def test_a_sheared_grid_is_covered_by_one_of_right_angles(tmp_path):
    sheared = centred(OBLIQUE, (1, 2, 1.5))
    sheared[:3, :3] = sheared[:3, :3] @ [[1, 0.3, 0], [0, 1, 0], [0, 0, 1]]
    transform = wavy(1)
    note = write_field(tmp_path / "field.nii.gz", transform, Grid(SMALL, sheared))
    assert "field.nii.gz: the grid is sheared" in note and note.endswith(".")
    field = read_field(tmp_path / "field.nii.gz")
    linear = field.affine[:3, :3]
    np.testing.assert_allclose(linear.T @ linear, np.diag(np.diag(linear.T @ linear)), atol=1e-5)
    # Each voxel of the sheared grid lies in it, and the field holds the transform there.
    points = apply_affine(sheared, np.moveaxis(np.indices(SMALL), 0, -1).reshape(-1, 3))
    voxels = apply_affine(np.linalg.inv(field.affine), points)
    assert (voxels > -1e-3).all() and (voxels < np.array(field.displacement.shape[:3]) - 1 + 1e-3).all()
    matrix = transform[1]
    write_field(tmp_path / "affine.nii", (matrix,), Grid(SMALL, sheared))
    found = carried(points, (read_field(tmp_path / "affine.nii"),))
    np.testing.assert_allclose(found, apply_affine(matrix, points), atol=1e-4)  # linear between voxels too


def test_fields_of_itk_are_read_in_both_frames(tmp_path):
    grid = GRIDS["oblique anisotropic LIA"]
    vectors = np.random.default_rng(2).normal(size=(*SMALL, 3)).astype(np.float32)
    for code in (1007, 1006):  # ITK reads both: vectors in LPS, displacements in RAS
        image = nib.Nifti1Image(vectors[:, :, :, None], grid)
        image.set_qform(grid, 1)
        image.header.set_intent(code)
        image.to_filename(tmp_path / "field.nii")
        field = read_field(tmp_path / "field.nii")
        image = sitk.ReadImage(str(tmp_path / "field.nii"), sitk.sitkVectorFloat64)
        index = (3, 5, 2)
        start = image.TransformIndexToPhysicalPoint(index)
        lps = sitk.DisplacementFieldTransform(image).TransformPoint(start)  # the image is empty then
        point = apply_affine(grid, np.array([index]))
        np.testing.assert_allclose(carried(point, (field,))[0] * [-1, -1, 1], lps, atol=1e-4)


def test_affines_are_written_as_simpleitk_reads_them(tmp_path):
    matrix = wavy(3)[1]
    write_affine(tmp_path / "affine.txt", matrix)
    transform = sitk.ReadTransform(str(tmp_path / "affine.txt"))
    point = np.array([12.0, -30, 7])
    expected = apply_affine(matrix, point) * [-1, -1, 1]
    np.testing.assert_allclose(transform.TransformPoint(tuple(point * [-1, -1, 1])), expected, rtol=1e-12)
    np.testing.assert_allclose(read_affine(tmp_path / "affine.txt"), matrix, rtol=1e-12)


def test_affines_of_simpleitk_are_read(tmp_path):
    zyx = sitk.Euler3DTransform((9, 8, 7), 0.3, -0.2, 0.5, (1, 2, 3))
    zyx.SetComputeZYX(True)
    affine = sitk.AffineTransform((np.arange(9) + 5 * np.eye(3).ravel()).tolist(), (1, 2, 3), (4, 5, 6))
    for transform in (
        affine,
        zyx,
        sitk.Euler3DTransform((9, 8, 7), 0.3, -0.2, 0.5, (1, 2, 3)),
        sitk.VersorRigid3DTransform((0.1, 0.2, 0.3, 0.9), (4, 5, 6), (1, 2, 3)),
        sitk.Similarity3DTransform(1.2, (0.1, 0.2, 0.3, 0.9), (4, 5, 6), (1, 2, 3)),
        sitk.TranslationTransform(3, (4, 5, 6)),
        sitk.Transform(),
    ):
        for name in ("affine.txt", "affine.mat"):
            sitk.WriteTransform(transform, str(tmp_path / name))
            found = apply_affine(read_affine(tmp_path / name), np.array([10.0, 20, -30]) * [-1, -1, 1])
            expected = np.array(transform.TransformPoint((10.0, 20, -30))) * [-1, -1, 1]
            np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=transform.GetName())


def test_single_precision_affines_of_ants_are_read(tmp_path):
    # As antsRegistration writes 0GenericAffine.mat with --float 1.
    parameters = np.float32([[1, 0, 0.1, 0, 1, 0, 0, 0, 1, 4, 5, 6]]).T
    scipy.io.savemat(
        tmp_path / "a.mat", {"AffineTransform_float_3_3": parameters, "fixed": np.float32([[1, 2, 3]]).T}, format="4"
    )
    found = apply_affine(read_affine(tmp_path / "a.mat"), np.array([-10.0, -20, 30]))
    # x -> M (x - c) + c + t in LPS, of (10, 20, 30).
    np.testing.assert_allclose(found * [-1, -1, 1], [10 + 0.1 * (30 - 3) + 4, 25, 36], rtol=1e-6)


def test_affine_files_that_are_none(tmp_path):
    path = tmp_path / "affine.txt"
    head = "#Insight Transform File V1.0\n#Transform 0\n"
    twelve = " ".join("1" * 12)
    for text, found in (
        ("1 0 0 0\n", "does not begin with"),
        (head, "cut short"),
        (f"{head}Transform: AffineTransform_double_3_3\nParameters: 1 2\nFixedParameters: 0 0 0\n", "2 and 3 param"),
        (f"{head}Transform: AffineTransform_double_3_3\nParameters: {twelve}\nFixedParameters:\n", "no affine map"),
        (f"{head}Transform: AffineTransform_double_3_3\nParameters: 1 x\nFixedParameters:\n", "'1 x' where numbers"),
        (f"{head}Transform: AffineTransform_double_3_3\nParameters: 1 nan\nFixedParameters:\n", "NaN"),
        (f"{head}Transform: BSplineTransform_double_3_3\nParameters: 1 2\nFixedParameters: 0\n", "BSpline"),
        (f"{head}Transform: A\nParameters: 1\nTransform: B\nParameters: 1\n", "2 transforms"),
    ):
        path.write_text(text)
        with pytest.raises(BadInput, match=rf"affine.txt .*{found}.*; .*\.$"):
            read_affine(path)
    path.write_bytes(b"\0\0\0\0 damaged")
    with pytest.raises(BadInput, match=r"affine.txt is no affine in MATLAB's form.*; .*\.$"):
        read_affine(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match=r"affine.txt is no text file; .*\.$"):
        read_affine(path)
    with pytest.raises(BadInput, match=r"missing.txt cannot be read .*; .*\.$"):
        read_affine(tmp_path / "missing.txt")
    with pytest.raises(BadInput, match="no affine map"):
        write_affine(tmp_path / "new.txt", np.zeros((4, 4)))
    assert not (tmp_path / "new.txt").exists()


def test_fields_that_are_none_or_read_back_otherwise(tmp_path, monkeypatch):
    path = tmp_path / "field.nii.gz"
    grid = Grid(SMALL, GRIDS["RAS"])
    write_field(path, wavy(0), grid)
    image = nib.load(path)
    positions = nib.Nifti1Image(image.get_fdata(caching="unchanged"), image.affine, image.header)
    positions.header.set_intent("vector", name="Mapping")
    positions.to_filename(tmp_path / "y_spm.nii")
    with pytest.raises(BadInput, match=r"y_spm.nii is a deformation by SPM.*; .*\.$"):
        read_field(tmp_path / "y_spm.nii")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput, match=r"field.nii.gz is corrupt, truncated.*; .*\.$"):
        read_field(path)
    path.unlink()
    with pytest.raises(ValueError, match="NaN"):
        write_field(path, (np.full((4, 4), np.nan),), grid)
    shifted = affine_of(np.eye(3), (1, 1, 1), (0.01, 0, 0))
    real = read_field
    monkeypatch.setattr(
        "dilformer_jax.io.itk.read_field", lambda path: Field(real(path).displacement + np.float32(0.01), shifted)
    )
    with pytest.raises(RuntimeError, match=r"field.nii.gz reads back [\d.]+ voxels away"):
        write_field(path, wavy(0), grid)
    assert [path.name for path in tmp_path.iterdir()] == ["y_spm.nii"]
