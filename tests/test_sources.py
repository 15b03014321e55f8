"""Data sets: which files become which pairs in which split, and what is said when they cannot."""

import json
import pickle

import nibabel as nib
import numpy as np
import pytest

from dilformer_jax.data import phantoms as phantom_module
from dilformer_jax.data.sources import DATASETS, Dataset, folder, ixi, ixi_2mm, lpba40, pairs_csv, phantoms, split
from dilformer_jax.io.volumes import BadInput, read_image, read_labels


def write(path, values=(0, 7, 9), kind=np.uint8):
    array = np.resize(np.array(values, kind), (4, 5, 6))
    nib.Nifti1Image(array, np.eye(4)).to_filename(path)
    return path


def names(pairs):
    return [pair.name for pair in pairs]


def test_lpba40_splits_by_subject_number(tmp_path):
    for number in (1, 2, 11, 34, 35, 36, 40):
        write(tmp_path / f"S{number:02d}_t1.nii.gz")
        write(tmp_path / f"S{number:02d}_seg.nii.gz")
    dataset = lpba40(tmp_path)
    assert names(dataset.train) == ["S11_to_S34", "S34_to_S11"]
    assert len(dataset.validation) == 6 and "S40_to_S35" in names(dataset.validation)
    assert names(split(dataset, "test")) == ["S01_to_S02", "S02_to_S01"]
    pair = dataset.train[0]
    assert pair.moving.image == tmp_path / "S11_t1.nii.gz" and pair.fixed.labels == tmp_path / "S34_seg.nii.gz"
    assert len(dataset.labels) == 54 and not {0, 181, 182} & set(dataset.labels)
    assert {21, 34, 50, 68, 92, 102, 122, 166} <= set(dataset.labels) and "non-commercial" in dataset.licence


def test_lpba40_with_half_of_the_subjects_serves_the_splits_that_it_has(tmp_path):
    for number in (35, 36):
        write(tmp_path / f"S{number:02d}_t1.nii.gz")
    dataset = lpba40(str(tmp_path))
    assert split(dataset, "validation")[0].fixed.labels is None
    with pytest.raises(BadInput, match="train split has no pairs .0 in train, 2 in validation, 0 in test."):
        split(dataset, "train")
    with pytest.raises(BadInput, match="'val' is not a split; choose one of train, validation, test"):
        split(dataset, "val")


@pytest.mark.parametrize(
    ("source", "looked_for"),
    [(lpba40, "S01_t1.nii.gz"), (ixi_2mm, "NAME_t1.nii.gz"), (ixi, "atlas.pkl"), (folder, "NAME_t1.nii.gz")],
)
def test_missing_and_empty_directories_are_named_with_what_was_looked_for(tmp_path, source, looked_for):
    with pytest.raises(BadInput, match=f"{tmp_path}/nowhere does not exist, .*{looked_for}"):
        source(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=f"{tmp_path} has 0 files, .*{looked_for}"):
        source(tmp_path)


def test_ixi_2mm_trains_on_the_first_eight_by_name(tmp_path):
    for number in range(12):
        write(tmp_path / f"IXI{number:03d}_t1.nii.gz")
        write(tmp_path / f"IXI{number:03d}_seg.nii.gz", (0, 3, 40 + number))
    dataset = ixi_2mm(tmp_path)
    assert len(dataset.train) == 8 * 7 and len(dataset.validation) == 4 * 3 and dataset.test == ()
    assert {pair.fixed.name for pair in dataset.validation} == {"IXI008", "IXI009", "IXI010", "IXI011"}
    assert dataset.labels == (3, *range(40, 52)) and "CC BY-SA" in dataset.licence


def test_ixi_registers_the_atlas_to_each_subject(tmp_path):
    content = pickle.dumps((np.ones((2, 2, 2), np.float32), np.zeros((2, 2, 2), np.int16)))
    for name in ("atlas", "Train/subject_10", "Train/subject_9", "Val/subject_3", "Test/subject_7"):
        path = tmp_path / f"{name}.pkl"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    dataset = ixi(tmp_path)
    assert names(dataset.train) == ["atlas_to_subject_9", "atlas_to_subject_10"]
    assert names(dataset.validation) == ["atlas_to_subject_3"] and names(dataset.test) == ["atlas_to_subject_7"]
    assert dataset.test[0].fixed.labels == dataset.test[0].fixed.image == tmp_path / "Test/subject_7.pkl"
    # TransMorph's table of raw ids and its list of scored places in it (networks.md, 2.4).
    raw = [0, 2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 26, 28, 30, 31, 41, 42, 43, 44, 46, 47, 49, 50]
    raw += [51, 52, 53, 54, 58, 60, 62, 63, 72, 77, 80, 85, 251, 252, 253, 254, 255]
    places = [1, 2, 3, *range(5, 17), 18, 20, 21, 22, 23, *range(25, 33), 34, 36]
    assert dataset.labels == tuple(raw[place] for place in places) and len(raw) == 46


