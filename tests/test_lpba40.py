"""LPBA40: the published splits from every form in which it goes round."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from brains import names, write, write_pickle

from dilformer_jax.data.lpba40 import axes_of, lpba40
from dilformer_jax.data.preprocessing import load
from dilformer_jax.data.subjects import split
from dilformer_jax.data.volumes import files_of, image_of, labels_of
from dilformer_jax.io.geometry import orientation, spacing
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


def regions(axes="RAS"):
    """A map of a few of LPBA40's regions where they lie in a head, its array axes pointing so."""
    ras = np.zeros((6, 7, 8), np.uint8)
    for label, place in {
        21: (1, 5, 4),
        22: (4, 5, 4),
        61: (1, 1, 4),
        62: (4, 1, 4),
        43: (1, 2, 6),
        44: (4, 2, 6),
        85: (1, 3, 1),
        86: (4, 3, 1),
        163: (2, 3, 3),
        164: (3, 3, 3),
    }.items():
        ras[place] = label
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    return nib.orientations.apply_orientation(ras, turn)


def write_archive(folder, numbers, array, *, kind=nib.AnalyzeImage, packed="img"):
    """LONI's files, an Analyze or a NIfTI pair of which gzip has packed one file or both, or neither."""
    for number in numbers:
        name = f"S{number:02d}"
        (folder / name).mkdir(parents=True)
        for what, kept in (("skullstripped", array + np.int16(number)), ("structure.label", array)):
            base = folder / name / f"{name}.delineation.{what}"
            image = kind(kept[..., None].astype(np.int16), np.diag([1, 1.5, 2, 1]))
            nib.save(image, f"{base}.img")
            for end in ("hdr", "img"):
                if end in packed:
                    path = base.with_name(f"{base.name}.{end}")
                    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
                    path.unlink()


@pytest.mark.parametrize("packed", ["", "img", "hdr img"])
@pytest.mark.parametrize("below", ["", "delineation_space", "LPBA40/delineation_space"])
def test_lonis_archive_of_analyze_pairs_is_read(tmp_path, packed, below):
    axes = "LPS"
    write_archive(tmp_path / below, (1, 2, 12, 13, 36), regions(axes), packed=packed)
    files = sorted(tmp_path.rglob("*"))
    dataset = lpba40(tmp_path)
    assert names(dataset.train) == ["S12_to_S13", "S13_to_S12"] and dataset.validation == ()
    assert names(dataset.test) == ["S01_to_S02", "S02_to_S01"]
    subject = dataset.train[0].fixed
    assert subject.axes == axes
    image = image_of(subject)
    np.testing.assert_array_equal(image.array, regions(axes) + np.float32(13))
    assert orientation(image.affine) == axes and spacing(image.affine) == (1, 1.5, 2)
    np.testing.assert_array_equal(labels_of(subject, image).array, regions(axes))
    assert sorted(tmp_path.rglob("*")) == files, "something was left behind"
    assert len(files_of(subject)) == 4 and all(path.is_file() for path in files_of(subject))
    loaded, labels = load(subject, {"normalise": "none"})
    np.testing.assert_array_equal(loaded[..., 0], image.array)
    np.testing.assert_array_equal(labels, regions(axes))
    assert lpba40(tmp_path, axes="RAS").train[0].fixed.axes == "RAS"


def test_lonis_archive_of_nifti_pairs_says_itself_where_it_lies(tmp_path):
    write_archive(tmp_path, (35, 36), regions("LAS"), kind=nib.Nifti1Pair)
    subject = lpba40(tmp_path).validation[0].fixed
    assert subject.axes is None and orientation(image_of(subject).affine) == "RAS"


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SRA", "PIL", "IAR"])
def test_the_regions_show_where_axes_point_to(axes):
    assert axes_of(regions(axes)) == axes
    assert axes_of(np.where(regions(axes) > 40, regions(axes), 0)) is None  # no frontal ones


def test_an_archive_that_shows_no_axes_asks_for_them(tmp_path):
    write_archive(tmp_path, (11, 12), np.full((3, 4, 5), 21))
    with pytest.raises(BadInput, match=r"S11\.delineation\.structure\.label\.img\.gz has too few regions"):
        lpba40(tmp_path)
    for path in tmp_path.rglob("*label*"):
        path.unlink()
    with pytest.raises(BadInput, match=r"does not say how it lies and has no delineation\.structure\.label beside it"):
        lpba40(tmp_path)
    with pytest.raises(BadInput, match="axes is 'RAR'"):
        lpba40(tmp_path, axes="RAR")
    (tmp_path / "S12" / "S12.delineation.skullstripped.hdr").unlink()
    pair = lpba40(tmp_path, axes="RAS").train[0]
    with pytest.raises(BadInput, match=r"has no S12\.delineation\.skullstripped\.hdr or .*\.hdr\.gz beside it"):
        image_of(pair.moving if pair.moving.name == "S12" else pair.fixed)


@pytest.mark.parametrize("inside", [False, True])
def test_transmatchs_form_has_s01_as_fixed(tmp_path, inside):
    base = tmp_path / "delineation_l_norm"
    write(base / "fixed.nii.gz")
    for name in ("train/S11.delineation.skullstripped", "train/S12.delineation.skullstripped", "test/S02"):
        write(base / f"{name}.nii.gz")
    for name in ("S01", "S02", "S11"):
        write(tmp_path / "label" / f"{name}.delineation.structure.label.nii.gz")
    dataset = lpba40(base if inside else tmp_path)
    assert names(dataset.train) == ["S11_to_S12", "S12_to_S11"] and names(dataset.test) == ["S01_to_S02", "S02_to_S01"]
    assert dataset.test[0].moving.image == base / "fixed.nii.gz"
    assert dataset.test[0].moving.labels == tmp_path / "label/S01.delineation.structure.label.nii.gz"
    assert dataset.train[0].fixed.labels is None


def test_rdps_pickles_report_its_val_folder_and_choose_by_the_last_six_of_train(tmp_path):
    arrays = np.ones((2, 2, 2), np.float32), np.zeros((2, 2, 2), np.uint16)
    for number in range(11, 41):
        write_pickle(tmp_path / "Train" / f"subject_{number:02d}.pkl", *arrays)
    for number in range(1, 11):
        write_pickle(tmp_path / "Val" / f"subject_{number:02d}.pkl", *arrays)
    dataset = lpba40(tmp_path)
    assert [len(pairs) for pairs in (dataset.train, dataset.validation, dataset.test)] == [24 * 23, 30, 90]
    assert names(dataset.validation)[0] == "subject_35_to_subject_36"
    assert dataset.test[0].fixed.image == dataset.test[0].fixed.labels == tmp_path / "Val/subject_02.pkl"
    assert dataset.names[21] == "left superior frontal gyrus" and dataset.names[166] == "right hippocampus"
    assert set(dataset.labels) == set(dataset.names) - {181, 182}


@pytest.mark.data
def test_the_real_lpba40_has_552_and_30_pairs(shared_data):
    dataset = lpba40(shared_data / "lpba40")
    assert [len(pairs) for pairs in (dataset.train, dataset.validation, dataset.test)] == [552, 30, 0]
    assert dataset.train[0].name == "S11_to_S12" and dataset.validation[-1].name == "S40_to_S39"
    assert all(pair.fixed.labels is not None for pair in dataset.train + dataset.validation)
    # Their headers say LPS, their regions RAS: half a turn about the axis that points up, the same for all.
    assert axes_of(np.asarray(nib.load(dataset.validation[0].fixed.labels).dataobj)) == "RAS"
