"""Mindboggle-101: cohorts make the splits."""

import pytest
from brains import names

from dilformer_jax.data.mindboggle import mindboggle
from dilformer_jax.io.volumes import BadInput


def touch(folder, subject, *files):
    (folder / subject).mkdir(parents=True)
    for file in files:
        (folder / subject / file).touch()


BRAIN, MAP = "t1weighted_brain.MNI152.nii.gz", "labels.DKT31.manual.MNI152.nii.gz"


@pytest.mark.parametrize("below", ["{}_volumes", "", "volumes/{}_volumes"])
def test_cohorts_make_the_splits(tmp_path, below):
    for cohort, numbers in {
        "NKI-RS-22": (1, 2),
        "NKI-TRT-20": (10, 9),
        "OASIS-TRT-20": (1, 2),
        "MMRR-21": (1, 2, 3, 21),
        "MMRR-3T7T-2": (1, 2),
        "HLN-12": (1,),
        "Twins-2": (1,),
    }.items():
        for number in numbers:
            touch(tmp_path / below.format(cohort), f"{cohort}-{number}", BRAIN, MAP, "t1weighted.nii.gz")
    dataset = mindboggle(tmp_path)
    assert names(dataset.test) == ["MMRR-21-2_to_MMRR-21-3", "MMRR-21-3_to_MMRR-21-2"]
    assert names(dataset.validation) == ["OASIS-TRT-20-1_to_OASIS-TRT-20-2", "OASIS-TRT-20-2_to_OASIS-TRT-20-1"]
    assert names(dataset.train)[2] == "NKI-RS-22-1_to_NKI-TRT-20-10" and len(dataset.train) == 12
    assert names(dataset.train)[1] == "NKI-RS-22-1_to_NKI-TRT-20-9"
    assert dataset.test[0].fixed.labels.name == MAP and len(mindboggle(tmp_path, without=()).test) == 12
    assert len(dataset.labels) == 62 and dataset.names[2035] == "right insula" and 1001 not in dataset.labels
    with pytest.raises(BadInput, match=r"no NKI-RS-22-1/t1weighted_brain\.nii\.gz"):
        mindboggle(tmp_path, space="native")
    with pytest.raises(BadInput, match="space is 'MNI'; choose one of MNI152, native"):
        mindboggle(tmp_path, space="MNI")
