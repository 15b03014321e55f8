"""Learn2Reg submissions, read back as the organisers' evaluation.py reads them: nibabel and `map_coordinates`."""

import argparse
import dataclasses
import json
import re
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from toys import affine, image, write

from dilformer_jax import learn2reg as command
from dilformer_jax.io import learn2reg, submissions
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.registration import pipeline
from dilformer_jax.registration.evaluation import Method

SHAPE = (16, 20, 14)
STEMS = ["disp_0401_0402", "disp_0402_0403"]


def wave(seed: int) -> np.ndarray:
    """A smooth displacement of about a voxel, of another mean along each axis."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(*SHAPE, 3)), (4, 4, 4, 0))
    return np.float32(noise / noise.std() * 0.7 + [1.4, -0.9, 0.3])


def smooth(seed: int) -> np.ndarray:
    return np.float32(ndimage.gaussian_filter(image(SHAPE, seed), 1.5))


def labels_of(array: np.ndarray) -> np.ndarray:
    """Four labels, none at the faces: there the organisers count half a voxel less as inside than a nearest voxel."""
    steps = np.digitize(array, np.quantile(array, [0.5, 0.7, 0.9])).astype(np.uint8)
    return np.pad(steps[2:-2, 2:-2, 2:-2], 2)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three subjects, of which the fixed one of each pair is the moving one moved by `wave`."""
    folder = tmp_path / "TOY"
    (folder / "imagesTr").mkdir(parents=True), (folder / "labelsTr").mkdir()
    arrays = {"0403": smooth(3)}
    for fixed, moving in (("0402", "0403"), ("0401", "0402")):
        places = np.moveaxis(np.indices(SHAPE), 0, -1) + wave(int(fixed))
        arrays[fixed] = np.float32(
            ndimage.map_coordinates(arrays[moving], np.moveaxis(places, -1, 0), order=1, mode="nearest")
        )
    for subject, array in arrays.items():
        write(folder / "imagesTr" / f"TOY_{subject}_0000.nii.gz", array, affine())
        write(folder / "labelsTr" / f"TOY_{subject}_0000.nii.gz", labels_of(array), affine())
    path = "./imagesTr/TOY_{}_0000.nii.gz".format
    told = {
        "name": "TOY",
        "modality": {"0": "MR"},
        "tensorImageShape": {"0": list(SHAPE)},
        "registration_val": [{"fixed": path(f), "moving": path(m)} for f, m in (("0401", "0402"), ("0402", "0403"))],
    }
    (folder / "TOY_dataset.json").write_text(json.dumps(told))
    return folder / "TOY_dataset.json"


@pytest.fixture
def toy_method(monkeypatch) -> list[Path]:
    """A method that knows the answer; the moving images that it was asked for."""
    asked: list[Path] = []

    def displacement(fixed, moving):
        np.testing.assert_allclose(fixed.affine, affine(), atol=1e-5)
        asked.append(moving.path)
        return wave(int(fixed.path.name[4:8]))

    monkeypatch.setattr(command, "_method", lambda options: Method("toy", displacement, sha256="0" * 64))
    return asked


def ran(dataset: Path, *options: object) -> None:
    command.main(["learn2reg", "--dataset", str(dataset), *map(str, options)])


def refused(capsys, dataset: Path, *options: object) -> str:
    with pytest.raises(SystemExit) as stop:
        ran(dataset, *options)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def checked(dataset: Path, submission: Path, form: str = "nifti") -> tuple[list[str], list[str]]:
    found = [*submissions.findings(learn2reg.read_task(dataset), submission, form)]
    return [text for one in found for text in one.faults], [text for one in found for text in one.doubts]