def test_ixi_without_subjects_says_where_it_looked(tmp_path):
    (tmp_path / "atlas.pkl").write_bytes(b"")
    with pytest.raises(BadInput, match="no subject_<id>.pkl in Train/, Val/ or Test/"):
        ixi(tmp_path)


def test_folder_pairs_images_with_label_maps_by_their_suffixes(tmp_path):
    for name in ("a_t1.nii.gz", "b_T1w.nii", "c.nii.gz", "d.nii.gz", "e.nii.gz"):
        write(tmp_path / name)
    for name, label in (("a_seg.nii.gz", 2), ("b_labels.nii.gz", 3), ("e_seg.nii", 300)):
        write(tmp_path / name, (0, label), np.int16)
    (tmp_path / "._d.nii.gz").write_text("left by a Mac")
    (tmp_path / "notes.txt").write_text("")
    dataset = folder(tmp_path)
    found = {s.name: (s.image.name, s.labels and s.labels.name) for s in (pair.fixed for pair in dataset.train)}
    assert found.pop("c") == ("c.nii.gz", None)
    assert found == {"a": ("a_t1.nii.gz", "a_seg.nii.gz"), "b": ("b_T1w.nii", "b_labels.nii.gz")}
    assert names(dataset.validation) == ["d_to_e", "e_to_d"]
    assert dataset.labels == (2, 3, 300)
    assert folder(tmp_path) == dataset


def test_folder_without_labels_and_without_validation(tmp_path):
    for name in "abcd":
        write(tmp_path / f"{name}.nii.gz")
    dataset = folder(tmp_path, validation=0)
    assert (len(dataset.train), dataset.validation, dataset.labels) == (12, (), ())
    with pytest.raises(BadInput, match="4 images, 3 for validation"):
        folder(tmp_path, validation=0.75)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("a_t1.nii.gz",), "has 1 file, 1 of them NIfTI images"),
        (("a_t1.nii.gz", "a.nii.gz", "b.nii.gz"), r"a\.nii\.gz and a_t1\.nii\.gz are both images of a"),
        (("a_t1.nii.gz", "b.nii.gz", "x_seg.nii.gz"), r"x_seg\.nii\.gz is a label map without an image"),
    ],
)
def test_folder_refuses_what_it_cannot_pair(tmp_path, files, said):
    for name in files:
        write(tmp_path / name)
    with pytest.raises(BadInput, match=said):
        folder(tmp_path)


def test_pairs_csv_starts_at_its_own_folder(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for subject in ("sub-1", "sub-2"):
        (tmp_path / "brains" / subject).mkdir(parents=True)
        write(tmp_path / "brains" / subject / "t1.nii.gz")
    elsewhere.mkdir()
    absolute = write(elsewhere / "x_seg.nii.gz", (0, 5))
    table = tmp_path / "pairs.csv"
    # As Excel saves it: with a byte order mark and CR LF.
    table.write_bytes(
        "\ufefffixed, moving,fixed_labels,moving_labels\r\n"
        f"brains/sub-1/t1.nii.gz, brains/sub-2/t1.nii.gz,{absolute},brains/sub-1/t1.nii.gz\r\n"
        "brains/sub-2/t1.nii.gz,brains/sub-1/t1.nii.gz,,\r\n".encode()
    )
    dataset = pairs_csv(table)
    assert dataset.train == dataset.validation == dataset.test
    assert names(dataset.test) == ["sub-2-t1.nii.gz_to_sub-1-t1.nii.gz", "sub-1-t1.nii.gz_to_sub-2-t1.nii.gz"]
    first, second = dataset.test
    assert first.fixed.image == tmp_path / "brains/sub-1/t1.nii.gz" and first.fixed.labels == absolute
    assert second.fixed.labels is None and dataset.labels == (5, 7, 9)


def test_pairs_csv_may_say_which_split_a_row_is_in(tmp_path):
    paths = {name: write(tmp_path / f"{name}.nii.gz") for name in "abcd"}
    table = tmp_path / "pairs.csv"
    rows = ("a,b,train", "b,a,train", "c,d,validation", "d,c, test ")
    table.write_text("\n".join(["fixed,moving,split", *(f"{row[0]}.nii.gz,{row[2]}.nii.gz,{row[4:]}" for row in rows)]))
    dataset = pairs_csv(table)
    assert names(dataset.train) == ["b_to_a", "a_to_b"]
    assert names(dataset.validation) == ["d_to_c"] and names(dataset.test) == ["c_to_d"]
    assert dataset.test[0].moving.image == paths["c"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fixed,moving\na.nii,b.nii\na.nii,gone.nii\n", r"row 3: moving .*gone\.nii does not exist"),
        ("fixed,moving\n,b.nii\n", "row 2: fixed is empty"),
        ("fixed,moving\na.nii\n", "row 2: moving is empty"),
        ("fixed,moving,fixed_labels,moving_labels\na.nii,b.nii,a.nii,\n", "row 2 has only one of the two label maps"),
        ("target,source\na.nii,b.nii\n", "has the columns target, source; it needs fixed and moving"),
        ("fixed,moving,split\na.nii,b.nii,train\na.nii,b.nii,val\n", "row 3: split is 'val'; write one of train, val"),
        ("fixed,moving,split\na.nii,b.nii\n", "row 2: split is ''"),
        ("fixed,moving\n", "no rows"),
        ("", r"columns \(none\)"),
        (b"\x1f\x8b\xff\x00", "not a text table"),
    ],
)
def test_pairs_csv_names_the_row(tmp_path, text, said):
    write(tmp_path / "a.nii")
    write(tmp_path / "b.nii")
    table = tmp_path / "pairs.csv"
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput, match=f"pairs.csv .*{said}"):
        pairs_csv(table)
    with pytest.raises(BadInput, match=r"nowhere\.csv does not exist"):
        pairs_csv(tmp_path / "nowhere.csv")
    with pytest.raises(BadInput, match=f"{tmp_path} is a folder; give a CSV file"):
        pairs_csv(tmp_path)


