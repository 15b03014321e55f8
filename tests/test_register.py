"""The command register: what it writes, what it says, and what it refuses, with networks whose answer is known."""

import gzip
import importlib.util
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from toys import SHAPE, affine, image, tiny_bundle, write

from dilformer_jax import register
from dilformer_jax.io import bundle
from dilformer_jax.io.volumes import read_image, read_labels

ROOT = Path(__file__).resolve().parents[1]


def run_register(
    inputs: Path, output: Path, *more: str, fixed="fixed", moving="moving", weights: str | None = "weights"
) -> None:
    files = ["--fixed", inputs / f"{fixed}.nii.gz", "--moving", inputs / f"{moving}.nii.gz"]
    files += ["--weights", "none" if weights is None else inputs / weights]
    affine = [] if "--affine" in more else ["--affine", "none"]
    register.main(["register", *map(str, files), "--output", str(output), *affine, *more])


def test_register_writes_what_itk_reads(inputs: Path, tmp_path: Path, capsys):
    output = tmp_path / "new" / "output"
    labels = ("--fixed-labels", str(inputs / "labels.nii.gz"), "--moving-labels", str(inputs / "moving_labels.nii.gz"))
    run_register(inputs, output, *labels, "--formats", "fsl", "freesurfer", "voxel")
    told = capsys.readouterr().out
    names = sorted(path.name for path in output.iterdir())
    assert {"affine.txt", "field.nii.gz", "inverse_field.nii.gz", "moved.nii.gz", "moved_labels.nii.gz", "run.json",
            "field_fsl.nii.gz", "inverse_field_fsl.nii.gz", "field_freesurfer.mgz"} <= set(names)  # fmt: skip
    assert "ANTs and ITK" in told and "Dice" in told and "Warning" not in told

    fixed, moving = (sitk.ReadImage(str(inputs / f"{name}.nii.gz")) for name in ("fixed", "moving"))
    fields = [
        sitk.Cast(sitk.ReadImage(str(output / f"{name}field.nii.gz")), sitk.sitkVectorFloat64)
        for name in ("", "inverse_")
    ]
    there, back = (sitk.DisplacementFieldTransform(field) for field in fields)
    resampled = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, there, sitk.sitkLinear, 0.0))
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(output / "moved.nii.gz")))
    assert (np.abs(resampled - expected) < 1e-3 * np.ptp(expected)).mean() > 0.999  # but for rounding at the faces
    assert np.abs(expected - sitk.GetArrayFromImage(moving)).max() > 5
    # There and back again, through both files, in mm.
    start = moving.TransformContinuousIndexToPhysicalPoint((6.3, 10.2, 5.1))
    middle = back.TransformPoint(start)
    assert np.linalg.norm(np.subtract(middle, start)) > 1
    assert np.linalg.norm(np.subtract(there.TransformPoint(middle), start)) < 0.05

    record = json.loads((output / "run.json").read_text())
    assert record["outputs"] == names
    assert record["settings"]["parameters_sha256"] == bundle.describe(inputs / "weights")["sha256"]
    assert len(record["inputs_sha256"]) == 4 and record["verdict"] in ("pass", "warn", "fail")
    assert record["command"].startswith("python -m dilformer_jax.register --fixed ")
    moved = read_labels(output / "moved_labels.nii.gz").array
    for label in (3, 5):
        truth = read_labels(inputs / "labels.nii.gz").array
        dice = 2 * ((moved == label) & (truth == label)).sum() / ((moved == label).sum() + (truth == label).sum())
        assert record["metrics"]["dice_per_label"][str(label)] == pytest.approx(dice)

    # Again into the same folder: its own files are replaced or go, others stay.
    (output / "notes.txt").write_text("mine")
    (output / "moved.nii.gz").write_text("old")
    run_register(inputs, output)
    assert read_image(output / "moved.nii.gz").array.shape == SHAPE
    assert (output / "notes.txt").read_text() == "mine" and not list(output.glob(".*"))
    assert not (output / "moved_labels.nii.gz").exists() and not (output / "field_fsl.nii.gz").exists()