def test_the_moving_labels_through_the_file_are_where_our_own_warp_puts_them(dataset, toy_method, tmp_path):
    ran(dataset, "--output", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"{stem}.nii.gz" for stem in STEMS),
        "learn2reg.json",
    ]
    for fixed, moving in (("0401", "0402"), ("0402", "0403")):
        file = nib.load(tmp_path / "out" / f"disp_{fixed}_{moving}.nii.gz")
        assert file.get_data_dtype() == np.float32
        np.testing.assert_allclose(file.affine, affine(), atol=1e-6)
        disp = file.get_fdata()
        assert disp.shape == (*SHAPE, 3)
        labels = nib.load(dataset.parent / "labelsTr" / f"TOY_{moving}_0000.nii.gz").get_fdata()
        d, h, w = labels.shape
        identity = np.meshgrid(np.arange(d), np.arange(h), np.arange(w), indexing="ij")
        theirs = ndimage.map_coordinates(labels, identity + disp.transpose(3, 0, 1, 2), order=0)
        ours = pipeline.warp_labels(labels.astype(np.int32), wave(int(fixed)))
        np.testing.assert_array_equal(ours, theirs)
        assert (theirs != labels).mean() > 0.1


def test_the_form_of_2021_is_enlarged_to_the_displacement(dataset, toy_method, tmp_path):
    ran(dataset, "--output", tmp_path / "out", "--form", "2021", "--zip")
    with np.load(tmp_path / "out" / f"{STEMS[0]}.npz") as arrays:
        half = arrays["arr_0"]
    assert half.dtype == np.float16 and half.shape == (3, 8, 10, 7)
    whole = np.array([ndimage.zoom(half[i].astype("float32"), 2, order=2) for i in range(3)])
    u = learn2reg.read_displacement(tmp_path / "out" / f"{STEMS[0]}.npz", SHAPE, "2021")
    np.testing.assert_array_equal(u, whole.transpose(1, 2, 3, 0))
    assert np.abs(u - wave(401)).max() < 0.1 < wave(401).std()
    assert checked(dataset, tmp_path / "out.zip", "2021") == ([], [])
    (fault, _), _ = checked(dataset, tmp_path / "out.zip")
    assert "the form of 2021; give --form 2021 to check that" in fault


def test_stopped_it_goes_on_and_does_not_mix_methods(dataset, toy_method, tmp_path, capsys, monkeypatch):
    ran(dataset, "--output", tmp_path / "out")
    assert [path.name for path in toy_method] == ["TOY_0402_0000.nii.gz", "TOY_0403_0000.nii.gz"]
    (tmp_path / "out" / f"{STEMS[1]}.nii.gz").unlink()
    ran(dataset, "--output", tmp_path / "out")
    assert "1 of 2 pairs are there already" in capsys.readouterr().err
    assert len(toy_method) == 3
    said = refused(capsys, dataset, "--output", tmp_path / "out", "--names", "long")
    assert "whose names is short, not long; choose another --output" in said
    toy = command._method(argparse.Namespace())
    refined = dataclasses.replace(toy, settings={"refinement": {"steps": 9}})
    monkeypatch.setattr(command, "_method", lambda options: refined)
    said = refused(capsys, dataset, "--output", tmp_path / "out")
    assert "whose method_settings is {}, not {'refinement': {'steps': 9}}" in said
    (tmp_path / "out" / command.RUN).unlink()
    assert "no learn2reg.json that says how they were made" in refused(capsys, dataset, "--output", tmp_path / "out")


