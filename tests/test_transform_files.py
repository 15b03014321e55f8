"""Transform files of all kinds: told apart by what they hold, written in every form, and refused in a sentence."""

import gzip
import json
import struct

import nibabel as nib
import numpy as np
import pytest
from orientations import PAIRS, SHAPES, volume, voxels_of, wavy
from scipy import ndimage

from dilformer_jax.io import fsl, itk, transforms, voxel_fields
from dilformer_jax.io.geometry import apply_affine
from dilformer_jax.io.transform_files import read_transform, write_transform
from dilformer_jax.io.transforms import carried
from dilformer_jax.io.volumes import BadInput

NAMES = {"itk": "field.nii.gz", "fsl": "f_fsl.nii.gz", "freesurfer": "f.mgz", "voxel": "f_voxel.nii.gz"}


@pytest.fixture
def images(tmp_path):
    return volume(tmp_path / "fixed.nii", "LAS anisotropic"), volume(tmp_path / "moving.nii", "LIA", "moving")


def test_every_form_is_told_from_the_others(images, tmp_path):
    fixed, moving = images
    points = apply_affine(fixed.affine, voxels_of(SHAPES["fixed"]))
    for form, name in NAMES.items():
        transform = wavy(len(form))
        assert write_transform(tmp_path / name, transform, form, fixed, moving) == ""
        # By what they hold: a name that says nothing does as well.
        (tmp_path / f"a_{form}").mkdir()
        plain = tmp_path / f"a_{form}" / ("x.mgz" if form == "freesurfer" else "x.nii.gz")
        (tmp_path / name).rename(plain)
        if form == "voxel":
            (tmp_path / "f_voxel.json").rename(plain.with_name("x.json"))
        found = carried(points, read_transform(plain, fixed, moving))
        np.testing.assert_allclose(found, carried(points, transform), atol=1e-3, err_msg=form)


def test_affines_are_told_apart(images, tmp_path):
    fixed, moving = images
    matrix = wavy(5)[1]
    itk.write_affine(tmp_path / "itk", matrix)
    fsl.write_flirt(tmp_path / "flirt", matrix, fixed, moving)
    place = "valid = 0\nfilename = x\nvolume = 4 4 4\nvoxelsize = 1 1 1\nxras = 1 0 0\nyras = 0 1 0\nzras = 0 0 1\n"
    rows = "".join(" ".join(map(str, row)) + "\n" for row in np.linalg.inv(matrix).tolist())
    (tmp_path / "lta").write_text(
        f"type = 1\nnxforms = 1\nmean = 0 0 0\nsigma = 1\n1 4 4\n{rows}src volume info\n{place}cras = 0 0 0\n"
        f"dst volume info\n{place}cras = 0 0 0\n"
    )
    for name in ("itk", "flirt", "lta"):
        (found,) = read_transform(tmp_path / name, fixed, moving)
        np.testing.assert_allclose(found, matrix, atol=1e-6, err_msg=name)


def test_a_voxel_array_is_an_index_into_the_moving_array(tmp_path):
    for fixed_grid, moving_grid in PAIRS:
        fixed = volume(tmp_path / "fixed.nii", fixed_grid)
        moving = volume(tmp_path / "moving.nii", moving_grid, "moving")
        transform = wavy(7)
        voxel_fields.write_field(tmp_path / "u_voxel.nii.gz", transform, fixed, moving)
        u = np.asarray(nib.load(tmp_path / "u_voxel.nii.gz").dataobj)
        assert u.dtype == np.float32 and u.shape == (*SHAPES["fixed"], 3)
        # What its JSON file says, by hand.
        index = np.moveaxis(np.indices(SHAPES["fixed"]), 0, -1) + u
        by_hand = ndimage.map_coordinates(moving.array, np.moveaxis(index, -1, 0), order=1, mode="nearest")
        points = apply_affine(fixed.affine, voxels_of(SHAPES["fixed"]))
        places = apply_affine(np.linalg.inv(moving.affine), carried(points, transform)).T
        expected = ndimage.map_coordinates(moving.array, places, order=1, mode="nearest")
        np.testing.assert_allclose(by_hand.ravel(), expected, atol=1e-3)
        told = json.loads((tmp_path / "u_voxel.json").read_text())
        assert (told["units"], told["maps"], told["vector_axis"]) == ("voxels", "fixed->moving", -1)
        assert told["affine_included"] is True and told["moving"]["shape"] == [*SHAPES["moving"]]
        np.testing.assert_allclose(told["fixed"]["affine"], fixed.affine)


def test_files_that_are_no_transform(images, tmp_path):
    fixed, moving = images
    write_transform(tmp_path / "v.nii", wavy(), "voxel", fixed, moving)
    write_transform(tmp_path / "fsl.nii", wavy(), "fsl", fixed, moving)
    content = (tmp_path / "v.nii").read_bytes()
    (tmp_path / "alone.nii").write_bytes(content)
    told = json.loads((tmp_path / "v.json").read_text())
    for name, changed in (
        ("units", told | {"units": "mm"}),
        ("shape", told | {"fixed": told["fixed"] | {"shape": [9, 8, 8]}}),
        ("flat", told | {"moving": {"affine": [[0] * 4] * 4}}),
        ("short", {"units": "voxels"}),
    ):
        (tmp_path / f"{name}.nii").write_bytes(content)
        (tmp_path / f"{name}.json").write_text(json.dumps(changed))
    (tmp_path / "m3z").write_bytes(gzip.compress(struct.pack(">f5i", 1, 4, 4, 4, 1, 0)))
    (tmp_path / "c.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(40))
    (tmp_path / "words.txt").write_text("no transform\n")
    (tmp_path / "empty").touch()
    (tmp_path / "cut.nii.gz").write_bytes(gzip.compress(content)[:200])
    nib.MGHImage(fixed.array, fixed.affine).to_filename(tmp_path / "image.mgz")
    for name, found in (
        ("none.nii.gz", "does not exist"),
        ("alone.nii", "three numbers a voxel and intent code 0"),
        ("units.json", "tells of .*'mm'"),
        ("shape.nii", r"\(9, 8, 7, 3\) where shape.json says \(9, 8, 8, 3\)"),
        ("flat.json", "does not describe flat.nii"),
        ("short.json", "does not describe short.nii"),
        ("fixed.nii", "no ITK displacement field"),
        ("m3z", "m3z morph"),
        ("c.h5", "CompositeTransformUtil"),
        ("words.txt", "no transform that is known here"),
        ("empty", "no transform that is known here"),
        ("cut.nii.gz", "corrupt, truncated"),
        ("image.mgz", "version 1"),
    ):
        path = tmp_path / name
        with pytest.raises(BadInput, match=rf"{name} .*{found}.*\.$"):
            read_transform(path.with_suffix(".nii") if name.endswith(".json") else path, fixed, moving)
    with pytest.raises(BadInput, match="give that with --moving"):
        read_transform(tmp_path / "fsl.nii")


def test_no_form_but_these_and_none_that_reads_back_otherwise(images, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'spm'"):
        write_transform(tmp_path / "f.nii", wavy(), "spm", *images)
    monkeypatch.setattr(transforms, "CHECK_TOLERANCE", -1.0)
    before = sorted(tmp_path.iterdir())
    for form, name in NAMES.items():
        with pytest.raises(RuntimeError, match=f"{name} reads back"):
            write_transform(tmp_path / name, wavy(), form, *images)
    assert sorted(tmp_path.iterdir()) == before
