"""The command apply: images, labels and series through transforms and chains of them, against SimpleITK."""

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nifti_files import save
from orientations import SHAPES, volume, wavy
from scipy import ndimage

from dilformer_jax import apply
from dilformer_jax.io import itk, transform_files
from dilformer_jax.io.transforms import Grid


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A pair, its transform as an ITK field and an affine, and the same as one field in every form."""
    folder = tmp_path_factory.mktemp("apply")
    smooth = ndimage.gaussian_filter(np.random.default_rng(3).uniform(0, 900, SHAPES["moving"]), 1).astype(np.float32)
    fixed = volume(folder / "fixed.nii.gz", "LAS anisotropic")
    moving = volume(folder / "moving.nii.gz", "oblique anisotropic LIA", "moving", smooth)
    field, matrix = wavy(1)
    itk.write_field(folder / "warp.nii.gz", (field,), Grid(field.displacement.shape[:3], field.affine))
    itk.write_affine(folder / "affine.txt", matrix)
    names = {"itk": "all.nii.gz", "fsl": "all_fsl.nii.gz", "freesurfer": "all.mgz", "voxel": "all_voxel.nii.gz"}
    for form, name in names.items():
        transform_files.write_transform(folder / name, (field, matrix), form, fixed, moving)
    labels = (np.arange(smooth.size).reshape(smooth.shape) // 60 % 5).astype(np.int64)
    ids = np.array([0, 614454277, 2**31 + 5, 16777217, 7])  # float32 would change the second and the fourth
    save(folder / "labels_u4.nii.gz", ids[labels].astype(np.uint32), moving.affine)
    save(folder / "labels_i8.nii.gz", np.where(labels == 1, 2**53 + 1, -ids[labels]), moving.affine)
    save(folder / "labels_i2.nii.gz", labels.astype(np.int16), moving.affine)
    return folder


def run(folder: Path, output: Path, *words: str) -> None:
    """The command, its words that name files in the folder completed."""
    known = lambda word: str(folder / word) if (folder / word.split(",")[0]).is_file() and word else word
    apply.main(["apply", *map(known, words), "--output", str(output)])


def by_simpleitk(folder: Path, image: str, grid: str, *transforms: sitk.Transform, kind=sitk.sitkLinear) -> np.ndarray:
    """Transforms as apply lists them: a point goes through the first of them first."""
    chain = sitk.CompositeTransform(3)
    for transform in reversed(transforms):
        chain.AddTransform(transform)
    images = [sitk.ReadImage(str(folder / name)) for name in (image, grid)]
    return sitk.GetArrayFromImage(sitk.Resample(*images, chain, kind, 0.0)).T


def warp(folder: Path, name: str = "warp.nii.gz") -> sitk.Transform:
    return sitk.DisplacementFieldTransform(sitk.ReadImage(str(folder / name), sitk.sitkVectorFloat64))


def values(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def agree(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-2, share: float = 0.99) -> None:
    """But for rounding at the faces, where one side may see the image and the other not."""
    assert found.shape == expected.shape and np.ptp(expected) > 100
    assert (np.abs(found - expected) < tolerance * 100).mean() > share
    assert 0.02 < (expected == 0).mean() < 0.8


def test_a_chain_is_followed_in_order_and_sampled_once(folder, tmp_path):
    grid = ("--reference", "fixed.nii.gz")
    run(folder, tmp_path / "out.nii.gz", "--transform", "warp.nii.gz", "affine.txt", "--image", "moving.nii.gz", *grid)
    affine = sitk.ReadTransform(str(folder / "affine.txt"))
    expected = by_simpleitk(folder, "moving.nii.gz", "fixed.nii.gz", warp(folder), affine)
    agree(values(tmp_path / "out.nii.gz"), expected)
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii.gz").affine, nib.load(folder / "fixed.nii.gz").affine)
    run(folder, tmp_path / "new.nii.gz", "--transform", "affine.txt", "warp.nii.gz", "--image", "moving.nii.gz", *grid)
    agree(values(tmp_path / "new.nii.gz"), by_simpleitk(folder, "moving.nii.gz", "fixed.nii.gz", affine, warp(folder)))
    assert np.abs(values(tmp_path / "new.nii.gz") - expected).max() > 5  # the order matters


def test_every_form_moves_the_image_alike(folder, tmp_path):
    expected = by_simpleitk(folder, "moving.nii.gz", "fixed.nii.gz", warp(folder, "all.nii.gz"))
    for name in ("all.nii.gz", "all_fsl.nii.gz", "all.mgz", "all_voxel.nii.gz"):
        grid = ("--fixed", "fixed.nii.gz")
        run(folder, tmp_path / "out.nii.gz", "--transform", name, "--image", "moving.nii.gz", *grid)
        agree(values(tmp_path / "out.nii.gz"), expected)


def test_the_inverse_of_a_chain_and_of_a_link(folder, tmp_path, capsys):
    """Against SimpleITK's inverse of the field, found on a fine grid."""
    affine = sitk.ReadTransform(str(folder / "affine.txt")).GetInverse()
    fine = sitk.ReadImage(str(folder / "warp.nii.gz"), sitk.sitkVectorFloat64)
    inverter = sitk.InvertDisplacementFieldImageFilter()
    inverter.SetMaximumNumberOfIterations(100), inverter.SetMeanErrorToleranceThreshold(1e-6)
    inverter.SetMaxErrorToleranceThreshold(1e-5), inverter.SetEnforceBoundaryCondition(False)
    back = sitk.DisplacementFieldTransform(inverter.Execute(fine))
    chain = ("--transform", "warp.nii.gz", "affine.txt")
    words = ("--image", "fixed.nii.gz", "--moving", "moving.nii.gz")
    run(folder, tmp_path / "out.nii.gz", *chain, "--inverse", *words)
    # Linear between the voxels of the inverse, theirs is not exact there.
    found, expected = (
        values(tmp_path / "out.nii.gz"),
        by_simpleitk(folder, "fixed.nii.gz", "moving.nii.gz", affine, back),
    )
    inside = (found != 0) & (expected != 0)
    assert inside.mean() > 0.1 and np.abs(found - expected)[inside].mean() < 0.15 < 1 < np.ptp(expected)
    # The same, link by link, as ANTs writes it.
    links = ("--transform", f"[{folder / 'affine.txt'},1]", f"[{folder / 'warp.nii.gz'},1]")
    run(folder, tmp_path / "links.nii.gz", *links, "--image", "fixed.nii.gz", "--reference", "moving.nii.gz")
    np.testing.assert_array_equal(values(tmp_path / "links.nii.gz"), found)
    told = capsys.readouterr().out
    assert "no inverse" not in told and f"Written to {tmp_path / 'links.nii.gz'}" in told
    # Where a field tears there is none.
    u = np.zeros((*SHAPES["fixed"], 3), np.float32)
    u[5:, ..., 0] = 90
    transform_files.write_transform(
        tmp_path / "torn.nii.gz",
        (itk.Field(u, nib.load(folder / "fixed.nii.gz").affine),),
        "itk",
        *(volume(tmp_path / f"{name}.nii", "LAS anisotropic") for name in "ab"),
    )
    run(folder, tmp_path / "torn_out.nii.gz", "--transform", str(tmp_path / "torn.nii.gz"), "--inverse", *words)
    assert "have no inverse that was found to 0.01 voxels" in capsys.readouterr().out


