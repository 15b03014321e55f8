"""SyN: ANTs' transforms as displacements in voxels, by SimpleITK without ANTsPy and by ANTs itself where it is."""

import builtins
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import scipy.io
import SimpleITK as sitk
from orientations import DIRECTIONS, SKEW
from scipy import ndimage

from dilformer_jax.io.transforms import Grid
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.io.voxel_fields import displacement as in_voxels
from dilformer_jax.registration import syn
from dilformer_jax.registration.syn import Syn

SHAPE = (24, 20, 26)
LPS = np.diag([-1.0, -1.0, 1.0])
SIZES = (1.3, 2.1, 0.9)


def blobs(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    smooth = ndimage.gaussian_filter(noise, 3)
    return np.float32((smooth - smooth.min()) / np.ptp(smooth))


def wave(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A smooth displacement of one to two of something, differing by axis."""
    noise = ndimage.gaussian_filter(np.random.default_rng(5).normal(size=(*shape, 3)), (4, 4, 4, 0))
    return noise / noise.std() * [0.6, 0.9, 0.4] + [0.3, -0.5, 0.7]


def warped(image: np.ndarray, u: np.ndarray, order: int) -> np.ndarray:
    places = np.moveaxis(np.moveaxis(np.indices(u.shape[:3]), 0, -1) + u, -1, 0)
    return ndimage.map_coordinates(image, places, order=order, mode="nearest", prefilter=False)


def inside(u: np.ndarray) -> np.ndarray:
    """Where the displacement points to a place well within the volume."""
    places = np.moveaxis(np.indices(u.shape[:3]), 0, -1) + u
    return ((places > 0.1) & (places < np.array(u.shape[:3]) - 1.1)).all(-1)


def by_sitk(array: np.ndarray, affine: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(array.T)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(sizes.tolist())
    image.SetDirection((LPS @ affine[:3, :3] / sizes).ravel().tolist())
    image.SetOrigin((LPS @ affine[:3, 3]).tolist())
    return image


@pytest.mark.parametrize("orientation", DIRECTIONS)
def test_a_warp_and_an_affine_of_itk_are_one_displacement_in_voxels(tmp_path, orientation):
    directions, sizes = DIRECTIONS[orientation]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions @ np.diag(sizes), (20, -7, 11)
    # What ANTs leaves: vectors in LPS mm, and a MATLAB file of x -> M (x - c) + c + t.
    vectors = np.float32(wave() * np.array(sizes))
    image = nib.Nifti1Image(vectors[:, :, :, None], affine)
    image.header.set_intent("vector")
    image.to_filename(tmp_path / "1Warp.nii.gz")
    matrix, centre, shift = np.eye(3) + 0.1 * SKEW + np.diag([0.02, -0.03, 0.01]), np.array([-3.0, 8, 15]), (0.4, 1, -2)
    name = "AffineTransform_float_3_3"
    parameters = np.array([[*matrix.ravel(), *shift]], np.float32).T
    scipy.io.savemat(tmp_path / "0GenericAffine.mat", {name: parameters, "fixed": centre[:, None]}, format="4")

    files = [tmp_path / "1Warp.nii.gz", tmp_path / "0GenericAffine.mat"]
    u = in_voxels(syn.transform(files), Grid(SHAPE, affine), Grid(SHAPE, affine))
    assert u.dtype == np.float32

    linear = sitk.AffineTransform(3)
    linear.SetMatrix(np.float32(matrix).astype(float).ravel().tolist())
    linear.SetTranslation(np.float32(shift).astype(float).tolist()), linear.SetCenter(centre.tolist())
    field = by_sitk(np.zeros(SHAPE, np.float32), affine)
    nested = sitk.GetImageFromArray(vectors.transpose(2, 1, 0, 3).astype(np.float64), isVector=True)
    nested.CopyInformation(field)
    whole = sitk.CompositeTransform([linear, sitk.DisplacementFieldTransform(nested)])
    moving = blobs(1)
    labels = np.uint8(moving * 9)
    moved = sitk.Resample(by_sitk(moving, affine), field, whole, sitk.sitkLinear, 0.0)
    near = sitk.Resample(by_sitk(labels, affine), field, whole, sitk.sitkNearestNeighbor, 0)
    within = inside(u)
    assert within.mean() > 0.5
    np.testing.assert_allclose(warped(moving, u, 1)[within], sitk.GetArrayFromImage(moved).T[within], atol=2e-5)
    differ = np.round(warped(labels, np.round(u * 1e4) / 1e4, 0))[within] != sitk.GetArrayFromImage(near).T[within]
    assert differ.mean() < 1e-3  # at halves


def test_the_name_says_every_setting():
    assert Syn().name == "SyN, mean squares, 160x80x40 iterations, SyN[0.2,3,0]"
    other = Syn("CC", iterations=(10, 5), step=0.1, affine=False, total_smoothing=1.5)
    assert other.name == "SyNOnly, CC radius 4, 10x5 iterations, SyN[0.1,3,1.5]"
    assert Syn("mattes", 32).name.startswith("SyN, Mattes MI 32 bins,")
    with pytest.raises(ValueError, match="CC, meansquares, mattes, not 'ssd'"):
        Syn("ssd")


def test_without_antspy_it_says_what_to_install(monkeypatch):
    imported = builtins.__import__

    def missing(name, *arguments, **keywords):
        if name == "ants":
            raise ImportError("No module named 'ants'")
        return imported(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(BadInput, match=r"pip install 'dilformer-jax\[ants\]'"):
        syn.displacement(blobs(0), blobs(1))


def test_shapes_that_differ_or_are_too_small_are_refused(monkeypatch):
    monkeypatch.setattr(syn, "_ants", lambda: None)
    with pytest.raises(ValueError, match="both lie on one grid"):
        syn.displacement(blobs(0), blobs(1)[1:])
    with pytest.raises(BadInput, match="a.nii.gz is 24x20x9, too small for SyN, which takes 16 voxels"):
        syn.displacement(blobs(0)[:, :, :9], blobs(1)[:, :, :9], names=("a.nii.gz", "b.nii.gz"))


# --- With ANTsPy ---


def shifted() -> tuple[np.ndarray, np.ndarray]:
    """Two images that a smooth displacement makes alike."""
    moving = blobs(3)
    return np.float32(warped(moving, wave(), 1)), moving


@pytest.mark.parametrize("affine", [False, True])
def test_what_it_moves_is_what_ants_moves(monkeypatch, tmp_path, affine):
    ants = pytest.importorskip("ants")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own, found = ants.registration, []

    def recorded(*arguments, **keywords):
        found.append(own(*arguments, **keywords))
        return found[-1]

    monkeypatch.setattr(ants, "registration", recorded)
    fixed, moving = shifted()
    how = Syn(iterations=(20, 6), affine=affine)
    u = syn.displacement(fixed, moving * 1000, SIZES, how)
    assert u.dtype == np.float32 and u.shape == (*fixed.shape, 3)
    assert [*tmp_path.iterdir()] == []
    expected = found[0]["warpedmovout"].numpy()
    scaled = moving.clip(*np.percentile(moving[moving != 0], (0.1, 99.9)))
    scaled = (scaled - scaled.min()) / np.ptp(scaled)
    within = inside(u)
    np.testing.assert_allclose(warped(scaled, u, 1)[within], expected[within], atol=1e-3)
    unlike = lambda a: 1 - np.corrcoef(a[within], fixed[within])[0, 1]
    assert unlike(expected) < 0.7 * unlike(moving)


@pytest.mark.parametrize("orientation", ["LAS anisotropic", "oblique anisotropic LIA"])
def test_ants_files_of_turned_grids_are_applied_as_ants_applies_them(tmp_path: Path, orientation):
    ants = pytest.importorskip("ants")
    directions, sizes = DIRECTIONS[orientation]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions @ np.diag(sizes), (20, -7, 11)
    place = {"spacing": sizes, "direction": LPS @ directions, "origin": tuple(LPS @ affine[:3, 3])}
    fixed, moving = shifted()
    labels = np.float32(np.round(moving * 9))
    images = [ants.from_numpy(array, **place) for array in (fixed, moving, labels)]
    files = ants.registration(*images[:2], "SyN", outprefix=f"{tmp_path}/", reg_iterations=(20, 10))["fwdtransforms"]
    assert len(files) == 2
    grid = Grid(fixed.shape, affine)
    u = in_voxels(syn.transform(files), grid, grid)
    within = inside(u)
    moved = ants.apply_transforms(images[0], images[1], files).numpy()
    np.testing.assert_allclose(warped(moving, u, 1)[within], moved[within], atol=1e-4)
    near = ants.apply_transforms(images[0], images[2], files, "nearestNeighbor").numpy()
    assert (warped(labels, u, 0)[within] != near[within]).mean() < 1e-3
