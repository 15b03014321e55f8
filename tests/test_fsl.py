"""FSL's warps and matrices, against fslpy, FSL's own package, and nitransforms."""

import nibabel as nib
import numpy as np
import pytest
from orientations import PAIRS, SHAPES, volume, voxels_of, wavy

from dilformer_jax.io import fsl
from dilformer_jax.io.geometry import apply_affine, orientation
from dilformer_jax.io.transforms import carried
from dilformer_jax.io.volumes import BadInput


@pytest.fixture
def pair(request, tmp_path):
    fixed, moving = request.param
    return volume(tmp_path / "fixed.nii.gz", fixed), volume(tmp_path / "moving.nii.gz", moving, "moving")


@pytest.mark.parametrize("pair", PAIRS, indirect=True)
def test_fslpy_takes_points_where_the_transform_does(pair, tmp_path):
    image = pytest.importorskip("fsl.data.image", reason="fslpy is not installed")
    from fsl.transform import fnirt, nonlinear

    fixed, moving = pair
    alike = orientation(fixed.affine) == orientation(moving.affine)  # only then do absolute warps look it
    transform = wavy(1)
    fsl.write_warp(tmp_path / "warp.nii.gz", transform, fixed, moving)
    source, target = (image.Image(str(volume.path)) for volume in (moving, fixed))
    points = apply_affine(fixed.affine, voxels_of(SHAPES["fixed"]))
    expected = carried(points, transform)
    found = fnirt.readFnirt(str(tmp_path / "warp.nii.gz"), source, target, defType="relative")
    np.testing.assert_allclose(found.transform(points, "world", "world"), expected, atol=1e-4)
    # Both kinds are read, as FSL writes them, without being told which they are.
    for field in (found.data, nonlinear.convertDeformationType(found, "absolute"))[: 1 + alike]:
        written = nib.Nifti1Image(np.asarray(field, np.float32), fixed.affine)
        written.set_qform(fixed.affine, 1)
        written.header["intent_code"] = 2006
        written.to_filename(tmp_path / "theirs.nii.gz")
        theirs = carried(points, (fsl.read_warp(tmp_path / "theirs.nii.gz", moving),))
        np.testing.assert_allclose(theirs, expected, atol=1e-4)


@pytest.mark.parametrize("pair", PAIRS, indirect=True)
def test_nitransforms_reads_our_matrix_and_writes_the_same(pair, tmp_path):
    linear = pytest.importorskip("nitransforms.io.fsl", reason="nitransforms is not installed")
    fixed, moving = pair
    matrix = wavy(2)[1]
    fsl.write_flirt(tmp_path / "affine.mat", matrix, fixed, moving)
    images = {"reference": nib.load(fixed.path), "moving": nib.load(moving.path)}
    theirs = linear.FSLLinearTransform.from_ras(matrix, **images)
    np.testing.assert_allclose(np.loadtxt(tmp_path / "affine.mat"), theirs["parameters"], atol=1e-5)
    np.testing.assert_allclose(fsl.read_flirt(tmp_path / "affine.mat", fixed, moving), matrix, atol=1e-9)


def test_one_voxel_along_each_axis_of_a_neurological_image(tmp_path):
    """FSL mm run against the first axis of RAS storage."""
    fixed = volume(tmp_path / "fixed.nii", "RAS")
    matrix = np.eye(4)
    matrix[:3, 3] = (2, 4, -6)
    fsl.write_warp(tmp_path / "warp.nii", (matrix,), fixed, fixed)
    warp = nib.load(tmp_path / "warp.nii")
    assert warp.shape == (*SHAPES["fixed"], 3) and warp.get_data_dtype() == np.float32
    assert (warp.header["intent_code"], warp.header["sform_code"], warp.header["qform_code"]) == (2006, 1, 1)
    np.testing.assert_allclose(warp.affine, fixed.affine)
    np.testing.assert_allclose(np.asarray(warp.dataobj), np.broadcast_to([-2, 4, -6], warp.shape), atol=1e-5)


def test_a_sheared_grid_is_no_obstacle(tmp_path):
    fixed, moving = volume(tmp_path / "fixed.nii", "RAS"), volume(tmp_path / "moving.nii", "LIA", "moving")
    sheared = fixed.affine @ [[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    nifti = nib.Nifti1Image(fixed.array, sheared)
    nifti.set_sform(sheared, 1), nifti.set_qform(None, 0)
    fixed = type(fixed)(fixed.array, sheared, fixed.path, nifti.header)
    fsl.write_warp(tmp_path / "warp.nii", wavy(), fixed, moving)
    np.testing.assert_allclose(nib.load(tmp_path / "warp.nii").affine, sheared, atol=1e-6)


def test_refused_files(tmp_path, monkeypatch):
    fixed = volume(tmp_path / "fixed.nii", "RAS")
    fsl.write_warp(tmp_path / "warp.nii", wavy(), fixed, fixed)
    good = nib.load(tmp_path / "warp.nii")
    vectors = np.asarray(good.dataobj).copy()
    vectors[0, 0, 0] = np.nan
    nib.Nifti1Image(vectors, None, good.header).to_filename(tmp_path / "nan.nii")
    good.header["intent_code"] = 2007
    nib.Nifti1Image(np.asarray(good.dataobj), None, good.header).to_filename(tmp_path / "coefficients.nii")
    for name, moving, found in (
        ("fixed.nii", fixed, r"\(9, 8, 7\) and intent code 0 and is no FSL warp"),
        ("coefficients.nii", fixed, "coefficients, no field"),
        ("nan.nii", fixed, "3 NaN"),
        ("warp.nii", None, "moving image's header; give that with --moving"),
    ):
        with pytest.raises(BadInput, match=rf"{name} .*{found}.*\.$"):
            fsl.read_warp(tmp_path / name, moving)
    for text, found in (("1 2 3", "3 numbers"), (" 0" * 16, "no affine map"), ("1 x", "'1 x'")):
        (tmp_path / "a.mat").write_text(text)
        with pytest.raises(BadInput, match=rf"a.mat .*{found}.*; .*\.$"):
            fsl.read_flirt(tmp_path / "a.mat", fixed, fixed)
    np.savetxt(tmp_path / "a.mat", np.eye(4))
    with pytest.raises(BadInput, match="both images; give the missing ones with --fixed and --moving"):
        fsl.read_flirt(tmp_path / "a.mat", None, None)
    # A warp that reads back as another is never named.
    real = fsl.read_warp
    shifted = lambda path, moving: type(f := real(path, moving))(f.displacement + np.float32(0.1), f.affine)
    monkeypatch.setattr(fsl, "read_warp", shifted)
    with pytest.raises(RuntimeError, match="new.nii reads back"):
        fsl.write_warp(tmp_path / "new.nii", wavy(), fixed, fixed)
    assert not list(tmp_path.glob("*new*"))