def test_fsl_by_the_header_at_the_other_end(folder, tmp_path):
    """Without --moving: that is the image that is moved, or where it is moved to."""
    field = ("--transform", "all.nii.gz", "--inverse", "--image", "fixed.nii.gz", "--reference", "moving.nii.gz")
    run(folder, tmp_path / "itk.nii.gz", *field)
    run(folder, tmp_path / "fsl.nii.gz", *("all_fsl.nii.gz" if word == "all.nii.gz" else word for word in field))
    link = f"[{folder / 'all_fsl.nii.gz'},1]"
    run(
        folder, tmp_path / "link.nii.gz", "--transform", link, "--image", "fixed.nii.gz", "--reference", "moving.nii.gz"
    )
    for name in ("fsl", "link"):
        agree(values(tmp_path / f"{name}.nii.gz") * 100, values(tmp_path / "itk.nii.gz") * 100)


@pytest.mark.parametrize("kind", ["nearest", "argmax"])
def test_labels_keep_their_ids_and_type(folder, tmp_path, kind):
    names = [f"labels_{name}.nii.gz" for name in ("u4", "i8", "i2")]
    words = ("--transform", "all.nii.gz", "--labels", *names, "--reference", "fixed.nii.gz", "--interpolation", kind)
    run(folder, tmp_path / "out", *words)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    maps = [values(tmp_path / "out" / name) for name in names]
    for name, array in zip(names, maps, strict=True):
        before = values(folder / name)
        assert array.dtype == before.dtype and set(np.unique(array)) == {0, *np.unique(before)}
        np.testing.assert_array_equal(array != 0, maps[2] != 0)
    assert len(np.unique(np.stack(maps), axis=1).T) >= 5
    if kind == "nearest":
        expected = by_simpleitk(
            folder, names[2], "fixed.nii.gz", warp(folder, "all.nii.gz"), kind=sitk.sitkNearestNeighbor
        )
        assert (maps[2] == expected).mean() > 0.99
    else:
        shares = []
        for label in range(5):
            save(
                tmp_path / "one.nii.gz",
                (values(folder / names[2]) == label).astype(np.float32),
                nib.load(folder / names[2]).affine,
            )
            shares.append(
                by_simpleitk(tmp_path, "one.nii.gz", str(folder / "fixed.nii.gz"), warp(folder, "all.nii.gz"))
            )
        inside = np.sum(shares, axis=0) > 0.999
        assert (maps[2] == np.argmax(shares, axis=0))[inside].mean() > 0.99