def test_a_zip_file_has_one_folder_and_passes(dataset, toy_method, tmp_path, capsys):
    ran(dataset, "--output", tmp_path / "out", "--zip", "--names", "long")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        names = archive.namelist()
    assert names == ["out/disp_0401_0000_0402_0000.nii.gz", "out/disp_0402_0000_0403_0000.nii.gz"]
    assert "out.zip has all 2 displacements of TOY, val: 0 doubts." in capsys.readouterr().out
    ran(dataset, "--check", tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip", "a") as archive:
        archive.writestr("elsewhere/disp_0001_0002.nii.gz", b"")
    assert "has files in 2 folders (elsewhere, out)" in refused(capsys, dataset, "--check", tmp_path / "out.zip")
    (tmp_path / "text.zip").write_text("no archive")
    said = refused(capsys, dataset, "--check", tmp_path / "text.zip")
    assert "text.zip is neither a folder nor a zip file" in said


def test_identity_and_affine_need_no_network(dataset, tmp_path, monkeypatch):
    ran(dataset, "--output", tmp_path / "zero", "--method", "identity")
    assert not nib.load(tmp_path / "zero" / f"{STEMS[0]}.nii.gz").get_fdata().any()
    assert checked(dataset, tmp_path / "zero") == ([], [])  # as the organisers' own zero fields
    turned = np.eye(4)
    turned[:3, 3] = 2, 3, -4
    monkeypatch.setattr("dilformer_jax.registration.methods.align", lambda a, b: Aligned(turned))
    ran(dataset, "--output", tmp_path / "affine", "--method", "affine")
    disp = nib.load(tmp_path / "affine" / f"{STEMS[0]}.nii.gz").get_fdata()
    np.testing.assert_allclose(
        disp, np.broadcast_to(np.linalg.inv(affine()[:3, :3]) @ turned[:3, 3], disp.shape), atol=1e-6
    )


class Aligned:
    def __init__(self, matrix):
        self.matrix = matrix


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "Nowhere to write to; give --output FOLDER, or --check"),
        (["--output", "o"], "one of --workdir, --weights and --method; none given"),
        (["--output", "o", "--method", "identity", "--weights", "w"], "--weights and --method given"),
        (["--output", "o", "--method", "affine", "--refine", "5"], "not from --method affine"),
        (
            ["--output", "o", "--method", "identity", "--smoothness", "2"],
            "asked of a network, not of --method identity",
        ),
        (["--output", "o", "--weights", "default", "--smoothness", "9"], "smoothness is 9 and .* from 0.25 to 4"),
        (["--output", "o", "--method", "identity", "--split", "test"], "no pairs in registration_test.*pairs for: val"),
        (["--output", "o", "--method", "identity", "--data", "/nowhere"], "TOY_0401_0000.nii.gz does not exist"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(dataset, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    assert re.search(said, refused(capsys, dataset, *options))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told.pop("tensorImageShape"), "is no dataset.json"),
        (lambda told: told["registration_val"][0].update(fixed="imagesTr/toy.nii.gz"), "does not end in SSSS_MMMM"),
        (lambda told: told["registration_val"].append(told["registration_val"][0]), "2 pairs whose file would be disp"),
        (lambda told: told.update(tensorImageShape={"0": [16, 20, 15]}), "16x20x14 voxels where tensorImageShape says"),
    ],
)
def test_a_dataset_that_is_none_is_refused(dataset, tmp_path, capsys, change, said):
    told = json.loads(dataset.read_text())
    change(told)
    dataset.write_text(json.dumps(told))
    assert said in refused(capsys, dataset, "--method", "identity", "--output", tmp_path / "out")
    dataset.write_text("{")
    assert "cannot be read" in refused(capsys, dataset, "--method", "identity", "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("fixed", "moving", "names"),
    [
        ("OASIS_0395_0000", "OASIS_0396_0000", ("disp_0395_0396", "disp_0395_0000_0396_0000")),
        ("NLST_0101_0000", "NLST_0101_0001", ("disp_0101_0101", "disp_0101_0000_0101_0001")),
        ("ThoraxCBCT_0011_0002", "ThoraxCBCT_0011_0000", ("disp_0011_0002_0011_0000",)),
    ],
)
def test_names_are_those_that_challenges_ask_for(fixed, moving, names):
    entry = {"fixed": f"./imagesTr/{fixed}.nii.gz", "moving": f"./imagesTr/{moving}.nii.gz"}
    assert learn2reg._pair(entry, Path("d.json")).names == names


def stored(path: Path, array: np.ndarray) -> None:
    nib.Nifti1Image(array, np.eye(4), dtype=array.dtype).to_filename(path)


