"""The affine alignment as a displacement: its matrix is given, so that SimpleITK can say what it must do."""

from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from orientations import PAIRS, SKEW, volume
from scipy import ndimage

from dilformer_jax.io.volumes import BadInput, Volume
from dilformer_jax.ops import folding
from dilformer_jax.registration import methods
from dilformer_jax.registration.refine import Refinement

MATRIX = np.eye(4)
MATRIX[:3, :3] += 0.3 * SKEW + np.diag([0.05, -0.03, 0.1])
MATRIX[:3, 3] = 0.4, -0.7, 0.5


@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_an_alignment_is_a_displacement_between_any_two_grids(tmp_path, monkeypatch, here, there):
    fixed, moving = volume(tmp_path / "f.nii", here), volume(tmp_path / "m.nii", there, "moving")
    monkeypatch.setattr(methods, "align", lambda a, b: SimpleNamespace(matrix=MATRIX))
    u = methods.affine().displacement(fixed, moving)
    assert u.shape == (*fixed.array.shape, 3) and u.dtype == np.float32

    flip = np.diag([-1.0, -1, 1, 1])
    lps = flip @ MATRIX @ flip
    transform = sitk.AffineTransform(lps[:3, :3].ravel().tolist(), lps[:3, 3].tolist())
    files = (sitk.ReadImage(str(tmp_path / name)) for name in ("m.nii", "f.nii"))
    expected = sitk.GetArrayFromImage(sitk.Resample(*files, transform, sitk.sitkLinear, -1.0)).T
    places = np.moveaxis(np.indices(u.shape[:3]), 0, -1) + u
    inside = ((places > 0.01) & (places < np.array(moving.array.shape) - 1.01)).all(-1)
    moved = ndimage.map_coordinates(moving.array, np.moveaxis(places, -1, 0), order=1)
    assert inside.mean() > 0.2
    np.testing.assert_allclose(moved[inside], expected[inside], atol=1e-3)


def test_on_one_grid_an_alignment_folds_nothing_and_has_no_spread(monkeypatch):
    monkeypatch.setattr(methods, "align", lambda a, b: SimpleNamespace(matrix=MATRIX))
    image = np.random.default_rng(0).uniform(size=(9, 8, 7)).astype(np.float32)
    sides = np.diag([1, 1.5, 2.0])
    place = np.eye(4)
    place[:3, :3] = sides
    fixed = Volume(image, place, Path("a.nii"), nib.Nifti1Header())
    u = methods.affine().displacement(fixed, fixed)
    linear = np.linalg.inv(sides) @ MATRIX[:3, :3] @ sides
    np.testing.assert_allclose(u[3, 2, 5] - u[0, 0, 0], (linear - np.eye(3)) @ [3, 2, 5], atol=1e-5)
    np.testing.assert_allclose(folding.jacobian_determinant(u), np.linalg.det(MATRIX[:3, :3]), rtol=1e-5)
    assert folding.folding_percent(u) == 0 and folding.sdlogj(u) < 1e-6


def test_what_cannot_be_chosen():
    for name, iterations in (("identity", [40, 20]), ("syn", [40, -1]), ("syn", [0, 0])):
        with pytest.raises(BadInput, match="--syn-iterations is for --method syn"):
            methods.chosen(name, None, None, None, iterations)
    with pytest.raises(BadInput, match="not from --method syn"):
        methods.chosen("syn", None, None, Refinement(5))
    with pytest.raises(BadInput, match="--smoothness is asked of a network, not of --method identity"):
        methods.chosen("identity", None, None, None, smoothness=2.0)
    assert methods.chosen("identity", None, None, Refinement(5)).settings["refinement"]["steps"] == 5