def test_series_are_moved_frame_by_frame(folder, tmp_path):
    moving = nib.load(folder / "moving.nii.gz")
    frames = np.stack([np.asarray(moving.dataobj) * scale for scale in (1, 2, 0.5)], -1).astype(np.float32)
    image = nib.Nifti1Image(frames, moving.affine)
    image.set_qform(moving.affine, 1)
    image.header["pixdim"][4], image.header["toffset"] = 2.5, 7
    image.header.set_xyzt_units("mm", "sec")
    image.to_filename(tmp_path / "bold.nii.gz")
    words = ("--transform", "all.nii.gz", "--reference", "fixed.nii.gz", "--interpolation", "cubic")
    run(folder, tmp_path / "out", *words, "--image", str(tmp_path / "bold.nii.gz"), "moving.nii.gz")
    moved, single = nib.load(tmp_path / "out" / "bold.nii.gz"), values(tmp_path / "out" / "moving.nii.gz")
    assert moved.shape == (*SHAPES["fixed"], 3) and moved.get_data_dtype() == np.float32
    assert moved.header["pixdim"][4] == 2.5 and moved.header["toffset"] == 7
    assert moved.header.get_xyzt_units() == ("mm", "sec")
    for frame, scale in enumerate((1, 2, 0.5)):
        np.testing.assert_allclose(np.asarray(moved.dataobj)[..., frame], scale * single, rtol=1e-4, atol=1e-2)
    # Beyond the outer voxels' centres SimpleITK's B-spline goes on mirrored, ours with the border's value: 7 %.
    expected = by_simpleitk(folder, "moving.nii.gz", "fixed.nii.gz", warp(folder, "all.nii.gz"), kind=sitk.sitkBSpline)
    agree(single, expected, 1e-2, 0.92)
    run(folder, tmp_path / "one.nii.gz", *words, "--image", str(tmp_path / "bold.nii.gz"), "--frame", "1")
    np.testing.assert_allclose(values(tmp_path / "one.nii.gz"), 2 * single, rtol=1e-4, atol=1e-2)
    # A series has a grid to write on, too.
    words = (
        "--transform",
        "all.nii.gz",
        "--inverse",
        "--image",
        "fixed.nii.gz",
        "--reference",
        str(tmp_path / "bold.nii.gz"),
    )
    run(folder, tmp_path / "back.nii.gz", *words)
    assert nib.load(tmp_path / "back.nii.gz").shape == SHAPES["moving"]


