"""LPBA40: the published splits from every form in which it goes round."""

import pytest
from brains import names, write

from dilformer_jax.data.lpba40 import lpba40
from dilformer_jax.data.subjects import split
from dilformer_jax.io.volumes import BadInput


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


@pytest.mark.data
def test_the_real_lpba40_has_552_and_30_pairs(shared_data):
    dataset = lpba40(shared_data / "lpba40")
    assert [len(pairs) for pairs in (dataset.train, dataset.validation, dataset.test)] == [552, 30, 0]
    assert dataset.train[0].name == "S11_to_S12" and dataset.validation[-1].name == "S40_to_S39"
    assert all(pair.fixed.labels is not None for pair in dataset.train + dataset.validation)
