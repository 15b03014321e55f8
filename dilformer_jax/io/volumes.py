"""Read and write NIfTI volumes, with the checks that keep bad input from becoming bad output."""

import secrets
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float32, Num, Real
from nibabel.imageglobals import logger as nibabel_logger

from dilformer_jax.io.geometry import corner_distance, is_singular, orientation, spacing

TOLERANCE_MM = 0.1
LABEL_TYPES = (np.uint8, np.int8, np.int16, np.uint16, np.int32)
# What nibabel raises on files that are no NIfTI, damaged or too short: it does not tell these apart.
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    KeyError,
    # Other formats than NIfTI, for which nibabel wants packages that are not there.
    ImportError,
    nib.tripwire.TripWireError,
    zlib.error,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)
_one_at_a_time = threading.Lock()


class BadInput(ValueError):
    """Input that the user can mend: one sentence naming the file, what was found and what to do."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3-D image (float32) or label map (int32) and where it lies: affine maps array indices to RAS mm."""

    array: Num[np.ndarray, "d h w"]
    affine: Real[np.ndarray, "4 4"]
    path: Path
    header: nib.nifti1.Nifti1Header


def read_image(path: str | Path) -> Volume:
    """An image (D, H, W) as float32. Raises BadInput, also for NaN or infinite voxels and for constant images."""
    volume = _read(Path(path))
    with np.errstate(over="ignore"):
        array = np.array(volume.array, np.float32)
    _check_finite(array, volume.path)
    if array.min() == array.max():
        raise BadInput(f"{path} is constant (every voxel is {array.flat[0]:g}); give an image that shows something.")
    return replace(volume, array=array)


def read_labels(path: str | Path) -> Volume:
    """A label map (D, H, W) as int32, after the file's scl_slope. Raises BadInput, also where values are no labels."""
    volume = _read(Path(path))
    _check_finite(volume.array, volume.path)
    array = np.rint(np.array(volume.array, np.float64))
    # A float32 scl_slope leaves whole numbers whole only to about 1e-7 of their size.
    fractions = np.count_nonzero(np.abs(array - volume.array) > 1e-3)
    if fractions:
        raise BadInput(
            f"{path} has {fractions} voxels with fractions and is no label map; give whole-number labels, "
            "warped or resampled by nearest neighbour."
        )
    largest = np.abs(array).max()
    if largest > np.iinfo(np.int32).max:
        raise BadInput(f"{path} has a label {largest:.0f}, beyond 32 bits; renumber its labels.")
    return replace(volume, array=array.astype(np.int32))


def check_same_grid(a: Volume, b: Volume, tolerance_mm: float = TOLERANCE_MM) -> None:
    """Raises BadInput unless both volumes have one shape and their corner voxels lie within tolerance_mm."""
    advice = "resample one onto the other's grid first."
    if a.array.shape != b.array.shape:
        raise BadInput(f"{b.path} has {_by(b.array.shape)} voxels where {a.path} has {_by(a.array.shape)}; {advice}")
    distance = corner_distance(a.array.shape, a.affine, b.array.shape, b.affine)
    if distance > tolerance_mm:
        raise BadInput(
            f"{b.path} ({_place(b.affine)}) and {a.path} ({_place(a.affine)}) lie on different grids, "
            f"their corners up to {distance:.3g} mm apart; {advice}"
        )


def write_image(path: str | Path, array: Num[np.ndarray, "d h w"], like: Volume) -> None:
    """Writes array (D, H, W) as float32 with the place, codes and units of `like`. Raises BadInput if it cannot."""
    _write(Path(path), np.asarray(array, np.float32), like)


def write_labels(path: str | Path, array: Num[np.ndarray, "d h w"], like: Volume) -> None:
    """Writes whole-number labels (D, H, W) exactly, in the smallest integer type that fits; else as write_image."""
    low, high = float(array.min()), float(array.max())
    fitting = [kind for kind in LABEL_TYPES if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max]
    if not fitting or (array != np.rint(array)).any():
        raise ValueError(f"labels must be whole 32-bit numbers, but {path} would get values from {low} to {high}")
    _write(Path(path), array.astype(fitting[0]), like)


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


def open_nifti(path: Path) -> nib.nifti1.Nifti1Pair:
    """The file with its header checked, of any dimension and with its voxels not yet read. Raises BadInput."""
    if not path.exists():
        raise BadInput(f"{path} does not exist; check the name.")
    if path.is_dir():
        raise BadInput(f"{path} is a directory; give a .nii or .nii.gz file.")
    with _readable(path), _silent():
        image = nib.load(path)
        if not isinstance(image, nib.nifti1.Nifti1Pair):
            raise BadInput(f"{path} is a {type(image).__name__}; convert it to NIfTI.")
        forms = {"sform": image.header.get_sform(coded=True)[0], "qform": image.header.get_qform(coded=True)[0]}
        unit = image.header.get_xyzt_units()[0]
    if unit in ("meter", "micron"):
        raise BadInput(f"{path} says that it is measured in {unit}s; convert its header to mm.")
    _check_forms(path, image.shape, {name: form for name, form in forms.items() if form is not None})
    return image


