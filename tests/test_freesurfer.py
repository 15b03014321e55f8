"""FreeSurfer's warps, against nibabel's reader of its volumes, and LTAs as nitransforms writes them."""

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest
from orientations import PAIRS, SHAPES, volume, voxels_of, wavy

from dilformer_jax.io import freesurfer
from dilformer_jax.io.geometry import apply_affine
from dilformer_jax.io.transforms import Grid, carried
from dilformer_jax.io.volumes import BadInput


def as_nibabel_sees(path) -> tuple[np.ndarray, np.ndarray, bytes]:
    """Voxels, affine and what is behind them, of a warp that is made a plain volume by its version number."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    assert content[:4] == bytes([0, 0, 3, 1])  # intent 3, version 1
    content[:4] = bytes([0, 0, 0, 1])
    image = nib.MGHImage.from_bytes(bytes(content))
    return np.asarray(image.dataobj), image.affine, bytes(content[284 + 4 * np.prod(image.shape) + 20 :])


@pytest.fixture
def pair(request, tmp_path):
    fixed, moving = request.param
    return volume(tmp_path / "fixed.nii.gz", fixed), volume(tmp_path / "moving.nii.gz", moving, "moving")


@pytest.mark.parametrize("pair", PAIRS, indirect=True)
def test_the_warp_is_a_displacement_in_ras_mm(pair, tmp_path):
    fixed, moving = pair
    transform = wavy(1)
    assert freesurfer.write_warp(tmp_path / "warp.mgz", transform, fixed, moving) == ""
    vectors, affine, tags = as_nibabel_sees(tmp_path / "warp.mgz")
    points = apply_affine(affine, voxels_of(SHAPES["fixed"]))
    np.testing.assert_allclose(points, apply_affine(fixed.affine, voxels_of(SHAPES["fixed"])), atol=1e-4)
    np.testing.assert_allclose(points + vectors.reshape(-1, 3), carried(points, transform), atol=1e-4)
    # The tags: both grids, then 'disp-ras', spacing 1.
    assert struct.unpack_from(">i", tags) == (10,)
    for number, (image, shape) in enumerate(((moving, SHAPES["moving"]), (fixed, SHAPES["fixed"]))):
        words = struct.unpack_from(">4i15f", tags, 4 + 588 * number)
        assert words[:4] == (1, *shape)
        header = nib.freesurfer.mghformat.MGHHeader()
        header.set_data_shape(shape)
        header["delta"], header["Mdc"], header["Pxyz_c"] = words[4:7], np.reshape(words[7:16], (3, 3)), words[16:]
        np.testing.assert_allclose(header.get_affine(), image.affine, atol=1e-4)
    assert struct.unpack_from(">iqiif", tags, 4 + 2 * 588) == (13, 12, 3, 1, 0.0)
    np.testing.assert_allclose(
        carried(points, (freesurfer.read_warp(tmp_path / "warp.mgz"),)), carried(points, transform), atol=1e-4
    )


def test_all_four_kinds_are_read(tmp_path):
    fixed, moving = volume(tmp_path / "f.nii", "LIA"), volume(tmp_path / "m.nii", "oblique anisotropic", "moving")
    transform = wavy(3)
    freesurfer.write_warp(tmp_path / "warp.mgz", transform, fixed, moving)
    content = gzip.decompress((tmp_path / "warp.mgz").read_bytes())
    voxels = voxels_of(SHAPES["fixed"])
    points = apply_affine(fixed.affine, voxels)
    ends = carried(points, transform)
    indices = apply_affine(np.linalg.inv(moving.affine), ends)
    for kind, values in enumerate((indices, indices - voxels, ends, ends - points)):
        numbers = values.reshape(*SHAPES["fixed"], 3).astype(">f4").tobytes("F")
        meta = struct.pack(">iqiif", 13, 12, kind, 1, 0)
        (tmp_path / "w.mgz").write_bytes(
            gzip.compress(content[:284] + numbers + content[284 + len(numbers) : -len(meta)] + meta)
        )
        found = carried(points, (freesurfer.read_warp(tmp_path / "w.mgz"),))
        np.testing.assert_allclose(found, ends, atol=1e-3, err_msg=freesurfer.FRAMES[kind])


def test_sheared_grids_get_a_sentence(tmp_path):
    grid = Grid(SHAPES["fixed"], volume(tmp_path / "f.nii", "RAS").affine)
    sheared = Grid(grid.shape, grid.affine @ [[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert "the grid is sheared" in freesurfer.write_warp(tmp_path / "w.mgz", wavy(), sheared, grid)
    assert "the moving image is sheared" in freesurfer.write_warp(tmp_path / "w.mgz", wavy(), grid, sheared)


def test_warps_that_are_none(tmp_path):
    fixed = volume(tmp_path / "f.nii", "RAS")
    freesurfer.write_warp(tmp_path / "warp.mgz", wavy(), fixed, fixed)
    content = gzip.decompress((tmp_path / "warp.mgz").read_bytes())
    nan = content[:284] + struct.pack(">f", np.nan) + content[288:]
    for changed, found in (
        (content[:20], "cut short"),
        (content[:900], "cut short, or does not say"),
        (content[:-24], "does not say what its vectors are"),
        (bytes([0, 0, 0, 1]) + content[4:], "version 1"),
        (nan, "1 NaN"),
    ):
        (tmp_path / "bad.mgz").write_bytes(gzip.compress(changed))
        with pytest.raises(BadInput, match=rf"bad.mgz .*{found}.*; .*\.$"):
            freesurfer.read_warp(tmp_path / "bad.mgz")
    (tmp_path / "bad.mgz").write_bytes((tmp_path / "warp.mgz").read_bytes()[:300])
    with pytest.raises(BadInput, match=r"bad.mgz cannot be read or is cut short"):
        freesurfer.read_warp(tmp_path / "bad.mgz")
    with pytest.raises(BadInput, match=r"warp.nii is no name for a FreeSurfer warp; .*\.mgz\.$"):
        freesurfer.write_warp(tmp_path / "warp.nii", wavy(), fixed, fixed)
    assert not (tmp_path / "warp.nii").exists()


@pytest.mark.parametrize("kind", [0, 1])
def test_ltas_of_nitransforms_are_read(tmp_path, kind):
    lta = pytest.importorskip("nitransforms.io.lta", reason="nitransforms is not installed")
    fixed = volume(tmp_path / "fixed.nii", "oblique anisotropic LIA")
    moving = volume(tmp_path / "moving.nii", "LAS anisotropic", "moving")
    to_fixed = wavy(4)[1]  # an LTA takes the moving image's points to the fixed image's
    written = lta.FSLinearTransform()
    matrix = to_fixed if kind == 1 else np.linalg.inv(fixed.affine) @ to_fixed @ moving.affine
    written["type"], written["m_L"] = kind, matrix
    written["src"] = lta.VolumeGeometry.from_image(nib.load(moving.path)).structarr
    written["dst"] = lta.VolumeGeometry.from_image(nib.load(fixed.path)).structarr
    array = lta.FSLinearTransformArray()
    array["type"] = kind
    array.xforms = [written]
    (tmp_path / "affine.lta").write_text(array.to_string())
    np.testing.assert_allclose(freesurfer.read_lta(tmp_path / "affine.lta"), np.linalg.inv(to_fixed), atol=1e-5)


def test_an_lta_by_hand_and_ltas_that_are_none(tmp_path):
    """mri_vol2vol's words for: the moving image's points lie 5 mm farther right in the fixed image."""
    place = "valid = 1\nfilename = x.mgz\nvolume = 4 4 4\nvoxelsize = 1 1 1\nxras = 1 0 0\nyras = 0 1 0\nzras = 0 0 1\n"
    text = (
        "# transform file\ntype      = 1 # LINEAR_RAS_TO_RAS\nnxforms   = 1\nmean      = 0 0 0\nsigma     = 1\n1 4 4\n"
        "1 0 0 5\n0 1 0 0\n0 0 1 0\n0 0 0 1\n"
        f"src volume info\n{place}cras = 0 0 0\ndst volume info\n{place}cras = 0 0 0\nsubject fsaverage\nfscale 0.15\n"
    )
    path = tmp_path / "affine.lta"
    path.write_text(text)
    np.testing.assert_allclose(apply_affine(freesurfer.read_lta(path), np.array([10.0, 0, 0])), [5, 0, 0])
    for changed, found in (
        (text.replace("= 1 # L", "= 14 # L"), "type 14"),
        (text.replace("nxforms   = 1", "nxforms   = 2"), "2 transforms"),
        (text.replace("= 1 # L", "= 0 # L").replace("valid = 1", "valid = 0"), "says not of which images"),
        (text[:120], "cut short"),
        (text.replace("1 0 0 5", "1 0 x 5"), "'1 0 x 5"),
        (text.replace("1 0 0 5", "0 0 0 5"), "no affine map"),
        (text.replace("volume = 4 4 4", "volume = 4 4"), "cut short or no LTA"),
    ):
        path.write_text(changed)
        with pytest.raises(BadInput, match=rf"affine.lta .*{found}.*; .*\.$"):
            freesurfer.read_lta(path)
