"""What `dataset.json` says of pairs and of subjects, and what is said of what is missing."""

import json
from itertools import pairwise

import numpy as np
import pytest
from brains import write

from dilformer_jax.data.origins import missing, spans
from dilformer_jax.data.prepared import FORMAT, paired, pairing, prepared
from dilformer_jax.data.subjects import Dataset, Pair, Subject, everyone, ordered_pairs
from dilformer_jax.data.volumes import image_of, labels_of
from dilformer_jax.io.volumes import BadInput


def subjects(*names, folder="x", labels=True):
    from pathlib import Path

    return [Subject(name, Path(folder, name), Path(folder, f"{name}_seg") if labels else None) for name in names]


@pytest.mark.parametrize(
    ("pairs", "kind"),
    [
        (ordered_pairs(subjects(*"abcd")), "ordered"),
        (ordered_pairs(subjects("a", "b")), "ordered"),
        ((), "ordered"),
        (tuple(Pair(s, subjects("atlas")[0]) for s in subjects("c", "a", "b")), "atlas moving"),
        (tuple(Pair(subjects("atlas")[0], s) for s in subjects("c", "a", "b")), "atlas fixed"),
        (tuple(Pair(one, next) for one, next in pairwise(subjects(*"abcd"))), None),
        (ordered_pairs(subjects(*"abcd"))[1:], None),
    ],
)
def test_pairs_are_told_shortly_and_come_back(pairs, kind):
    told = json.loads(json.dumps(pairing(pairs)))
    assert kind is None or told["pairs"] == kind
    everybody = {subject.name: subject for pair in pairs for subject in (pair.fixed, pair.moving)}
    assert paired(told, everybody) == pairs


def test_descriptions_that_are_damaged_or_not_ours_are_told_apart(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text('{"name": "OASIS", "training": []}')  # Learn2Reg's
    with pytest.raises(BadInput, match="has no dataset.json of a prepared data set"):
        prepared(tmp_path)
    path.write_text("{")
    with pytest.raises(BadInput, match=r"dataset\.json cannot be read .*prepare the data set again"):
        prepared(tmp_path)
    path.write_text(json.dumps({"format": FORMAT, "dataset": "folder", "subjects": {}}))
    with pytest.raises(BadInput, match=r"dataset\.json is damaged \(KeyError"):
        prepared(tmp_path)
    content = {
        "format": FORMAT,
        "dataset": "folder",
        "licence": "",
        "labels": {"3": None},
        "splits": {part: {"pairs": "ordered", "subjects": []} for part in ("train", "validation", "test")},
        "subjects": {"a": {"image": "a_t1.nii.gz", "labels": None}},
    }
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"a_t1\.nii\.gz, of which .*dataset\.json tells, does not exist"):
        prepared(tmp_path)
    write(tmp_path / "a_t1.nii.gz")
    assert prepared(tmp_path).labels == (3,) and prepared(tmp_path).names == {}


def test_what_is_missing_is_named():
    def of(*names, labels=True):
        return Dataset(ordered_pairs(subjects(*names, labels=labels)), (), (), (), "")

    numbers = [f"S{number:02d}" for number in range(1, 41)]
    assert missing("lpba40", of(*numbers)) == ()
    (said,) = missing("lpba40", of(*numbers[10:20], *numbers[21:]))
    assert said.startswith("11 of the 40 subjects of lpba40 are missing (S01-S10, S21); get them from https://")
    (said,) = missing("lpba40", of("subject_01", "subject_02"))
    assert said.startswith("2 of 40 subjects of lpba40 are there; get it from https://resource.loni.usc.edu")
    *_, said = missing("lpba40", of(*numbers, labels=False))
    assert said.startswith("40 of 40 subjects have no label map (S01-S40)")
    assert missing("folder", of("a", "b", labels=False)) == ()
    atlas = subjects("atlas")[0]
    pairs = [tuple(Pair(s, atlas) for s in subjects(*map(str, range(n)))) for n in (403, 57, 115)]
    (said,) = missing("ixi", Dataset(*pairs, (), ""))
    assert said.startswith("ixi has 57 of 58 validation subjects; get the others from")
    assert spans(["a1", "a2", "a4", "b", "b5", "b6"]) == "a1-a2, a4, b, b5-b6"


def test_subjects_of_one_name_stay_together():
    first, again = subjects("a", folder="1")[0], subjects("a", folder="2")[0]
    other = subjects("b")[0]
    dataset = Dataset((Pair(again, other),), (Pair(first, other),), (), (), "")
    assert everyone(dataset) == {"a": (first, again), "b": (other,)}


def test_labels_of_another_format_than_their_image_match_it_voxel_for_voxel(tmp_path):
    image, labels = np.random.default_rng(0).random((4, 5, 6)), np.resize([0, 7, 9], (4, 5, 6))
    np.savez(tmp_path / "a.npz", vol=image)
    np.savez(tmp_path / "seg.npz", seg=labels)
    subject = Subject("a", tmp_path / "a.npz", write(tmp_path / "a_seg.nii.gz"), axes="LPS")
    volume = image_of(subject)
    np.testing.assert_array_equal(np.diag(volume.affine), (-1, -1, 1, 1))
    found = labels_of(subject, volume)
    np.testing.assert_array_equal(found.array, labels)
    np.testing.assert_array_equal(found.affine, volume.affine)
    other = Subject("a", write(tmp_path / "b.nii.gz"), tmp_path / "seg.npz")
    np.testing.assert_array_equal(labels_of(other, image_of(other)).array, labels)
    np.savez(tmp_path / "seg.npz", seg=labels[:2])
    with pytest.raises(BadInput, match=r"seg\.npz is 2x5x6, .*b\.nii\.gz 4x5x6; give labels of that image"):
        labels_of(other, image_of(other))
