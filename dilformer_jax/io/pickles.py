"""Read the pickled volumes in which the field passes its data sets around, without running what a pickle may carry."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from dilformer_jax.io.volumes import BadInput

# All that a pickled array needs. NumPy 1 wrote `numpy.core`, NumPy 2 `numpy._core`; protocols 0-2 need `_codecs`.
ADMITTED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


class ArrayUnpickler(pickle.Unpickler):
    """Admits NumPy arrays and the plain containers, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The image (D, H, W) float32 and the labels (D, H, W) int32 of an (image, labels) pickle.

    Such a file has no affine: by the convention of its makers a voxel is 1 mm.

    Raises BadInput for a missing file, for anything but a pair of 3-D arrays of one shape, for NaN and infinite voxels
    and for labels that are fractions.
    """
    try:
        with Path(path).open("rb") as file:
            content = ArrayUnpickler(file).load()
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; check the path.") from None
    except Exception as fault:  # an unpickler fed with junk raises nearly anything
        raise BadInput(
            f"{path} is not a pickle of plain NumPy arrays ({str(fault) or type(fault).__name__}); "
            "give an (image, labels) pickle."
        ) from fault
    if not isinstance(content, tuple | list) or not all(isinstance(array, np.ndarray) for array in content):
        raise BadInput(f"{path} holds a {type(content).__name__}; give an (image, labels) pair of NumPy arrays.")
    if len(content) != 2:
        raise BadInput(f"{path} holds {len(content)} arrays; give an (image, labels) pair.")
    image, labels = content
    if image.ndim != 3 or labels.shape != image.shape:
        raise BadInput(
            f"{path} holds an image of shape {image.shape} and labels of shape {labels.shape}; "
            "give two 3-D arrays of one shape."
        )
    if not all(array.dtype.kind in "biuf" for array in content):
        raise BadInput(f"{path} holds {image.dtype} and {labels.dtype}; give arrays of numbers.")
    if not (np.isfinite(image).all() and np.isfinite(labels).all()):
        raise BadInput(f"{path} has NaN or infinite voxels; replace them first, e.g. by 0.")
    whole = labels.astype(np.int32)
    if not np.array_equal(whole, labels):
        raise BadInput(f"{path} has labels that are not whole numbers; give the label ids, not a resampled map.")
    return image.astype(np.float32), whole