def test_each_fault_has_its_sentence(dataset, toy_method, tmp_path, capsys):
    ran(dataset, "--output", tmp_path / "good")
    u = wave(401)
    name = f"{STEMS[0]}.nii.gz"

    def faulty(array: np.ndarray | None) -> tuple[list[str], list[str]]:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        (tmp_path / "bad" / name).unlink()
        if array is not None:
            stored(tmp_path / "bad" / name, array)
        return checked(dataset, tmp_path / "bad")

    hole = u.copy()
    hole[3, 4, 5, 1] = np.nan
    for array, said in (
        (None, f"has no {name} for TOY_0401_0000.nii.gz <- TOY_0402_0000.nii.gz."),
        (u[:-1], "has shape 15x20x14x3 where 16x20x14x3 is asked for."),
        (u[:, :, :, None], ": an ITK field of vectors in mm"),
        (np.moveaxis(u, -1, 0), "; move the components to the last axis"),
        (u.transpose(1, 0, 2, 3), "; its axes are in another order"),
        (hole, "has 1 NaN or infinite values"),
        (np.int16(u), "has int16 values; write float32"),
    ):
        (fault,), doubts = faulty(array)
        assert said in fault and not doubts
    for array, said in (
        (u + np.moveaxis(np.indices(SHAPE, np.float32), 0, -1), "seems to hold places, not displacements"),
        (u + 30, "farther than the images are large"),
        (-2 * u, "makes the images less alike"),
    ):
        faults, (doubt,) = faulty(array)
        assert said in doubt and not faults
    said = refused(capsys, dataset, "--check", (faulty(None), tmp_path / "bad")[1])
    assert said.endswith("bad would be refused for 1 file of 2 (TOY, val).")

    # What else may lie there.
    shutil.copy(tmp_path / "good" / name, tmp_path / "bad" / "disp_0402_0401.nii.gz")
    (fault,), (doubt,) = checked(dataset, tmp_path / "bad")
    assert "disp_0402_0401.nii.gz names the moving image first" in fault and "belong to no pair of val" in doubt
    np.savez(tmp_path / "bad" / f"{STEMS[0]}.npz", u)
    assert checked(dataset, tmp_path / "bad")[0] == []  # one whole array, as since 2025
    np.savez(tmp_path / "bad" / f"{STEMS[0]}.npz", u, u)
    assert "has 2 arrays (arr_0, arr_1)" in checked(dataset, tmp_path / "bad")[0][0]
    np.savez(tmp_path / "bad" / f"{STEMS[0]}.npz", np.array([object()]))
    assert "cannot be read (Object arrays" in checked(dataset, tmp_path / "bad")[0][0]
    shutil.copy(tmp_path / "good" / name, tmp_path / "bad" / name)
    assert f"{STEMS[0]}.npz and {name}" in checked(dataset, tmp_path / "bad")[0][0]


def test_two_modalities_must_be_named(tmp_path):
    """As CuRIOUS's, whose zero fields in the organisers' repository have short names that their script refuses."""
    entry = {role: f"CuRIOUS_0003_{number}.nii.gz" for role, number in (("fixed", "0000"), ("moving", "0002"))}
    pair = learn2reg._pair(entry, Path("d.json"))
    task = learn2reg.Task("CuRIOUS", "val", SHAPE, (pair,), tmp_path, False)
    stored(tmp_path / "disp_0003_0003.nii.gz", wave(0))
    found = [*submissions.findings(task, tmp_path)]
    assert "; disp_0003_0003.nii.gz does not name the modalities." in found[0].faults[0]
    assert "disp_0003_0003.nii.gz in" in found[1].doubts[0]


def test_normalised_coordinates_raise_a_doubt(dataset, toy_method, tmp_path):
    for stem, seed in zip(STEMS, (401, 402), strict=True):
        stored(tmp_path / f"{stem}.nii.gz", wave(seed) / np.float32(SHAPE) * 2)
    assert "seem to be in normalised coordinates" in checked(dataset, tmp_path)[1][0]


def test_odd_axes_have_no_half(tmp_path):
    with pytest.raises(BadInput, match="half of 5x6x6, which has odd axes; give --form nifti"):
        learn2reg.write_displacement(tmp_path / "u.npz", np.zeros((5, 6, 6, 3), np.float32), np.eye(4), "2021")
    assert [*tmp_path.iterdir()] == []
