"""IXI: the splits of TransMorph's form, and of twelve brains at 2 mm."""

import pickle

import numpy as np
import pytest
from brains import names, write

from dilformer_jax.data.ixi import ixi, ixi_2mm
from dilformer_jax.io.volumes import BadInput


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


@pytest.mark.data
def test_the_real_ixi_2mm_has_148_regions(shared_data):
    dataset = ixi_2mm(shared_data / "ixi_2mm_affine")
    assert [len(pairs) for pairs in (dataset.train, dataset.validation, dataset.test)] == [56, 12, 0]
    assert len(dataset.labels) == 148 and dataset.labels[-1] == 207
