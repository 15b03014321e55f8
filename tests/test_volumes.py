import gzip
import logging
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from dilformer_jax.io.volumes import (
    BadInput,
    Volume,
    check_same_grid,
    normalise,
    read_image,
    read_labels,
    replacing,
    write_image,
    write_labels,
)

AFFINE = np.array([[0, -2.0, 0, 30], [1, 0, 0, -7.5], [0, 0, 3, 4], [0, 0, 0, 1]])
SHAPE = (5, 6, 7)


def noise(dtype: type = np.float32, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE, codes: tuple[int, int] = (1, 1), **fields) -> Path:
    """A NIfTI file made by nibabel alone, with further header fields as they are given."""
    header = nib.Nifti1Header()
    header.set_data_dtype(array.dtype)
    header.set_qform(AFFINE if np.linalg.det(affine) == 0 else affine, code=codes[1])
    header.set_sform(affine, code=codes[0])
    slope, inter = fields.pop("scl", (None, None))
    for name, value in fields.items():
        header[name] = value
    image = nib.Nifti1Image(array, None, header)
    image.header.set_slope_inter(slope, inter)
    image.to_filename(path)
    return path


def volume(path: Path, affine: np.ndarray = AFFINE, shape: tuple[int, ...] = SHAPE) -> Volume:
    return read_image(save(path, noise(shape=shape), affine))


def test_read_image_gives_float32_and_the_place(tmp_path):
    image = read_image(str(save(tmp_path / "a.nii.gz", noise(np.int16))))
    assert image.array.dtype == np.float32
    assert image.path == tmp_path / "a.nii.gz"
    np.testing.assert_array_equal(image.array, noise())
    np.testing.assert_array_equal(image.affine, AFFINE)


def test_read_image_applies_slope_and_intercept(tmp_path):
    image = read_image(save(tmp_path / "a.nii", noise(np.uint8), scl=(0.5, -3)))
    np.testing.assert_array_equal(image.array, 0.5 * noise() - 3)


@pytest.mark.parametrize("tail", [(1,), (1, 1)])
def test_trailing_single_axes_are_dropped(tmp_path, tail):
    array = noise(shape=(*SHAPE, *tail))
    assert read_image(save(tmp_path / "a.nii", array)).array.shape == SHAPE
    np.testing.assert_array_equal(read_labels(save(tmp_path / "b.nii", array)).array, array.reshape(SHAPE))


def test_thin_and_single_slices_are_read(tmp_path):
    assert read_image(save(tmp_path / "a.nii", noise(shape=(5, 6, 1)))).array.shape == (5, 6, 1)


def text(path: Path) -> Path:
    path.write_text("These are not the voxels you are looking for.\n" * 20)
    return path


def cut(path: Path, size: int) -> Path:
    save(path, np.random.default_rng(0).normal(size=(12, 12, 12)).astype(np.float32))
    path.write_bytes(path.read_bytes()[:size])
    return path


def with_values(path: Path, *values: float) -> Path:
    array = noise()
    array.flat[: len(values)] = values
    return save(path, array)


def mgh(path: Path) -> Path:
    nib.MGHImage(noise(), AFFINE).to_filename(path)
    return path


def hdf5(path: Path) -> Path:
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600))
    return path


def coloured(path: Path) -> Path:
    return save(path, np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]))


def zero_slope_matrix(*zero: int) -> np.ndarray:
    affine = AFFINE.copy()
    affine[:, zero] = 0
    return affine


def shifted(mm: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 3] += mm
    return affine


