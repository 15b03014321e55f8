"""Read and write volumes, with the checks that keep bad input from becoming bad output.

Readers take a file, NIfTI or FreeSurfer's .mgh and .mgz, or an image that nibabel holds in memory.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float32, Int, Integer, Num, Real
from nibabel.spatialimages import SpatialImage

from dilformer_jax.io.geometry import corner_distance
from dilformer_jax.io.headers import (
    ASKING,
    TOLERANCE_MM,
    BadInput,
    Reading,
    by,
    described,
    load,
    place,
    read_voxels,
    settled,
)
from dilformer_jax.io.headers import open_nifti as open_nifti  # whoever reads volumes finds it here

LABEL_TYPES = (np.uint8, np.int8, np.int16, np.uint16, np.int32)
MOST_LABELS = 512  # of a map in floating point, beyond which it is an image
# Of a header: where the voxels lie, with the first four of pixdim.
PLACE = (
    *("sform_code", "srow_x", "srow_y", "srow_z", "qform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units"),
)


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3-D image (float32) or label map (int32) and where it lies: affine maps array indices to RAS mm.

    notes: a sentence on each thing that had to be settled in reading it, for the user to see.
    """

    array: Num[np.ndarray, "d h w"]
    affine: Real[np.ndarray, "4 4"]
    path: Path
    header: nib.nifti1.Nifti1Header
    notes: tuple[str, ...] = ()


def read_image(source: str | Path | SpatialImage, reading: Reading = ASKING, name: str = "image") -> Volume:
    """An image (D, H, W) as float32. Raises BadInput, also for NaN or infinite voxels and for constant images.

    name: what sentences call an image in memory that has no file name.
    """
    volume = read_volume(source, reading, name)
    with np.errstate(over="ignore"):
        volume = finite(replace(volume, array=np.array(volume.array, np.float32)), reading)
    array = volume.array
    if array.min() == array.max():
        raise BadInput(
            f"{volume.path} is constant (every voxel is {array.flat[0]:g}); give an image that shows something."
        )
    return volume


def read_labels(source: str | Path | SpatialImage, reading: Reading = ASKING, name: str = "labels") -> Volume:
    """A label map (D, H, W) as int32, after its scl_slope. Raises BadInput, also where values are no labels."""
    volume = _whole(finite(read_volume(source, reading, name), reading))
    largest = max(-int(volume.array.min()), int(volume.array.max()))
    if largest > np.iinfo(np.int32).max:
        raise BadInput(f"{volume.path} has a label {largest}, beyond 32 bits; renumber its labels.")
    return replace(volume, array=volume.array.astype(np.int32))


def read_label_ids(
    source: str | Path | SpatialImage, reading: Reading = ASKING, name: str = "labels"
) -> tuple[Volume, Integer[np.ndarray, " k"]]:
    """A label map as int32 places (D, H, W) in the list of its ids, and that list, 0 first: labels = ids[places].

    The ids have the file's own type, exactly, 64 bits included, or the smallest integer type that fits where that is
    floating point. Raises BadInput as read_labels.
    """
    volume = _whole(finite(read_volume(source, reading, name), reading))
    labels = volume.array
    present = np.unique(labels)
    present = present[present != 0]
    places = np.where(labels == 0, 0, np.searchsorted(present, labels) + 1)
    return replace(volume, array=places.astype(np.int32)), np.concatenate([np.zeros(1, present.dtype), present])


def read_volume(source: str | Path | SpatialImage, reading: Reading = ASKING, name: str = "volume") -> Volume:
    """A volume with its voxels in whatever real type nibabel gives, NaN too. Raises BadInput."""
    if isinstance(source, SpatialImage):
        opened, path = source, Path(source.get_filename() or name)
    else:
        path = Path(source)
        opened = load(path)
    image, notes = settled(opened, path, reading)
    shape, frame = image.shape, None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 4 and 0 not in shape:
        frames, shape = shape[3], shape[:3]
        if reading.frame is None or not 0 <= reading.frame < frames:
            found = "" if reading.frame is None else f", counted from 0, and no frame {reading.frame}"
            raise BadInput(
                f"{path} has {frames} frames{found}; use --frame N with N from 0 to {frames - 1} (register, apply), or "
                "extract one first."
            )
        frame, notes = reading.frame, (*notes, f"{path} has {frames} frames; frame {reading.frame} was read.")
    if len(shape) != 3 or 0 in shape:
        raise BadInput(f"{path} is {len(image.shape)}-D ({by(image.shape)}); give one 3-D volume.")
    return Volume(read_voxels(image, path, frame).reshape(shape), image.affine, path, image.header, notes)


