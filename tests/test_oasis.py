"""OASIS: the same 19 pairs from neurite's, Learn2Reg's and TransMorph's form."""

import json

import numpy as np
import pytest
from brains import names, write, write_pickle

from dilformer_jax.data import structures
from dilformer_jax.data.oasis import oasis
from dilformer_jax.data.volumes import image_of, labels_of
from dilformer_jax.io.volumes import BadInput

RNG = np.random.default_rng(0)


def write_neurite(folder, numbers):
    for number in numbers:
        for kind in ("norm", "seg35", "seg4"):
            for space in ("aligned_", ""):
                (folder / f"OASIS_OAS1_{number:04d}_MR1").mkdir(parents=True, exist_ok=True)
                (folder / f"OASIS_OAS1_{number:04d}_MR1" / f"{space}{kind}.nii.gz").touch()
    (folder / "seg35_labels.txt").touch()


def test_neurites_folders_report_learn2regs_pairs(tmp_path):
    write_neurite(tmp_path, [*range(1, 31), 37, *range(438, 458)])
    dataset = oasis(tmp_path)
    assert names(dataset.test)[:2] == ["0439_to_0438", "0440_to_0439"] and len(dataset.test) == 19
    assert len(dataset.train) == 11 * 10 and len(dataset.validation) == 19
    assert names(dataset.validation)[-1] == "0037_to_0030"
    train = {subject.name for pair in dataset.train for subject in (pair.fixed, pair.moving)}
    held = {subject.name for pair in dataset.validation for subject in (pair.fixed, pair.moving)}
    assert train == {f"{n:04d}" for n in range(1, 12)} and not train & held and len(held) == 20
    first = dataset.test[0].fixed
    assert first.image == tmp_path / "OASIS_OAS1_0438_MR1/aligned_norm.nii.gz"
    assert first.labels == tmp_path / "OASIS_OAS1_0438_MR1/aligned_seg35.nii.gz"
    assert dataset.labels == tuple(range(1, 36)) and "agreement" in dataset.licence
    four = oasis(tmp_path, segmentation="seg4", aligned=False, validation=0)
    assert four.labels == (1, 2, 3, 4) and four.test[0].fixed.labels.name == "seg4.nii.gz"
    assert four.test[0].fixed.image.name == "norm.nii.gz" and len(four.train) == 31 * 30
    with pytest.raises(BadInput, match="segmentation is 'seg24'; choose one of seg35, seg4"):
        oasis(tmp_path, segmentation="seg24")


def test_the_35_structures_are_freesurfers_in_order():
    # FreeSurfer's table of colours, less the fluid around the brain (24): sorted, they are numbered from 1.
    assert sorted(structures.OASIS_IDS) == list(structures.OASIS_IDS) and len(structures.OASIS) == 35
    assert structures.OASIS[1] == "left cerebral white matter" and structures.OASIS[13] == "brainstem"
    assert structures.OASIS[20] == "right cerebral white matter" and structures.OASIS[35] == "right choroid plexus"


def test_learn2regs_description_names_the_pairs(tmp_path):
    for number in (1, 2, 3, 395, 396):
        write(tmp_path / f"imagesTr/OASIS_{number:04d}_0000.nii.gz")
        write(tmp_path / f"labelsTr/OASIS_{number:04d}_0000.nii.gz")
    path = "./imagesTr/OASIS_{:04d}_0000.nii.gz"
    content = {
        "training": [{"image": path.format(n), "label": "", "mask": ""} for n in (1, 2, 3, 395, 396)],
        "registration_val": [{"fixed": path.format(395), "moving": path.format(396)}],
    }
    (tmp_path / "OASIS_dataset.json").write_text(json.dumps(content))
    dataset = oasis(tmp_path)
    assert names(dataset.test) == ["0396_to_0395"] and len(dataset.train) == 6 and dataset.validation == ()
    assert dataset.test[0].moving.labels == tmp_path / "labelsTr/OASIS_0396_0000.nii.gz"
    assert dataset.test[0].moving.image == tmp_path / "imagesTr/OASIS_0396_0000.nii.gz"
    (tmp_path / "imagesTr/OASIS_0396_0000.nii.gz").unlink()
    with pytest.raises(BadInput, match=r"OASIS_0396_0000\.nii\.gz, which OASIS_dataset\.json names, does not exist"):
        oasis(tmp_path)
    (tmp_path / "OASIS_dataset.json").write_text("{}")
    with pytest.raises(BadInput, match=r"OASIS_dataset\.json is damaged"):
        oasis(tmp_path)


@pytest.mark.parametrize("folder", ["All", "Train"])
def test_transmorphs_pickles_of_four_are_pairs_of_two_subjects(tmp_path, folder):
    x, y, z = RNG.random((3, 3, 4, 5)).astype(np.float32)
    x_seg, y_seg, z_seg = RNG.integers(0, 36, (3, 3, 4, 5)).astype(np.int16)
    for number in (2, 10):
        write_pickle(tmp_path / folder / f"subject_{number}.pkl", x, x_seg)
    # TransMorph registers the first to the second, and names its displacement as Learn2Reg does, fixed before moving.
    write_pickle(tmp_path / "Test/p_0438_0439.pkl", y, x, y_seg, x_seg)
    write_pickle(tmp_path / "Test/p_0439_0440.pkl", z, y, z_seg, y_seg)
    dataset = oasis(tmp_path)
    assert names(dataset.train) == ["subject_2_to_subject_10", "subject_10_to_subject_2"]
    assert names(dataset.test) == ["0439_to_0438", "0440_to_0439"]
    for subject, image, labels in (
        (dataset.test[0].moving, y, y_seg),
        (dataset.test[0].fixed, x, x_seg),
        (dataset.test[1].fixed, y, y_seg),
        (dataset.test[1].moving, z, z_seg),
    ):
        volume = image_of(subject)
        np.testing.assert_array_equal(volume.array, image)
        np.testing.assert_array_equal(labels_of(subject, volume).array, labels)