BOTH = (read_image, read_labels)
REFUSED = {
    "missing": (lambda d: d / "a.nii.gz", "does not exist", BOTH),
    "directory": (lambda d: d, "is a directory", BOTH),
    "text as .nii.gz": (lambda d: text(d / "a.nii.gz"), r"not compressed by gzip .*\(920 bytes\)", BOTH),
    "text as .nii": (lambda d: text(d / "a.nii"), r"no NIfTI file \(920 bytes\)", BOTH),
    "other suffix": (lambda d: text(d / "a.txt"), "no NIfTI file", BOTH),
    "empty": (lambda d: cut(d / "a.nii", 0), r"no NIfTI file \(0 bytes\)", BOTH),
    "header cut": (lambda d: cut(d / "a.nii.gz", 60), r"cut short .*\(60 bytes\)", BOTH),
    "voxels cut": (lambda d: cut(d / "a.nii.gz", 4000), r"cut short .*\(4000 bytes\)", BOTH),
    "voxels cut, plain": (lambda d: cut(d / "a.nii", 4000), r"cut short .*\(4000 bytes\)", BOTH),
    "FreeSurfer": (lambda d: mgh(d / "a.mgz"), "is a MGHImage", BOTH),
    # For these nibabel would import what is not installed.
    "zstandard": (lambda d: text(d / "a.nii.zst"), "no NIfTI file", BOTH),
    "HDF5": (lambda d: hdf5(d / "a.mnc"), "no NIfTI file", BOTH),
    "4-D": (lambda d: save(d / "a.nii", noise(shape=(5, 6, 7, 2))), r"4-D \(5x6x7x2\)", BOTH),
    "2-D": (lambda d: save(d / "a.nii", noise(shape=(5, 6))), r"2-D \(5x6\)", BOTH),
    "coloured": (lambda d: coloured(d / "a.nii"), "'R'.* voxels", BOTH),
    "complex": (lambda d: save(d / "a.nii", noise(np.complex64)), "complex64 voxels", BOTH),
    "NaN": (lambda d: with_values(d / "a.nii", np.nan, np.inf, -np.inf), "has 3 NaN or infinite voxels", BOTH),
    "beyond float32": (lambda d: save(d / "a.nii", noise(np.float64) * 1e300), r"has \d+ NaN or inf", (read_image,)),
    "constant": (lambda d: save(d / "a.nii", np.full(SHAPE, 7.0)), r"constant \(every voxel is 7\)", (read_image,)),
    "fractions": (lambda d: with_values(d / "a.nii", 0.5, 1.5), "2 voxels with fractions", (read_labels,)),
    "fractional slope": (
        lambda d: save(d / "a.nii", np.arange(210, dtype=np.uint8).reshape(SHAPE), scl=(0.5, 0)),
        "105 voxels with fractions",
        (read_labels,),
    ),
    "huge label": (lambda d: with_values(d / "a.nii", 2.0**32), "label 4294967296, beyond 32 bits", (read_labels,)),
    "singular sform": (lambda d: save(d / "a.nii", noise(), zero_slope_matrix(1)), "sform that cannot be inv", BOTH),
    "NaN sform": (lambda d: save(d / "a.nii", noise(), srow_x=np.nan), "sform that cannot be inverted", BOTH),
    "NaN qform": (lambda d: save(d / "a.nii", noise(), qoffset_z=np.nan), "qform that cannot be inverted", BOTH),
    "sform against qform": (
        lambda d: save(d / "a.nii", noise(), srow_x=[0, -2, 0, 41.4]),
        r"sform \(ALS, 1x2x3 mm, first voxel at 41.4, -7.5, 4\) and qform \(.* 30, -7.5, 4\) that differ by 11.4 mm",
        BOTH,
    ),
    "no form": (lambda d: save(d / "a.nii", noise(), codes=(0, 0)), "does not say where it lies", BOTH),
    "microns": (lambda d: save(d / "a.nii", noise(), xyzt_units=3), "measured in microns", BOTH),
    "unknown unit": (lambda d: save(d / "a.nii", noise(), xyzt_units=7), "damaged", BOTH),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(tmp_path, case):
    make, found, readers = REFUSED[case]
    path = make(tmp_path)
    for reader in readers:
        with pytest.raises(BadInput) as caught:
            reader(path)
        sentence = str(caught.value)
        # The file, what was found; what to do.
        assert re.fullmatch(rf"{re.escape(str(path))} [^\n]*{found}[^\n]*; [a-z][^\n;]*\.", sentence), sentence


def test_forms_that_differ_by_less_than_the_tolerance_pass(tmp_path):
    image = read_image(save(tmp_path / "a.nii", noise(), srow_x=[0, -2, 0, 30.09]))
    np.testing.assert_allclose(image.affine[0, 3], 30.09)


def test_one_coded_form_is_the_affine_whatever_the_other_says(tmp_path):
    elsewhere = {"srow_x": [0, -2, 0, 99]}
    by_qform = read_image(save(tmp_path / "q.nii", noise(), codes=(0, 1), **elsewhere))
    by_sform = read_image(save(tmp_path / "s.nii", noise(), codes=(1, 0), **elsewhere))
    assert (by_qform.affine[0, 3], by_sform.affine[0, 3]) == (30, 99)


def test_sheared_and_microscopic_grids_are_read(tmp_path):
    sheared = AFFINE.copy()
    sheared[0, 0] = 0.5
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.nii", noise(), sheared, codes=(1, 0))).affine, sheared)
    small = np.diag([1e-3, 1e-3, 1e-3, 1])
    np.testing.assert_allclose(read_image(save(tmp_path / "b.nii", noise(), small)).affine, small)


def test_nibabels_remarks_do_not_leak(tmp_path, caplog, recwarn):
    path = save(tmp_path / "a.nii", noise())
    header = bytearray(path.read_bytes()[:348])
    header[70:74] = np.array([4, 32], "<i2").tobytes()  # int16 voxels that claim to have 32 bits: a log line
    header[108:112] = np.float32(384).tobytes()
    # An extension of 32 bytes that claims to have 30: a warning.
    extension = bytes([1, 0, 0, 0]) + np.array([30, 6], "<i4").tobytes() + b"remark".ljust(24)
    path.write_bytes(bytes(header) + extension + noise(np.int16).tobytes(order="F"))
    with caplog.at_level(logging.DEBUG), pytest.warns(UserWarning, match="multiple of 16"):
        nib.load(path)
    remarks = len(caplog.records)
    assert remarks > 0, "the file must make nibabel speak, or this test shows nothing"
    recwarn.clear()
    with caplog.at_level(logging.DEBUG):
        np.testing.assert_array_equal(read_image(path).array, noise())
    assert len(caplog.records) == remarks
    assert not recwarn.list
    with caplog.at_level(logging.DEBUG), pytest.warns(UserWarning, match="multiple of 16"):
        nib.load(path)
    assert len(caplog.records) == 2 * remarks, "nibabel must speak again to others"


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


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float64])
def test_labels_of_any_type_are_int32(tmp_path, dtype):
    labels = read_labels(save(tmp_path / "a.nii", noise(dtype))).array
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, noise(np.int32))


