"""Data sets of one's own: which files of a folder belong together, and what a table of pairs says."""

import numpy as np
import pytest
from brains import names, write, write_pickle

from dilformer_jax.data.folders import folder, glob, pairs_csv
from dilformer_jax.data.preprocessing import load
from dilformer_jax.io.volumes import BadInput


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


def test_folder_keeps_the_last_subjects_to_be_reported(tmp_path):
    for name in "abcdefghij":
        write(tmp_path / f"{name}.nii.gz")
    dataset = folder(tmp_path, test=0.3)
    assert [pair.name for pair in dataset.validation] == ["f_to_g", "g_to_f"]
    assert {subject.name for pair in dataset.test for subject in (pair.fixed, pair.moving)} == set("hij")
    assert len(dataset.train) == 5 * 4
    with pytest.raises(BadInput, match="10 images, 5 for validation and 4 for test"):
        folder(tmp_path, validation=0.5, test=0.4)


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
        ("fixed,moving,moving_points\na.nii,b.nii,a.nii\n", "row 2 has only one of the two tables of points"),
        ("fixed,moving,fixed_points,moving_points\na.nii,b.nii,c.csv,a.nii\n", "fixed_points .*c.csv does not exist"),
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


def test_a_folder_of_archives_and_pickles_has_their_labels(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", vol=rng.random((3, 4, 5)), seg=np.resize([0, 4, 6], (3, 4, 5)))
    np.savez(tmp_path / "c.npz", vol=rng.random((3, 4, 5)))
    write_pickle(tmp_path / "d.pkl", rng.random((3, 4, 5)), np.resize([0, 9], (3, 4, 5)))
    dataset = folder(tmp_path, validation=0)
    assert dataset.labels == (4, 6, 9)
    found = {subject.name: subject for pair in dataset.train for subject in (pair.fixed,)}
    assert [found[name].labels and found[name].labels.name for name in "abcd"] == ["a.npz", "b.npz", None, "d.pkl"]
    image, labels = load(found["b"], {"normalise": "minmax"})
    with np.load(tmp_path / "b.npz") as archive:
        vol = archive["vol"].astype(np.float32)
        np.testing.assert_array_equal(labels, archive["seg"])
    np.testing.assert_allclose(image[..., 0], (vol - vol.min()) / (vol.max() - vol.min()), rtol=1e-6)


def bids(folder, *ids):
    for name in ids:
        write(folder / f"sub-{name}/anat/sub-{name}_T1w.nii.gz")
        write(folder / f"derivatives/seg/sub-{name}/sub-{name}_dseg.nii.gz", (0, 3))


def test_glob_names_subjects_by_what_tells_them_apart(tmp_path):
    bids(tmp_path, "01", "02", "10")
    write(tmp_path / "sub-01/anat/._sub-01_T1w.nii.gz")
    dataset = glob(
        tmp_path, images="sub-*/anat/*_T1w.nii.gz", labels="derivatives/seg/sub-*/*_dseg.nii.gz", validation=0
    )
    assert names(dataset.train)[0] == "sub-01_to_sub-02" and len(dataset.train) == 6 and dataset.labels == (3,)
    subject = dataset.train[0].moving
    assert subject.labels == tmp_path / "derivatives/seg/sub-01/sub-01_dseg.nii.gz"
    # Patterns of another number of wildcards: by name. Without labels: none are scored.
    other = glob(tmp_path, images="sub-*/anat/*_T1w.nii.gz", labels="**/*_dseg.nii.gz", validation=0)
    assert {s.name: s.labels.parent.name for p in other.train for s in (p.fixed,)} == {
        name: name for name in ("sub-01", "sub-02", "sub-10")
    }
    assert glob(tmp_path, images="sub-??/anat/*_T1w.nii.gz").labels == ()
    assert len(glob(tmp_path, images="sub-0[!3]/anat/*_T1w.nii.gz").train) == 2


def test_glob_joins_wildcards_where_no_single_one_tells(tmp_path):
    for name in ("a", "b"):
        for visit in ("1", "2"):
            write(tmp_path / name / visit / "t1.nii.gz")
    dataset = glob(tmp_path, images="*/*/t1.nii.gz", validation=0.5)
    assert names(dataset.train) == ["a-1_to_a-2", "a-2_to_a-1"] and len(dataset.validation) == 2
    write(tmp_path / "a/1/seg.nii.gz")
    write(tmp_path / "c/1/seg.nii.gz")
    with pytest.raises(BadInput, match=r"c/1/seg\.nii\.gz is a label map without an image that matches"):
        glob(tmp_path, images="*/*/t1.nii.gz", labels="*/*/seg.nii.gz")
    with pytest.raises(BadInput, match=r"0 images that match '\*_T1w\.nii'; give"):
        glob(tmp_path, images="*_T1w.nii")
    with pytest.raises(BadInput, match="no label maps that match"):
        glob(tmp_path, images="*/*/t1.nii.gz", labels="*.mgz")
    with pytest.raises(BadInput, match="no pattern of files below a folder"):
        glob(tmp_path, images="/root/*.nii")