@pytest.fixture(scope="module")
def broken(tmp_path_factory, inputs: Path) -> Path:
    """Beside the good images one of each kind that other tools stumble over."""
    folder = tmp_path_factory.mktemp("broken")
    for path in inputs.iterdir():
        (folder / path.name).symlink_to(path)
    moving = read_image(inputs / "moving.nii.gz").array
    holes = moving.copy()
    holes[2, 3, 4], holes[2, 3, 5] = np.nan, np.inf
    write(folder / "holes.nii.gz", holes, affine())
    other = affine()
    other[:3, 3] += (0, 11.4, 0)
    nifti = nib.Nifti1Image(moving, affine())
    nifti.header.set_sform(affine(), 2), nifti.header.set_qform(other, 1)
    nifti.to_filename(folder / "forms.nii.gz")
    nifti = nib.Nifti1Image(moving, None)
    nifti.header.set_sform(None, 0), nifti.header.set_qform(None, 0), nifti.header.set_zooms((1, 1.5, 2))
    nifti.to_filename(folder / "uncoded.nii.gz")
    flat = affine()
    flat[:3, 2] = flat[:3, 1]
    nifti = nib.Nifti1Image(moving, None)
    nifti.header.set_sform(flat, 1), nifti.header.set_qform(None, 0)
    nifti.to_filename(folder / "singular.nii.gz")
    sheared = affine()
    sheared[0, 1] += 0.3
    nifti = nib.Nifti1Image(moving, None)
    nifti.header.set_sform(sheared, 1), nifti.header.set_qform(None, 0)
    nifti.to_filename(folder / "sheared.nii.gz")
    (folder / "cut.nii.gz").write_bytes((inputs / "moving.nii.gz").read_bytes()[:400])
    (folder / "trailing.nii.gz").write_bytes(gzip.compress(b"no image"))
    write(folder / "constant.nii.gz", np.full(SHAPE, 7, np.float32), affine())
    write(folder / "slice.nii.gz", image((15, 18, 1)), affine())
    write(folder / "empty.nii.gz", np.zeros(SHAPE, np.uint8), affine())
    write(folder / "giant.nii.gz", moving, np.diag([1000.0, 1000, 1000, 1]) @ affine())
    far = affine()
    far[0, 3] += 900
    write(folder / "far.nii.gz", np.ones(SHAPE, np.uint8), far)
    write(folder / "many.nii.gz", image(SHAPE), affine())
    (folder / "words.txt").write_text("these are no numbers\n")
    return folder


