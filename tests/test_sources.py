"""Data sets by name, and what is said of folders that hold none of them."""

import pytest

from dilformer_jax.data.sources import DATASETS
from dilformer_jax.data.subjects import Dataset, split
from dilformer_jax.io.volumes import BadInput


@pytest.mark.parametrize(
    ("name", "looked_for"),
    [
        ("lpba40", "S01_t1.nii.gz"),
        ("ixi_2mm", "NAME_t1.nii.gz"),
        ("ixi", "atlas.pkl"),
        ("oasis", "OASIS_OAS1_0001_MR1"),
        ("mindboggle", "NKI-RS-22-1"),
        ("folder", "NAME_t1.nii.gz"),
    ],
)
def test_missing_and_empty_directories_are_named_with_what_was_looked_for(tmp_path, name, looked_for):
    with pytest.raises(BadInput, match=f"{tmp_path}/nowhere does not exist, .*{looked_for}"):
        DATASETS[name](tmp_path / "nowhere")
    with pytest.raises(BadInput, match=f"{tmp_path} has 0 files, .*{looked_for}"):
        DATASETS[name](tmp_path)


def test_every_data_set_is_listed_by_name():
    assert {name: function.__name__ for name, function in DATASETS.items()} == {name: name for name in DATASETS}
    assert len(DATASETS) == 11
    with pytest.raises(BadInput):
        split(Dataset((), (), (), (), ""), "test")
