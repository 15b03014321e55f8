"""Volumes in files that hold arrays and nothing else: pickles as TransMorph's, .npz as VoxelMorph's.

Such a file does not say where its voxels lie. By the convention of their makers a voxel is 1 mm.
"""

import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32, Num

from dilformer_jax.io.headers import BadInput, by
from dilformer_jax.io.pickles import read_arrays

ENDINGS = (".pkl", ".npz")
MOST_BYTES = 4 << 30  # of the arrays in an archive, which may be compressed a thousandfold
PARTS = ("moving", "fixed")  # the order of a pair in one pickle: x and y of TransMorph, which registers x to y


def is_bare(path: Path) -> bool:
    """Whether the file holds arrays and nothing else, by its name."""
    return path.suffix in ENDINGS


def read_bare_image(path: Path, part: str | None = None) -> Float32[np.ndarray, "d h w"]:
    """The image (D, H, W) of a pickle or an archive; of a file that holds a pair, that of the `part`.

    Raises BadInput for a missing or damaged file, for anything but 3-D arrays, and for NaN and infinite voxels.
    """
    image = _volume(_contents(path, part)[0], "an image", path)
    if image.size and np.abs(image).max() > np.finfo(np.float32).max:
        raise BadInput(f"{path} has voxels of {np.abs(image).max():.3g}, too large for float32; scale them first.")
    return image.astype(np.float32)


def read_bare_labels(path: Path, part: str | None = None) -> Int32[np.ndarray, "d h w"]:
    """The labels (D, H, W), likewise; BadInput also where there are none, or where they are fractions."""
    labels = _contents(path, part)[1]
    if labels is None:
        raise BadInput(f"{path} has no labels; name the array of labels seg, or leave them out.")
    labels = _volume(labels, "labels", path)
    whole = labels.astype(np.int32)
    if not np.array_equal(whole, labels):
        raise BadInput(f"{path} has labels that are not whole numbers; give the label ids, not a resampled map.")
    return whole


def has_labels(path: Path) -> bool:
    """Whether a pickle or an archive has labels: every pickle; an archive that has a `seg` beside its `vol`."""
    return path.suffix == ".pkl" or "seg" in _members(path)


def _contents(path: Path, part: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The arrays for image and labels, as the file has them, of one shape."""
    image, labels = _archived(path, part) if path.suffix == ".npz" else _pickled(path, part)
    if labels is not None and labels.shape != image.shape:
        raise BadInput(
            f"{path} holds an image of shape {image.shape} and labels of shape {labels.shape}; "
            "give two 3-D arrays of one shape."
        )
    return image, labels


def _pickled(path: Path, part: str | None) -> tuple[np.ndarray, np.ndarray]:
    arrays = read_arrays(path)
    if len(arrays) == 2 and part is None:
        return arrays[0], arrays[1]
    if len(arrays) == 4 and part is not None:
        first = PARTS.index(part)
        return arrays[first], arrays[first + 2]
    wanted = "an (image, labels) pair" if part is None else "(moving, fixed, moving labels, fixed labels)"
    raise BadInput(f"{path} holds {len(arrays)} arrays; give {wanted}.")


def _archived(path: Path, part: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    if part is not None:
        raise BadInput(f"{path} holds one brain, not a pair; give one file for each.")
    members = _members(path)
    if len(members) == 1:  # of whatever name, as VoxelMorph reads them
        array = _loaded(path, members[0])
        return array, array
    if "vol" not in members:
        raise BadInput(f"{path} holds {', '.join(members) or 'nothing'}; name the image vol and its labels seg.")
    return _loaded(path, "vol"), _loaded(path, "seg") if "seg" in members else None


def _members(path: Path) -> list[str]:
    """The names of an archive's arrays. Raises BadInput."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; check the path.") from None
    except (OSError, zipfile.BadZipFile) as fault:
        raise BadInput(f"{path} is no whole .npz archive ({fault}); copy or convert it again.") from fault
    size = sum(entry.file_size for entry in entries)
    if size > MOST_BYTES:
        raise BadInput(f"{path} unpacks to {size >> 20} MiB; give one brain a file.")
    return [entry.filename.removesuffix(".npy") for entry in entries]


def _loaded(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            array = archive[name]
        if not isinstance(array, np.ndarray):  # bytes, where it does not begin as an array does
            raise ValueError("no array")
        return array
    except Exception as fault:  # damaged archives raise nearly anything, and arrays of objects ValueError
        raise BadInput(
            f"{path} has an array {name} that cannot be read ({str(fault) or type(fault).__name__}); "
            "give whole arrays of numbers."
        ) from fault


def _volume(array: np.ndarray, what: str, path: Path) -> Num[np.ndarray, "d h w"]:
    """The array as 3-D, without further axes of one voxel, such as a batch's and a channel's."""
    if array.dtype.kind not in "biuf":
        raise BadInput(f"{path} holds {what} of type {array.dtype}; give arrays of numbers.")
    shape = array.shape
    while len(shape) > 3 and 1 in (shape[0], shape[-1]):
        shape = shape[:-1] if shape[-1] == 1 else shape[1:]
    if len(shape) != 3 or 0 in shape:
        raise BadInput(f"{path} holds {what} of {by(array.shape) or 'no'} voxels; give 3-D arrays.")
    if not np.isfinite(array).all():
        raise BadInput(f"{path} has NaN or infinite voxels; replace them first, e.g. by 0.")
    return array.reshape(shape)
