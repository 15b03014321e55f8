import logging
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nifti_files import AFFINE, SHAPE, noise, save

from dilformer_jax.io.headers import BadInput
from dilformer_jax.io.volumes import read_image, read_labels


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


BOTH = (read_image, read_labels)
REFUSED = {
    "missing": (lambda d: d / "a.nii.gz", "does not exist", BOTH),
    "directory": (lambda d: d, "is a directory", BOTH),
    "text as .nii.gz": (lambda d: text(d / "a.nii.gz"), r"not compressed by gzip .*\(920 bytes\)", BOTH),
    "text as .nii": (lambda d: text(d / "a.nii"), r"no NIfTI file \(920 bytes\)", BOTH),
    "other suffix": (lambda d: text(d / "a.txt"), "no NIfTI file", BOTH),
    "empty": (lambda d: cut(d / "a.nii", 0), r"no NIfTI file \(0 bytes\)", BOTH),
    "header cut": (lambda d: cut(d / "a.nii.gz", 60), r"corrupt, truncated .*\(60 bytes\)", BOTH),
    "voxels cut": (lambda d: cut(d / "a.nii.gz", 4000), r"corrupt, truncated .*\(4000 bytes\)", BOTH),
    "voxels cut, plain": (lambda d: cut(d / "a.nii", 4000), r"corrupt, truncated .*\(4000 bytes\)", BOTH),
    # For these nibabel would import what is not installed.
    "zstandard": (lambda d: text(d / "a.nii.zst"), "no NIfTI file", BOTH),
    "HDF5": (lambda d: hdf5(d / "a.mnc"), "no NIfTI file", BOTH),
    "4-D": (lambda d: save(d / "a.nii", noise(shape=(5, 6, 7, 2))), "has 2 frames", BOTH),
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
    "singular sform": (
        lambda d: save(d / "a.nii", noise(), zero_slope_matrix(1)),
        "its sform .* cannot be inverted",
        BOTH,
    ),
    "NaN sform": (lambda d: save(d / "a.nii", noise(), srow_x=np.nan), "its sform .* cannot be inverted", BOTH),
    "NaN qform": (lambda d: save(d / "a.nii", noise(), qoffset_z=np.nan), "its qform .* cannot be inverted", BOTH),
    "sform against qform": (
        lambda d: save(d / "a.nii", noise(), srow_x=[0, -2, 0, 41.4]),
        r"sform \(ALS, 1x2x3 mm, first voxel at 41.4, -7.5, 4\) and qform \(.* 30, -7.5, 4\) that differ by 11.4 mm",
        BOTH,
    ),
    "no form": (lambda d: save(d / "a.nii", noise(), codes=(0, 0)), "does not say where it lies", BOTH),
    "microns": (lambda d: save(d / "a.nii", noise(), xyzt_units=3), "measured in microns", BOTH),
    "unknown unit": (lambda d: save(d / "a.nii", noise(), xyzt_units=7), "corrupt", BOTH),
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