def test_phantoms_are_written_once_and_read_back(tmp_path, monkeypatch):
    directory = tmp_path / "phantoms"
    dataset = phantoms(directory, train=2, validation=1, shape=(32, 33, 34), seed=3)
    assert names(dataset.train) == ["phantom_000_to_phantom_001", "phantom_001_to_phantom_000"]
    assert dataset.validation == () and dataset.labels == tuple(sorted(phantom_module.LABELS))
    assert {path.name for path in directory.iterdir()} == {
        "phantoms.json", *(f"phantom_00{n}_{kind}.nii.gz" for n in range(3) for kind in ("t1", "seg"))
    }  # fmt: skip
    subject = dataset.train[0].moving
    image, labels = phantom_module.phantom(3_000_000, (32, 33, 34))
    np.testing.assert_array_equal(read_image(subject.image).array, image)
    np.testing.assert_array_equal(read_labels(subject.labels).array, labels)
    assert nib.load(subject.labels).get_data_dtype() == np.uint8
    np.testing.assert_array_equal(nib.load(subject.image).affine, np.eye(4))

    times = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    gone = dataset.train[0].fixed.image
    gone.unlink()
    made = []

    def phantom(seed, shape):
        made.append(seed)
        return image, labels

    monkeypatch.setattr("dilformer_jax.data.sources.phantom", phantom)
    assert phantoms(directory, train=2, validation=1, shape=(32, 33, 34), seed=3) == dataset
    assert made == [3_000_001] and gone.is_file()
    kept = [path for path in times if "001" not in path.name]
    assert len(kept) == 5 and all(path.stat().st_mtime_ns == times[path] for path in kept)


def test_phantoms_made_otherwise_are_refused(tmp_path):
    (tmp_path / "phantoms.json").write_text(json.dumps({"shape": [64, 80, 64], "seed": 0}))
    with pytest.raises(BadInput, match=r"holds phantoms made with .*80.*'seed': 0.* not .*'seed': 1"):
        phantoms(tmp_path, seed=1)
    with pytest.raises(BadInput, match=r"not \{'shape': \[32, 32, 32\], 'seed': 0\}"):
        phantoms(tmp_path, shape=(32, 32, 32))
    (tmp_path / "phantoms.json").unlink()
    write(tmp_path / "phantom_000_t1.nii.gz")
    with pytest.raises(BadInput, match="not recorded"):
        phantoms(tmp_path)
    with pytest.raises(BadInput, match="32 voxels or more"):
        phantoms(tmp_path / "new", shape=(64, 16, 64))
    assert not (tmp_path / "new").exists()


def test_every_data_set_is_listed_by_name():
    assert {name: function.__name__ for name, function in DATASETS.items()} == {name: name for name in DATASETS}
    assert len(DATASETS) == 7
    with pytest.raises(BadInput):
        split(Dataset((), (), (), (), ""), "test")


@pytest.mark.data
def test_the_real_lpba40_has_552_and_30_pairs(shared_data):
    dataset = lpba40(shared_data / "lpba40")
    assert [len(pairs) for pairs in (dataset.train, dataset.validation, dataset.test)] == [552, 30, 0]
    assert dataset.train[0].name == "S11_to_S12" and dataset.validation[-1].name == "S40_to_S39"
    assert all(pair.fixed.labels is not None for pair in dataset.train + dataset.validation)


@pytest.mark.data
def test_the_real_ixi_2mm_has_148_regions(shared_data):
    dataset = ixi_2mm(shared_data / "ixi_2mm_affine")
    assert [len(pairs) for pairs in (dataset.train, dataset.validation, dataset.test)] == [56, 12, 0]
    assert len(dataset.labels) == 148 and dataset.labels[-1] == 207