def check_same_grid(a: Volume, b: Volume, tolerance_mm: float = TOLERANCE_MM, otherwise: str = "") -> None:
    """Raises BadInput unless both volumes have one shape and their corner voxels lie within tolerance_mm.

    otherwise: what else than to resample the user can do where the shapes are equal, to end the sentence with.
    """
    advice = "resample one onto the other's grid first"
    if a.array.shape != b.array.shape:
        raise BadInput(f"{b.path} has {by(b.array.shape)} voxels where {a.path} has {by(a.array.shape)}; {advice}.")
    distance = corner_distance(a.array.shape, a.affine, b.array.shape, b.affine)
    if distance > tolerance_mm:
        raise BadInput(
            f"{b.path} ({described(b.affine)}) and {a.path} ({described(a.affine)}) lie on different grids, "
            f"their corners up to {distance:.3g} mm apart; {advice}{otherwise}."
        )


def on_grid(labels: Volume, image: Volume, assume_same_grid: bool = False) -> Volume:
    """The labels, which must lie on the image's grid, or are taken to where that is assumed and the shapes are equal.

    Raises BadInput as check_same_grid.
    """
    if not assume_same_grid or labels.array.shape != image.array.shape:
        check_same_grid(image, labels, otherwise=", or give --assume-same-grid if they match voxel for voxel")
        return labels
    distance = corner_distance(image.array.shape, image.affine, image.array.shape, labels.affine)
    if distance <= TOLERANCE_MM:
        return labels
    note = f"{labels.path} lies up to {distance:.3g} mm away from {image.path} and was taken to match it by voxels."
    return replace(labels, affine=image.affine, header=image.header, notes=(*labels.notes, note))


def check_large_enough(volume: Volume, smallest: int) -> None:
    """Raises BadInput where an axis has fewer voxels than `smallest`."""
    for axis, count in enumerate(volume.array.shape, 1):
        if count < smallest:
            slices = "1 slice" if count == 1 else f"{count} slices"
            raise BadInput(
                f"{volume.path} ({by(volume.array.shape)}) is too thin, as axis {axis} has {slices}; 3-D registration "
                f"needs >= {smallest} on each axis."
            )


def write_image(path: str | Path, array: Num[np.ndarray, "d h w"], like: Volume) -> None:
    """Writes array (D, H, W) as float32 with both forms, codes and units of `like`, bit for bit.

    Where `like` was made in memory, both forms get its affine. Raises BadInput if the file cannot be written.
    """
    _write(Path(path), np.asarray(array, np.float32), like)


def write_labels(path: str | Path, array: Num[np.ndarray, "d h w"], like: Volume) -> None:
    """Writes whole-number labels (D, H, W) exactly, in the smallest integer type that fits; else as write_image."""
    fitting = _smallest_type(array)
    if fitting is None or (array != np.rint(array)).any():
        raise ValueError(
            f"labels must be whole 32-bit numbers, but {path} would get values from {array.min()} to {array.max()}"
        )
    _write(Path(path), array.astype(fitting), like)


def write_label_ids(
    path: str | Path, places: Int[np.ndarray, "d h w"], ids: Integer[np.ndarray, " k"], like: Volume
) -> None:
    """Writes the label map ids[places] (D, H, W), as read_label_ids gives them, in the type of ids, 64 bits included;
    else as write_image.
    """
    _write(Path(path), ids[places], like)


