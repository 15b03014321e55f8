"""Data sets prepared: voxels where they belong, files that go on where they stopped, and what is said of the rest."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from brains import names, write, write_pickle
from scipy import ndimage

from dilformer_jax import prepare
from dilformer_jax.data import preprocessing
from dilformer_jax.data.lpba40 import lpba40
from dilformer_jax.data.preparation import Preparation
from dilformer_jax.data.preparation import prepare as prepared_by
from dilformer_jax.data.prepared import prepared
from dilformer_jax.data.standardisation import Settings
from dilformer_jax.io.volumes import BadInput

SHAPE = (12, 14, 10)


def brain(number, labels=(21, 22, 161)):
    """A smooth image with an empty rim, and its labels."""
    rng = np.random.default_rng(number)
    inside = np.zeros(SHAPE, bool)
    inside[2:-2, 3:-2, 1:-2] = True
    image = ndimage.gaussian_filter(rng.random(SHAPE), 1.5) * 1000
    found = np.take([0, *labels], (ndimage.gaussian_filter(rng.random(SHAPE), 1.5) * 40).astype(int) % 4)
    return np.where(inside, image, 0).astype(np.int16), np.where(inside, found, 0).astype(np.uint8)


def save(folder, name, number, affine=None):
    folder.mkdir(exist_ok=True)
    for kind, array in zip(("t1", "seg"), brain(number), strict=True):
        nib.Nifti1Image(array, np.diag([1, 1, 1, 1.0]) if affine is None else affine).to_filename(
            folder / f"{name}_{kind}.nii.gz"
        )


@pytest.fixture
def source(tmp_path):
    for number in (11, 12, 35, 36):
        save(tmp_path / "LPBA40", f"S{number}", number)
    return tmp_path / "LPBA40"


def run(*arguments):
    prepare.main(["prepare", *map(str, arguments)])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    told = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    return told


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


def test_a_data_set_is_read_back_from_what_was_prepared(tmp_path, source, capsys):
    out = tmp_path / "out"
    run("lpba40", "--source", source, "--output", out)
    told = capsys.readouterr()
    assert "36 of the 40 subjects of lpba40 are missing (S01-S10, S13-S34, S37-S40); get them from https://" in told.err
    assert "[4/4] S36 prepared, ETA 0:00:00" in told.err and "4 subjects prepared, in" in told.out
    for number in (11, 12, 35, 36):
        image, labels = brain(number)
        np.testing.assert_array_equal(voxels(out / f"S{number}_t1.nii.gz"), image)
        np.testing.assert_array_equal(voxels(out / f"S{number}_seg.nii.gz"), labels)
        assert nib.load(out / f"S{number}_t1.nii.gz").get_data_dtype() == np.float32
    before, after = lpba40(source), lpba40(out)
    assert prepared(out) == after
    for part in ("train", "validation", "test"):
        assert names(getattr(before, part)) == names(getattr(after, part))
    assert (before.labels, before.licence) == (after.labels, after.licence)
    assert after.names == {id: name for id, name in before.names.items() if id in before.labels}
    assert after.train[0].fixed.image == out / "S12_t1.nii.gz"
    told = json.loads((out / "dataset.json").read_text())
    assert told["grid"] == {"shape": list(SHAPE), "spacing_mm": [1.0, 1.0, 1.0], "orientation": "RAS"}
    assert told["labels"]["21"] == "left superior frontal gyrus" and len(told["labels"]) == 54
    assert told["splits"]["train"] == {"pairs": "ordered", "subjects": ["S11", "S12"]}
    import hashlib

    sources = told["subjects"]["S11"]["sources"]
    assert sources[str(source / "S11_t1.nii.gz")] == hashlib.sha256((source / "S11_t1.nii.gz").read_bytes()).hexdigest()
    assert len(sources) == 2


def test_training_finds_the_cache(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    run("lpba40", "--source", source, "--output", out, "--preprocessing", "downsample=2", "normalise=minmax")
    preprocessing._memory.clear()
    monkeypatch.setattr(preprocessing, "image_of", None)  # nothing is decoded again
    settings = {"downsample": 2, "normalise": "minmax"}
    image, labels = preprocessing.load(lpba40(out).train[0].moving, settings, cache=out / "cache")
    its_image, its_labels = brain(11)
    scaled = its_image.astype(np.float32) / its_image.max()
    blocks = scaled.reshape(6, 2, 7, 2, 5, 2).mean((1, 3, 5))
    np.testing.assert_allclose(image[..., 0], blocks, rtol=1e-5)
    np.testing.assert_array_equal(labels, its_labels)


def test_axes_are_turned_without_interpolation(tmp_path):
    affine = np.array([[0, 0, 2.0, 5], [-1, 0, 0, 3], [0, 1.5, 0, -4], [0, 0, 0, 1]])  # PSR
    for number in (1, 2):
        save(tmp_path / "in", f"b{number}", number, affine)
    run("folder", "--source", tmp_path / "in", "--output", tmp_path / "out", "--orientation", "LPS", "--no-cache")
    image = nib.load(tmp_path / "out/b1_t1.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S") and not (tmp_path / "out/cache").exists()
    expected = nib.load(tmp_path / "in/b1_t1.nii.gz").as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(("L", "P", "S")))
    )
    np.testing.assert_array_equal(voxels(tmp_path / "out/b1_t1.nii.gz"), np.asarray(expected.dataobj))
    np.testing.assert_allclose(image.affine, expected.affine, atol=1e-5)
    assert prepared(tmp_path / "out") == prepare.sources.folder(tmp_path / "out")


def test_voxels_keep_their_place_in_the_world_on_another_grid(tmp_path):
    # A ramp is what it was wherever it is sampled; blurring does not change it either, inside.
    affine = np.array([[1, 0, 0, 7], [0, 1, 0, -3], [0, 0, 2, 11.0], [0, 0, 0, 1]])
    index = np.indices((20, 22, 12)).astype(np.float32)
    ramp = 100 + 3 * index[0] - 2 * index[1] + 5 * index[2]
    for name in ("a", "b"):
        path = tmp_path / "in" / f"{name}_t1.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nib.Nifti1Image(ramp, affine).to_filename(path)
    arguments = ("--grid", 4, 5, 3, "--grid-spacing", 1.7, 2.3, 3.1, "--orientation", "RSP", "--no-cache")
    run("folder", "--source", tmp_path / "in", "--output", tmp_path / "out", *arguments)
    image = nib.load(tmp_path / "out/a_t1.nii.gz")
    np.testing.assert_allclose(nib.affines.voxel_sizes(image.affine), (1.7, 2.3, 3.1), rtol=1e-6)
    assert nib.aff2axcodes(image.affine) == ("R", "S", "P")
    places = np.indices(image.shape).reshape(3, -1).T
    i, j, k = nib.affines.apply_affine(np.linalg.inv(affine) @ image.affine, places).T
    np.testing.assert_allclose(np.asarray(image.dataobj).ravel(), 100 + 3 * i - 2 * j + 5 * k, rtol=1e-4)
    # All files lie on one grid: the new one lies around the middle of that.
    middle = nib.affines.apply_affine(image.affine, (np.array(image.shape) - 1) / 2)
    np.testing.assert_allclose(middle, nib.affines.apply_affine(affine, (9.5, 10.5, 5.5)), atol=1e-4)


def test_a_crop_is_that_of_training_and_comes_before_scaling(tmp_path, source):
    run("lpba40", "--source", source, "--output", tmp_path / "out", "--crop", 8, 8, 6, "--normalise", "minmax")
    image, labels = brain(35)
    inside = tuple(slice(*bounds) for bounds in ((2, 10), (3, 11), (1, 7)))  # middle of 2-9, 3-11 and 1-7
    low, high = image[inside].min(), image[inside].max()
    expected = (image[inside] - np.float32(low)) / np.float32(high - low)
    np.testing.assert_allclose(voxels(tmp_path / "out/S35_t1.nii.gz"), expected, rtol=1e-5)
    np.testing.assert_array_equal(voxels(tmp_path / "out/S35_seg.nii.gz"), labels[inside])
    np.testing.assert_allclose(nib.load(tmp_path / "out/S35_t1.nii.gz").affine[:3, 3], (2, 3, 1))


def test_stopped_it_goes_on_and_comes_to_the_same(tmp_path, source):
    arguments = ("--grid", 8, 8, 8, "--grid-spacing", 1.5, "--label-interpolation", "argmax", "--no-cache")
    run("lpba40", "--source", source, "--output", tmp_path / "whole", *arguments)
    settings = Settings(spacing=(1.5,) * 3, grid=(8, 8, 8), interpolation="argmax")
    out = tmp_path / "out"
    working = prepared_by(Preparation("lpba40", lpba40(source), source, out, settings))
    assert [next(working).name for _ in range(2)] == ["S11", "S12"]
    working.close()  # as where it is killed: no description yet, and a line of the journal half written
    assert not (out / "dataset.json").exists()
    with (out / "preparation.jsonl").open("a") as file:
        file.write('{"name": "S35", "sou')
    (out / "S12_seg.nii.gz").write_bytes((out / "S12_seg.nii.gz").read_bytes()[:-20])
    times = {name: (out / name).stat().st_mtime_ns for name in ("S11_t1.nii.gz", "S11_seg.nii.gz", "S12_t1.nii.gz")}
    with pytest.raises(BadInput, match="has no dataset.json"):
        prepared(out)
    again = list(prepared_by(Preparation("lpba40", lpba40(source), source, out, settings)))
    assert [(done.name, done.kept) for done in again[:2]] == [("S11", True), ("S12", False)]
    assert (out / "S11_t1.nii.gz").stat().st_mtime_ns == times["S11_t1.nii.gz"]
    assert (out / "S12_t1.nii.gz").stat().st_mtime_ns != times["S12_t1.nii.gz"]
    a, b = content(tmp_path / "whole"), content(out)
    assert {path for path in a} == {path for path in b}
    assert all(a[path] == b[path] for path in a if path.name != "preparation.jsonl" and path.suffix == ".gz")
    assert json.loads(a[next(p for p in a if p.name == "dataset.json")])["subjects"] == prepared_subjects(out)
    # A source that changes is prepared anew, and only that one.
    save(source, "S36", 99)
    third = list(prepared_by(Preparation("lpba40", lpba40(source), source, out, settings)))
    assert [done.kept for done in third] == [True, True, True, False]


def prepared_subjects(folder):
    return json.loads((folder / "dataset.json").read_text())["subjects"]


def test_other_settings_do_not_go_into_the_same_folder(tmp_path, source, capsys):
    out = tmp_path / "out"
    arguments = ("lpba40", "--source", source, "--output", out, "--no-cache")
    run(*arguments, "--grid", 8, 8, 8)
    before = content(out)
    told = refused(capsys, *arguments, "--grid", 8, 8, 6)
    assert told == f"{out} was prepared with grid 8x8x8, not 8x8x6; give another folder."
    assert "was prepared with dataset lpba40, not folder" in refused(capsys, "folder", *arguments[1:])
    assert content(out) == before
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "notes.nii.gz")
    told = refused(capsys, "lpba40", "--source", source, "--output", tmp_path / "other")
    assert "has files that are no preparation's; give a new or an empty folder." in told
    assert "lies in the output folder" in refused(capsys, "lpba40", "--source", source, "--output", source)
    with pytest.raises(BadInput, match="is prepared from lpba40, not from ixi; name it so, or 'prepared'"):
        prepare.sources.DATASETS["ixi"](out)


def test_what_a_brain_is_aligned_by_goes_from_the_template_to_it(tmp_path, source):
    # Every brain is a shifted copy of the first: an aligner that says so puts them on top of one another.
    image, labels = brain(11)
    for number, shift in ((12, (1, 0, -1)), (35, (0, 2, 0)), (36, (-1, 1, 1))):
        for kind, array in (("t1", image), ("seg", labels)):
            moved = np.roll(array, shift, (0, 1, 2))
            nib.Nifti1Image(moved, np.eye(4)).to_filename(source / f"S{number}_{kind}.nii.gz")
    shifts = {"S12": (1, 0, -1), "S35": (0, 2, 0), "S36": (-1, 1, 1)}
    asked = []

    def aligner(template, moving):
        asked.append((template.path.name, moving.path.name))
        matrix = np.eye(4)
        matrix[:3, 3] = shifts[moving.path.name[:3]]
        return matrix, ("looks odd.",)

    out = tmp_path / "out"
    what = Preparation("lpba40", lpba40(source), source, out, Settings(crop=(6, 6, 6)), "S11")
    done = list(prepared_by(what, aligner))
    assert asked == [("S11_t1.nii.gz", f"{name}_t1.nii.gz") for name in shifts]
    for name in ("S11", *shifts):
        np.testing.assert_array_equal(voxels(out / f"{name}_t1.nii.gz"), voxels(out / "S11_t1.nii.gz"))
        np.testing.assert_array_equal(voxels(out / f"{name}_seg.nii.gz"), voxels(out / "S11_seg.nii.gz"))
    np.testing.assert_array_equal(voxels(out / "S11_t1.nii.gz"), image[3:9, 4:10, 1:7])
    assert done[0].notes != done[1].notes and "S12: looks odd." in done[1].notes
    assert any("% of what it shows lies outside the grid" in note for note in done[1].notes)
    affine = np.array(prepared_subjects(out)["S35"]["affine"])
    np.testing.assert_array_equal(affine[:3, 3], (0, 2, 0))
    with pytest.raises(BadInput, match="S99 is neither a subject of .* nor a file"):
        list(prepared_by(Preparation("lpba40", lpba40(source), source, tmp_path / "new", align="S99"), aligner))
    assert not (tmp_path / "new").exists()
    shutil.copy(source / "S36_t1.nii.gz", tmp_path / "template.nii.gz")
    shifts |= {"S11": (0, 0, 0)}
    what = Preparation("lpba40", lpba40(source), source, tmp_path / "by", align=str(tmp_path / "template.nii.gz"))
    assert len(list(prepared_by(what, aligner))) == 4 and asked[-1] == ("template.nii.gz", "S36_t1.nii.gz")


def test_brains_of_different_grids_are_refused_before_anything_is_written(tmp_path, capsys):
    for number, affine in ((1, np.eye(4)), (2, np.diag([-1, 1, 1, 1.0]))):
        save(tmp_path / "in", f"b{number}", number, affine)
    arguments = ("folder", "--source", tmp_path / "in", "--output", tmp_path / "out")
    told = refused(capsys, *arguments)
    assert "b2_t1.nii.gz would be 12x14x10 voxels of 1.0x1.0x1.0 mm, LAS, where" in told and "--orientation" in told
    assert not (tmp_path / "out").exists()
    run(*arguments, "--orientation", "RAS")
    np.testing.assert_array_equal(voxels(tmp_path / "out/b2_t1.nii.gz"), brain(2)[0][::-1])


def test_pickles_of_pairs_are_prepared_once_for_each_subject(tmp_path, capsys):
    a, b, c = (brain(number, (1, 2, 3)) for number in (1, 2, 3))
    write_pickle(tmp_path / "in/Test/p_0438_0439.pkl", b[0], a[0], b[1], a[1])
    write_pickle(tmp_path / "in/Test/p_0439_0440.pkl", c[0], b[0], c[1], b[1])
    run("oasis", "--source", tmp_path / "in", "--output", tmp_path / "out")
    for name, (image, labels) in (("0438", a), ("0439", b), ("0440", c)):
        np.testing.assert_array_equal(voxels(tmp_path / f"out/{name}_t1.nii.gz"), image)
        np.testing.assert_array_equal(voxels(tmp_path / f"out/{name}_seg.nii.gz"), labels)
    dataset = prepare.sources.DATASETS["oasis"](tmp_path / "out")
    assert names(dataset.test) == ["0439_to_0438", "0440_to_0439"] and dataset.train == ()
    told = json.loads((tmp_path / "out/dataset.json").read_text())
    assert told["grid"]["orientation"] is None and len(told["subjects"]["0439"]["sources"]) == 2
    assert "oasis has 3 of 20 test subjects" in capsys.readouterr().err
    write_pickle(tmp_path / "in/Test/p_0439_0440.pkl", c[0], a[0], c[1], b[1])
    told = refused(capsys, "oasis", "--source", tmp_path / "in", "--output", tmp_path / "new")
    assert "p_0438_0439.pkl and" in told and "hold different images of 0439; rename one." in told


def test_an_atlas_stays_one(tmp_path):
    for name in ("atlas", "Train/subject_2", "Train/subject_10", "Test/subject_3"):
        write_pickle(tmp_path / f"IXI_data/{name}.pkl", *brain(len(name)))
    run("ixi", "--source", tmp_path, "--output", tmp_path / "out", "--assume-affine", "LIA")
    dataset = prepare.sources.DATASETS["ixi"](tmp_path / "out")
    assert names(dataset.train) == ["atlas_to_subject_2", "atlas_to_subject_10"]
    assert names(dataset.test) == ["atlas_to_subject_3"] and dataset.validation == ()
    told = json.loads((tmp_path / "out/dataset.json").read_text())
    assert told["splits"]["train"] == {
        "pairs": "atlas moving", "atlas": "atlas", "subjects": ["subject_2", "subject_10"]
    }  # fmt: skip
    assert told["grid"]["orientation"] == "LIA"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--grid-spacing", "1", "2"), "--grid-spacing has 2 numbers; give one, or three"),
        (("--grid", "0", "8", "8"), r"The grid is \(0, 8, 8\); give three positive numbers"),
        (("--orientation", "LRS"), "'LRS' does not name three axes"),
        (("--options", "axis=RAS"), "lpba40 has no option 'axis'; it has axes"),
        (("--options", "axes"), "'axes' is no KEY=VALUE"),
        (("--preprocessing", "normalise=mean"), "preprocessing.normalise is 'mean'"),
        (("--jobs", "0"), "--jobs is 0"),
        (("--align", "nobody"), "nobody is neither a subject of .* nor a file"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, source, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(prepare, "_aligner", lambda: None if arguments[0] != "--align" else (lambda *_: None))
    told = refused(capsys, "lpba40", "--source", source, "--output", tmp_path / "out", *arguments)
    assert __import__("re").search(said, told) and not (tmp_path / "out").exists()


@pytest.mark.data
def test_real_brains_are_prepared(shared_data, tmp_path):
    for name in ("S11", "S12"):
        for kind in ("t1", "seg"):
            (tmp_path / "in").mkdir(exist_ok=True)
            (tmp_path / "in" / f"{name}_{kind}.nii.gz").symlink_to(shared_data / "lpba40" / f"{name}_{kind}.nii.gz")
    run("lpba40", "--source", tmp_path / "in", "--output", tmp_path / "out", "--grid-spacing", 4, "--no-cache")
    pair = lpba40(tmp_path / "out").train[0]
    for subject in (pair.fixed, pair.moving):
        before, after = (
            voxels(folder / f"{subject.name}_seg.nii.gz") for folder in (tmp_path / "in", tmp_path / "out")
        )
        assert after.shape == (40, 48, 40)
        volumes = [[np.count_nonzero(array == id) for id in (21, 45, 163)] for array in (before, after)]
        np.testing.assert_allclose(np.array(volumes[1]) * 64, volumes[0], rtol=0.1)
        # As any program would have it that takes the voxel in the middle, which lies between eight: one of them.
        assert (after == before[2::4, 2::4, 2::4]).mean() > 0.95