def test_labels_with_a_slope_that_leaves_whole_numbers(tmp_path):
    # 0.1 is no float32: 10 * slope is 1.0000000149.
    raw = 10 * noise(np.int16)
    np.testing.assert_array_equal(read_labels(save(tmp_path / "a.nii", raw, scl=(0.1, 2))).array, noise(np.int32) + 2)


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


def test_one_grid_within_the_tolerance(tmp_path):
    a = volume(tmp_path / "a.nii")
    check_same_grid(a, volume(tmp_path / "b.nii", shifted(0.09)))
    check_same_grid(a, volume(tmp_path / "c.nii", shifted(3)), tolerance_mm=4.0)


def test_different_grids(tmp_path):
    a = volume(tmp_path / "a.nii")
    with pytest.raises(BadInput, match=r"b\.nii .*a\.nii .* up to 0\.25 mm apart; resample .*\.$"):
        check_same_grid(a, volume(tmp_path / "b.nii", shifted(0.25)))
    with pytest.raises(BadInput, match=r"c\.nii has 5x6x8 voxels where .*a\.nii has 5x6x7; resample .*\.$"):
        check_same_grid(a, volume(tmp_path / "c.nii", shape=(5, 6, 8)))
    # Same first voxel, other voxel size: 0.05 mm a voxel is 0.3 mm over the 7 slices.
    with pytest.raises(BadInput, match=r"1x2x3 mm.*0\.3 mm apart"):
        check_same_grid(a, volume(tmp_path / "d.nii", AFFINE @ np.diag([1, 1, 3.05 / 3, 1])))


def test_normalise():
    x = np.array([-2, 0, 1, 3, 8])
    np.testing.assert_array_equal(normalise(x, "max"), [-0.25, 0, 0.125, 0.375, 1])
    np.testing.assert_allclose(normalise(x, "minmax"), [0, 0.2, 0.3, 0.5, 1])
    np.testing.assert_array_equal(normalise(x, "none"), x)
    assert {normalise(x, m).dtype for m in ("max", "minmax", "percentile", "none")} == {np.dtype(np.float32)}


def test_normalise_by_percentiles_of_what_is_not_background():
    # Nonzero voxels 1000, 1001, ..., 2000: the 0.1 % percentile is 1001, the 99.9 % one is 1999.
    x = np.concatenate([np.zeros(5000), np.arange(1000, 2001)])
    y = normalise(x, "percentile")
    assert (y[:5000] == 0).all()
    np.testing.assert_allclose(y[5000:], np.clip((np.arange(1000, 2001) - 1001) / 998, 0, 1), atol=1e-6)


def test_normalise_refuses_an_empty_range():
    for x, method in (
        (np.array([-3, -1]), "max"),
        (np.array([2, 2]), "minmax"),
        (np.array([0, 5, 5]), "percentile"),
        (np.zeros(4), "percentile"),
    ):
        with pytest.raises(BadInput, match=rf"'{method}'; choose another"):
            normalise(x, method)
    with pytest.raises(ValueError, match="not 'median'"):
        normalise(np.arange(3), "median")


@pytest.mark.data
def test_real_brains(shared_data, tmp_path):
    image = read_image(shared_data / "lpba40" / "S35_t1.nii.gz")
    labels = read_labels(shared_data / "lpba40" / "S35_seg.nii.gz")
    check_same_grid(image, labels)
    assert image.array.shape == (160, 192, 160)
    assert len(np.unique(labels.array)) == 57  # 56 regions and background
    write_labels(tmp_path / "labels.nii.gz", labels.array, like=image)
    np.testing.assert_array_equal(read_labels(tmp_path / "labels.nii.gz").array, labels.array)


@pytest.mark.data
def test_a_real_whole_head_with_slope(shared_data):
    subject = shared_data / "ixi_2mm_native" / "IXI034-HH-1260_T1"
    image, labels = read_image(f"{subject}.nii.gz"), read_labels(f"{subject}_DLMUSE.nii.gz")
    check_same_grid(image, labels)
    assert image.array.shape == (120, 120, 90)
    inside = labels.array > 0
    assert image.array[inside].mean() > 2 * image.array[~inside].mean()
