"""Small files of brains in the forms in which data sets hold them, for the tests of what reads those."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (4, 5, 6)


def write(path: Path, values: Sequence[int] = (0, 7, 9), kind: type = np.uint8) -> Path:
    """A NIfTI file of 4x5x6 voxels that take these values in turn, in a folder that is made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(np.resize(np.array(values, kind), SHAPE), np.eye(4)).to_filename(path)
    return path


def write_pickle(path: Path, *arrays: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(arrays))
    return path


def names(pairs) -> list[str]:
    return [pair.name for pair in pairs]