def read_voxels(image: nib.nifti1.Nifti1Pair, path: Path) -> np.ndarray:
    """The voxels of an opened file after its scl_slope, in a type of nibabel's choice. Raises BadInput."""
    if image.get_data_dtype().kind not in "iuf":
        raise BadInput(f"{path} has {image.get_data_dtype()} voxels; give one real number per voxel.")
    with _readable(path), np.errstate(all="ignore"):
        return np.asanyarray(image.dataobj)


def _read(path: Path) -> Volume:
    image = open_nifti(path)
    shape = image.shape[:3]
    if len(shape) < 3 or 0 in shape or any(n != 1 for n in image.shape[3:]):
        raise BadInput(
            f"{path} is {len(image.shape)}-D ({_by(image.shape)}); give one 3-D volume, e.g. extract a frame first."
        )
    return Volume(read_voxels(image, path).reshape(shape), image.affine, path, image.header)


def _write(path: Path, array: np.ndarray, like: Volume) -> None:
    if array.shape != like.array.shape:
        raise ValueError(f"{path} would have shape {array.shape}, but {like.path} has {like.array.shape}")
    # A fresh header: the reference's description, intensity range and extensions say nothing true of this array.
    header = nib.nifti1.Nifti1Header()
    header.set_data_dtype(array.dtype)
    sform_code, qform_code = int(like.header["sform_code"]), int(like.header["qform_code"])
    header.set_sform(like.affine, code=sform_code or int(not qform_code))  # a volume made in memory may have no code
    header.set_qform(like.affine, code=qform_code)
    header.set_xyzt_units(*like.header.get_xyzt_units())
    with replacing_nifti(path) as partial:
        nib.nifti1.Nifti1Image(array, None, header).to_filename(partial)


def _check_forms(path: Path, shape: tuple[int, ...], forms: dict[str, np.ndarray]) -> None:
    """Refuses a header that does not say, or says twice, where the voxels lie."""
    if not forms:
        raise BadInput(
            f"{path} does not say where it lies (sform and qform code are 0), and programs guess differently; "
            "set one, e.g. by `fslorient -setsformcode 1`."
        )
    for name, form in forms.items():
        if is_singular(form):
            raise BadInput(f"{path} has an {name} that cannot be inverted, {form[:3].tolist()}; repair its header.")
    if len(forms) == 2:
        sform, qform = forms["sform"], forms["qform"]
        box = (*shape, 1, 1)[:3]
        distance = corner_distance(box, sform, box, qform)
        if distance > TOLERANCE_MM:
            raise BadInput(
                f"{path} has sform ({_place(sform)}) and qform ({_place(qform)}) that differ by {distance:.3g} mm, "
                "and programs disagree on which one holds; make them equal, e.g. by `fslorient -copysform2qform`."
            )


def _check_finite(array: np.ndarray, path: Path) -> None:
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise BadInput(f"{path} has {bad} NaN or infinite voxels; replace them first, e.g. by 0.")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Names the file in place of whatever nibabel finds wrong with it."""
    try:
        yield
    except BadInput:
        raise
    except PermissionError as error:
        raise BadInput(f"{path} may not be read (permission denied); change its permissions.") from error
    except DAMAGE as error:
        with path.open("rb") as file:
            start = file.read(2)
        found = "is damaged, cut short or no NIfTI file"
        if path.name.endswith(".gz") and start != b"\x1f\x8b":
            found = "is not compressed by gzip as its name says"
        raise BadInput(f"{path} {found} ({path.stat().st_size} bytes); copy or convert it again.") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps nibabel's remarks on headers to itself: what matters of them is checked here."""
    # The lock: warning filters and loggers belong to the whole process, and threads read images side by side.
    with _one_at_a_time, warnings.catch_warnings(action="ignore"):
        disabled, nibabel_logger.disabled = nibabel_logger.disabled, True
        try:
            yield
        finally:
            nibabel_logger.disabled = disabled


def _place(affine: np.ndarray) -> str:
    origin = ", ".join(f"{x:g}" for x in affine[:3, 3].round(3))
    return f"{orientation(affine)}, {_by(f'{x:.4g}' for x in spacing(affine))} mm, first voxel at {origin}"


def _by(numbers: Iterable[object]) -> str:
    return "x".join(str(n) for n in numbers)