def normalise(array: Num[np.ndarray, "*shape"], method: str) -> Float32[np.ndarray, "*shape"]:
    """The image as float32 with intensities scaled by `method`.

    'max': x / max(x). 'minmax': least and largest value to 0 and 1. 'percentile': the 0.1 and 99.9 percentiles of the
    nonzero voxels to 0 and 1, clipped there. 'none': as it is. Raises BadInput where the range to scale by is empty.
    """
    x = np.asarray(array, np.float32)
    if method == "none":
        return x
    if method == "max":
        low, high = np.float32(0), x.max()
    elif method == "minmax":
        low, high = x.min(), x.max()
    elif method == "percentile":
        low, high = np.percentile(x[x != 0] if x.any() else x, (0.1, 99.9)).astype(np.float32)
        x = x.clip(low, high)
    else:
        raise ValueError(f"normalise knows 'max', 'minmax', 'percentile' and 'none', not {method!r}")
    if high <= low:
        raise BadInput(f"intensities from {low:g} to {high:g} cannot be scaled by '{method}'; choose another method.")
    return (x - low) / (high - low)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, which takes the place of `path` only when the block succeeds.

    Raises BadInput where the system refuses to write there.
    """
    if not path.parent.is_dir():
        raise BadInput(f"{path} cannot be written because {path.parent} is no directory; create it first.")
    # At random, since two hosts that share a file system may have one process number.
    partial = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror or error}); choose another place.") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_nifti(path: Path) -> Iterator[Path]:
    """As `replacing`, for a file that must be named .nii or .nii.gz. Raises BadInput where it is not."""
    if not path.name.endswith((".nii", ".nii.gz")):
        raise BadInput(f"{path} is no name for a NIfTI file; let it end in .nii.gz or .nii.")
    with replacing(path) as partial:
        yield partial


def finite(volume: Volume, reading: Reading) -> Volume:
    finite = np.isfinite(volume.array)
    bad = finite.size - np.count_nonzero(finite)
    if not bad:
        return volume
    if reading.nan == "error":
        raise BadInput(f"{volume.path} has {bad} NaN or infinite voxels; give --nan zero, or replace them first.")
    note = f"{volume.path} has {bad} NaN or infinite voxels, which were read as 0."
    return replace(volume, array=np.where(finite, volume.array, 0), notes=(*volume.notes, note))


def _whole(volume: Volume) -> Volume:
    """The label map in an integer type: its own, or the smallest that fits. Raises BadInput where it is none."""
    array, path = volume.array, volume.path
    if array.dtype.kind in "iu":
        return replace(volume, array=array.astype(array.dtype.newbyteorder("="), copy=False))
    whole = np.rint(array)
    # A float32 scl_slope leaves whole numbers whole only to about 1e-7 of their size.
    fractions = np.count_nonzero(np.abs(whole - array) > 1e-3)
    if fractions:
        raise BadInput(
            f"{path} has {fractions} voxels with fractions and is no label map; give whole-number labels, "
            "warped or resampled by nearest neighbour."
        )
    distinct = len(np.unique(whole))
    if distinct > MOST_LABELS:
        raise BadInput(
            f"{path} has {distinct} distinct values in floating point, more than {MOST_LABELS}, and looks like an "
            "image; give its label map, stored as integers."
        )
    if np.abs(whole).max() >= 2.0**63:
        raise BadInput(f"{path} has a label {np.abs(whole).max():.0f}, beyond 64 bits; renumber its labels.")
    return replace(volume, array=whole.astype(_smallest_type(whole) or np.int64))


def _smallest_type(array: np.ndarray) -> type | None:
    low, high = float(array.min()), float(array.max())
    return next((kind for kind in LABEL_TYPES if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max), None)


def nifti(array: Num[np.ndarray, "d h w"], like: Volume) -> nib.nifti1.Nifti1Image:
    """The array as an image in memory that lies where `like` lies, by the same header fields."""
    kind = nib.nifti2.Nifti2Image if isinstance(like.header, nib.nifti2.Nifti2Header) else nib.nifti1.Nifti1Image
    # A fresh header: the reference's description, intensity range and extensions say nothing true of this array.
    header = kind.header_class()
    header.set_data_dtype(array.dtype)
    coded = like.header["sform_code"] or like.header["qform_code"]
    if coded and np.array_equal(like.header.get_best_affine(), like.affine):
        for field in PLACE:
            header[field] = like.header[field]
        header["pixdim"][:4] = like.header["pixdim"][:4]  # the first is a sign that belongs to the qform
    else:  # made in memory, or put elsewhere
        place(header, like.affine)
        header["xyzt_units"] = like.header["xyzt_units"]
    return kind(array, header.get_best_affine(), header)


def _write(path: Path, array: np.ndarray, like: Volume) -> None:
    if array.shape != like.array.shape:
        raise ValueError(f"{path} would have shape {array.shape}, but {like.path} has {like.array.shape}")
    with replacing_nifti(path) as partial:
        nifti(array, like).to_filename(partial)
