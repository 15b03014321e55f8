"""NIfTI files made by nibabel alone, for the tests of what reads and writes them."""

from pathlib import Path

import nibabel as nib
import numpy as np

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