@pytest.mark.parametrize(
    ("changes", "more", "sentence"),
    [
        ({"fixed": "missing"}, (), "missing.nii.gz does not exist"),
        ({"fixed": "text"}, (), "text.nii.gz is not compressed by gzip"),
        ({"fixed": "cut"}, (), r"cut.nii.gz .*400 bytes"),
        ({"fixed": "trailing"}, (), r"trailing.nii.gz "),
        ({"moving": "frames"}, (), "frames.nii.gz has 2 frames; use --frame N"),
        ({"moving": "frames"}, ("--frame", "2"), "frames.nii.gz has 2 frames"),
        ({"moving": "holes"}, (), "holes.nii.gz has 2 NaN or infinite voxels"),
        ({"moving": "forms"}, (), r"forms.nii.gz .* differ by 11.4 mm.*--prefer"),
        ({"moving": "uncoded"}, (), r"uncoded.nii.gz .*--assume-affine"),
        ({"moving": "singular"}, (), r"singular.nii.gz .*cannot be inverted"),
        ({"moving": "constant"}, (), "constant.nii.gz is constant"),
        ({"fixed": "slice", "moving": "slice"}, (), r"slice.nii.gz .*axis 3 has 1 slice; 3-D registration needs >= 8"),
        ({"moving": "giant"}, (), "giant.nii.gz shows something"),
        ({"fixed": "small", "moving": "small"}, (), r"small.nii.gz .*axis 3 has 2 slices"),
        ({"weights": "nothing"}, (), "nothing does not exist"),
        ({}, ("--smoothness", "2"), "weights was trained for no smoothness but its own, 1"),
        ({}, ("--moving-labels", "fractions.nii.gz"), "fractions.nii.gz .*no label map"),
        ({}, ("--moving-labels", "many.nii.gz"), "many.nii.gz .*no label map"),
        ({}, ("--fixed-labels", "labels_elsewhere.nii.gz"), "lie on different grids.*3 mm.*--assume-same-grid"),
        ({}, ("--fixed-mask", "empty.nii.gz"), "empty.nii.gz is empty"),
        ({}, ("--moving-mask", "far.nii.gz"), "far.nii.gz has 0 % of its voxels inside"),
        ({}, ("--affine", "lost.txt"), "--affine lost.txt is no file"),
        ({}, ("--affine", "words.txt"), "words.txt "),
        ({}, ("--workdir", "x"), "not allowed with argument --weights"),
        ({}, ("--refine", "-1"), "--refine is -1; give 0 or more steps, 10 for example"),
        ({}, ("--refine", "many"), "argument --refine: invalid int value: 'many'"),
        ({}, ("--similarity", "nmi"), "--similarity says how to refine; give --preset default with it"),
        ({"weights": None}, ("--refine", "0"), "Nothing would register this pair"),
        ({"weights": None}, ("--workdir", "x"), "not allowed with argument --weights"),
        (
            {},
            ("--refine", "0", "--similarity", "mind"),
            "--similarity says how to refine; give --preset default with it",
        ),
        ({"moving": "giant"}, (), "do without a network .--weights none."),
        ({}, ("--pairs", "pairs.csv"), "give --fixed and --moving, or --pairs"),
        ({}, ("--shard", "2/3"), "--shard divides the pairs"),
        ({}, ("--shard", "3/2"), "'3/2' is no part of a whole"),
        ({}, ("--repor", "--movin"), "dilformer register"),
    ],
)
def test_bad_input_leaves_nothing_behind(broken: Path, tmp_path: Path, capsys, monkeypatch, changes, more, sentence):
    monkeypatch.chdir(broken)
    with pytest.raises(SystemExit) as stopped:
        run_register(broken, tmp_path / "output", *more, **changes)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(sentence, told) and told.count("\n") == 1, told
    assert not list(tmp_path.iterdir())


def test_what_is_asked_for_is_accepted(broken: Path, tmp_path: Path, capsys):
    """The same files with the option that their refusal names, and those that need none."""
    run_register(broken, tmp_path / "plain")
    plain = read_image(tmp_path / "plain" / "moved.nii.gz").array
    for name, *more in (
        ("forms", "--prefer", "sform"),
        ("frames", "--frame", "0"),
        ("holes", "--nan", "zero"),
        ("uncoded", "--assume-affine", "LAS"),
        ("sheared",),
    ):
        run_register(broken, tmp_path / name, *more, moving=name)
        moved = nib.load(tmp_path / name / "moved.nii.gz").get_fdata()
        if name in ("forms", "frames"):
            np.testing.assert_allclose(moved, plain, atol=1e-4)
        if name == "uncoded":  # where it was put, the images have nothing in common
            assert "uncoded.nii.gz" in capsys.readouterr().out and not moved.any()
        else:
            assert np.ptp(moved) > 1


