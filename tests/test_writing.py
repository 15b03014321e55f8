import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from nifti_files import AFFINE, noise, save

from dilformer_jax.io.volumes import (
    BadInput,
    Volume,
    read_image,
    read_labels,
    replacing,
    write_image,
    write_labels,
)


def volume(path: Path) -> Volume:
    return read_image(save(path, noise()))


@pytest.mark.parametrize(
    ("low", "high", "stored"),
    [
        (0, 255, np.uint8),
        (-1, 100, np.int8),
        (-1, 200, np.int16),
        (0, 14175, np.int16),
        (0, 40000, np.uint16),
        (-1, 40000, np.int32),
        (0, 614454277, np.int32),  # not a float32
    ],
)
def test_labels_come_back_exactly_in_the_smallest_type(tmp_path, low, high, stored):
    labels = noise(np.int32)
    labels.flat[:2] = low, high
    write_labels(tmp_path / "b.nii.gz", labels, like=volume(tmp_path / "a.nii"))
    assert nib.load(tmp_path / "b.nii.gz").get_data_dtype() == stored
    back = read_labels(tmp_path / "b.nii.gz").array
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, labels)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "b.nii.gz"))).T, labels)


def test_written_labels_must_be_whole_and_fit(tmp_path):
    like = volume(tmp_path / "a.nii")
    write_labels(tmp_path / "float.nii", noise(np.float32), like)  # nearest-neighbour warps give whole floats
    np.testing.assert_array_equal(read_labels(tmp_path / "float.nii").array, noise(np.int32))
    for wrong in (noise() + 0.5, noise(np.float64) * 1e9, noise() * np.nan):
        with pytest.raises(ValueError, match="whole 32-bit numbers"):
            write_labels(tmp_path / "b.nii", wrong, like)
    assert not (tmp_path / "b.nii").exists()


@pytest.mark.parametrize("codes", [(1, 1), (2, 0), (0, 1), (4, 2)])
@pytest.mark.parametrize("write", [write_image, write_labels])
def test_output_lies_where_the_reference_lies(tmp_path, codes, write):
    reference = save(
        tmp_path / "a.nii.gz", noise(), codes=codes, xyzt_units=10, descrip=b"secret", cal_max=50, intent_code=3
    )
    like = read_image(reference)
    write(tmp_path / "b.nii.gz", noise(), like)
    header = nib.load(tmp_path / "b.nii.gz").header
    for affine in (nib.load(tmp_path / "b.nii.gz").affine, header.get_sform(), header.get_qform()):
        np.testing.assert_allclose(affine, AFFINE, atol=1e-6)
    if codes[0]:
        np.testing.assert_array_equal(header.get_sform(), AFFINE, "bit for bit")
    assert (header["sform_code"], header["qform_code"]) == codes
    assert header.get_xyzt_units() == ("mm", "sec")
    assert (header["descrip"], header["cal_max"], header["intent_code"]) == (b"", 0, 0), "stale fields"
    ours, theirs = sitk.ReadImage(str(tmp_path / "b.nii.gz")), sitk.ReadImage(str(reference))
    for place in ("GetOrigin", "GetSpacing", "GetDirection", "GetSize"):
        np.testing.assert_allclose(getattr(ours, place)(), getattr(theirs, place)(), atol=1e-6)


def test_a_volume_made_in_memory_is_written_with_its_affine(tmp_path):
    header = nib.Nifti1Header()
    write_image(tmp_path / "a.nii", noise(), Volume(noise(), AFFINE, tmp_path / "memory", header))
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii").affine, AFFINE)


def test_a_file_can_be_replaced_by_what_was_read_from_it(tmp_path):
    image = volume(tmp_path / "a.nii")
    write_image(image.path, image.array + 1, image)
    np.testing.assert_array_equal(image.array, noise())
    np.testing.assert_array_equal(read_image(image.path).array, noise() + 1)


def test_equal_volumes_are_equal_files(tmp_path):
    like = volume(tmp_path / "a.nii")
    for name in ("b.nii.gz", "c.nii.gz"):
        write_image(tmp_path / name, noise(), like)
    content = [gzip.decompress((tmp_path / name).read_bytes()) for name in ("b.nii.gz", "c.nii.gz")]
    assert content[0] == content[1]
    assert (tmp_path / "b.nii.gz").read_bytes() == (tmp_path / "c.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("b.mha", "no name for a NIfTI"),
        ("b", "no name for a NIfTI"),
        ("none/b.nii", "no directory"),
        ("a.nii/b.nii", "no directory"),
    ],
)
def test_names_that_cannot_be_written(tmp_path, name, found):
    like = volume(tmp_path / "a.nii")
    for write in (write_image, write_labels):
        with pytest.raises(BadInput, match=rf"{tmp_path / name} .*{found}.*; .*\.$"):
            write(tmp_path / name, noise(), like)
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii"]


def test_a_directory_is_not_replaced(tmp_path):
    like = volume(tmp_path / "a.nii")
    (tmp_path / "b.nii").mkdir()
    with pytest.raises(BadInput, match=r"b.nii cannot be written \(Is a directory\)"):
        write_image(tmp_path / "b.nii", noise(), like)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii", "b.nii"]


def test_a_wrong_shape_is_our_fault(tmp_path):
    with pytest.raises(ValueError, match=r"\(4, 6, 7\).*\(5, 6, 7\)"):
        write_image(tmp_path / "b.nii", noise()[1:], volume(tmp_path / "a.nii"))


def test_a_failure_keeps_the_old_file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("notes.txt", "old")]
    with replacing(path) as partial:
        assert partial.parent == tmp_path
        partial.write_text("new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("notes.txt", "new")]