def test_what_is_not_seen_is_said_and_background_is_kept(folder, tmp_path, capsys):
    moving = nib.load(folder / "moving.nii.gz")
    save(tmp_path / "ct.nii.gz", np.asarray(moving.dataobj) - 1000, moving.affine)
    far = moving.affine.copy()
    far[0, 3] += 900
    save(tmp_path / "far.nii.gz", np.asarray(moving.dataobj), far)
    words = ("--transform", "all.nii.gz", "--reference", "fixed.nii.gz", "--image")
    run(folder, tmp_path / "out", *words, str(tmp_path / "ct.nii.gz"), str(tmp_path / "far.nii.gz"))
    assert "far.nii.gz lies nowhere on the output's grid" in capsys.readouterr().out
    least = np.asarray(moving.dataobj).min() - 1000
    assert (
        values(tmp_path / "out" / "ct.nii.gz")[0, 0, 0] == pytest.approx(least)
        and not values(tmp_path / "out" / "far.nii.gz").any()
    )


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--image moving.nii.gz", "dilformer apply: .*--transform.*; see"),
        ("--transform all.nii.gz --reference fixed.nii.gz", "Nothing to apply the transform to; give --image"),
        ("--transform all.nii.gz --image moving.nii.gz", "grid to write on is missing; give .*--reference, or --fixed"),
        ("--transform all.nii.gz --inverse --image fixed.nii.gz", "--reference, or --moving"),
        ("--transform none.nii.gz --image moving.nii.gz --reference fixed.nii.gz", "none.nii.gz does not exist; "),
        ("--transform all.nii.gz --image none.nii.gz --reference fixed.nii.gz", "none.nii.gz does not exist; "),
        ("--transform all.nii.gz --image moving.nii.gz --reference none.nii.gz", "none.nii.gz does not exist; "),
        ("--transform fixed.nii.gz --image moving.nii.gz --reference fixed.nii.gz", "no ITK displacement field"),
        (
            "--transform all_fsl.nii.gz affine.txt --image moving.nii.gz --reference fixed.nii.gz",
            "give that with --mov",
        ),
        ("--transform all.nii.gz --labels moving.nii.gz --reference fixed.nii.gz", "no label map; give whole-number"),
        ("--transform all.nii.gz --image nan.nii.gz --reference fixed.nii.gz", "2 NaN or infinite voxels; give --nan"),
        ("--transform all.nii.gz --image cut.nii.gz --reference fixed.nii.gz", "cut.nii.gz is corrupt, truncated"),
        (
            "--transform all.nii.gz --image moving.nii.gz moving.nii.gz --reference fixed.nii.gz",
            "another of its name|one file for 2 inputs",
        ),
        (
            "--transform all.nii.gz --image moving.nii.gz --interpolation argmax --reference fixed.nii.gz",
            "give --labels",
        ),
        (
            "--transform all.nii.gz --labels labels_i2.nii.gz --interpolation cubic --reference fixed.nii.gz",
            "is for im",
        ),
        ("--transform all.nii.gz --image moving.nii.gz --reference fixed.nii.gz --space RAS", "--space is for points"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_leaves_nothing(folder, tmp_path, capsys, words, found):
    holes = np.asarray(nib.load(folder / "moving.nii.gz").dataobj).copy()
    holes[1, 1, :2] = np.nan
    save(folder / "nan.nii.gz", holes)
    (folder / "cut.nii.gz").write_bytes((folder / "moving.nii.gz").read_bytes()[:300])
    for output in (tmp_path / "out.nii.gz", tmp_path / "new" / "folder"):
        with pytest.raises(SystemExit) as end:
            run(folder, output, *words.split())
        told = capsys.readouterr().err
        assert end.value.code == 2 and told.count("\n") == 1
        assert re.search(found, told), told
        assert not list(tmp_path.iterdir())


def test_outputs_are_not_confused_with_inputs(folder, tmp_path, capsys):
    content = (folder / "moving.nii.gz").read_bytes()
    (tmp_path / "moving.nii.gz").write_bytes(content)
    words = ["--transform", "all.nii.gz", "--reference", "fixed.nii.gz", "--image", str(tmp_path / "moving.nii.gz")]
    for output, found in ((tmp_path, "would be replaced"), (tmp_path / "moving.nii.gz", "would be replaced")):
        with pytest.raises(SystemExit):
            run(folder, output, *words)
        assert found in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "both.nii.gz", *words, "fixed.nii.gz")
    assert "is one file for 2 inputs; give a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "out.txt", *words)
    assert "out.txt is no name for a NIfTI file; let it end in .nii.gz" in capsys.readouterr().err
    assert (tmp_path / "moving.nii.gz").read_bytes() == content and len(list(tmp_path.iterdir())) == 1
    # FreeSurfer's volumes are read, NIfTI is written.
    nib.MGHImage(values(folder / "moving.nii.gz"), nib.load(folder / "moving.nii.gz").affine).to_filename(
        tmp_path / "t1.mgz"
    )
    run(folder, tmp_path / "out", *words[:-1], str(tmp_path / "t1.mgz"), str(tmp_path / "moving.nii.gz"))
    moved = [values(tmp_path / "out" / name) for name in ("t1.nii.gz", "moving.nii.gz")]
    np.testing.assert_allclose(*moved, atol=0.1)