def test_refinement_alone_registers_without_a_network(inputs: Path, tmp_path: Path, capsys):
    run_register(inputs, tmp_path / "alone", "--refine", "3", weights=None)
    record = json.loads((tmp_path / "alone" / "run.json").read_text())
    assert record["settings"]["network"] is record["settings"]["parameters_sha256"] is None
    assert record["settings"]["refinement"]["steps"] == 3 and record["similarity"] in ("lncc", "mind")
    assert record["metrics"]["correlation"] > record["metrics"]["correlation_before"] + 0.01
    with pytest.raises(SystemExit) as stopped:
        run_register(inputs, tmp_path / "alone", "--refine", "3", "--max-folding", "-1", weights=None)
    assert stopped.value.code == 3 and "More than --max-folding" in capsys.readouterr().err


def test_a_network_is_refined(inputs: Path, tmp_path: Path, capsys):
    run_register(inputs, tmp_path / "plain")
    run_register(inputs, tmp_path / "refined", "--refine", "4", "--similarity", "lncc")
    plain, refined = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("plain", "refined"))
    assert plain["settings"]["refinement"] is None
    assert refined["settings"]["network"] == plain["settings"]["network"]
    assert plain["similarity"] is None and refined["similarity"] == "lncc"
    assert refined["metrics"]["correlation"] > plain["metrics"]["correlation"] + 0.02


def test_a_pair_of_two_contrasts_is_left_to_the_network(inputs: Path, tmp_path: Path, capsys):
    """Refinement by LNCC would spoil it; a similarity that is asked for is taken."""
    image = nib.load(inputs / "fixed.nii.gz")
    values = np.asarray(image.dataobj, np.float32)
    seen = values > 0.05 * values.max()
    other = np.where(seen, 1.1 * values.max() - values, 0).astype(np.float32)
    nib.Nifti1Image(other, image.affine).to_filename(inputs / "inverted.nii.gz")
    run_register(inputs, tmp_path / "fast", "--preset", "fast", moving="inverted")
    run_register(inputs, tmp_path / "default", "--preset", "default", moving="inverted")
    assert "two contrasts" in capsys.readouterr().out
    fields = [nib.load(tmp_path / name / "field.nii.gz").get_fdata() for name in ("fast", "default")]
    np.testing.assert_allclose(*fields, atol=1e-4)
    assert json.loads((tmp_path / "default" / "run.json").read_text())["similarity"] is None


def test_report_without_matplotlib_is_refused_first(inputs: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run_register(inputs, tmp_path / "output", "--report", fixed="missing")
    assert "pip install 'dilformer-jax[plot]'" in capsys.readouterr().err


def test_images_of_other_grids_are_brought_to_that_of_the_weights(inputs: Path, tmp_path: Path, capsys):
    """A fixed image stored otherwise is registered alike, by weights that know one way of storing."""
    run_register(inputs, tmp_path / "plain")
    fixed = read_image(inputs / "fixed.nii.gz")
    steps = np.array([[0, 0, -1, 14], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])  # to voxels as they are in the file
    stored = np.ascontiguousarray(np.flip(fixed.array.transpose(1, 2, 0), 2))
    (
        (tmp_path / "weights").symlink_to(inputs / "weights"),
        (tmp_path / "moving.nii.gz").symlink_to(inputs / "moving.nii.gz"),
    )
    write(tmp_path / "fixed.nii.gz", stored, fixed.affine @ steps)
    run_register(tmp_path, tmp_path / "turned")
    plain, turned = (read_image(tmp_path / name / "moved.nii.gz").array for name in ("plain", "turned"))
    assert turned.shape == stored.shape
    np.testing.assert_allclose(np.flip(turned, 2).transpose(2, 0, 1), plain, atol=0.2)
    record = json.loads((tmp_path / "turned" / "run.json").read_text())
    assert record["grid"]["shape"] == list(SHAPE)
    tiny_bundle(tmp_path / "coarse", grid={"shape": [8, 10, 8], "spacing_mm": [3, 3, 3], "orientation": "RAS"})
    capsys.readouterr()
    run_register(inputs, tmp_path / "coarse_out", weights=str(tmp_path / "coarse"))
    assert read_image(tmp_path / "coarse_out" / "moved.nii.gz").array.shape == SHAPE
