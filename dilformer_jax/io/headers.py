"""Where an image says that its voxels lie: what is checked of it, and how what it leaves open is settled."""

import gzip
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.imageglobals import logger as nibabel_logger

from dilformer_jax.io.geometry import (
    centred_affine,
    corner_distance,
    is_orientation,
    is_sheared,
    is_singular,
    orientation,
    spacing,
)

TOLERANCE_MM = 0.1
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


@dataclass(frozen=True)
class Reading:
    """How to read what an image leaves open; where it leaves nothing open, none of this changes anything.

    prefer: the form, 'sform' or 'qform', that holds where the two differ by more than 0.1 mm at a corner.
    assume_affine: where the array axes point to, such as 'RAS', where no form has a code: the voxel sizes are then the
    header's and the middle of the grid lies at the origin.
    frame: which frame of a 4-D image to read, counted from 0.
    nan: 'zero' reads NaN and infinite voxels as 0; 'error' refuses them.
    """

    prefer: str | None = None
    assume_affine: str | None = None
    frame: int | None = None
    nan: str = "error"

    def __post_init__(self) -> None:
        if self.prefer not in (None, "sform", "qform"):
            raise BadInput(f"{self.prefer!r} is no form of a header; prefer 'sform' or 'qform'.")
        if self.assume_affine is not None and not is_orientation(self.assume_affine):
            raise BadInput(
                f"{self.assume_affine!r} does not name three axes; assume one letter each of R or L, A or P, S or I, "
                "such as RAS."
            )
        if self.nan not in ("error", "zero"):
            raise BadInput(f"{self.nan!r} is no way to read NaN voxels; choose 'error' or 'zero'.")


ASKING = Reading()


def load(path: Path) -> nib.spatialimages.SpatialImage:
    """The file as nibabel opens it, with its voxels not yet read. Raises BadInput."""
    if not path.exists():
        raise BadInput(f"{path} does not exist; check the name.")
    if path.is_dir():
        raise BadInput(f"{path} is a directory; give a .nii or .nii.gz file.")
    parts = parts_of(path)
    with _readable(path), _silent():
        return nib.load(path) if len(parts) == 1 else _pair(*parts)  # type: ignore[return-value]


def parts_of(path: Path) -> tuple[Path, ...]:
    """The files that an image consists of: itself, or the header and the voxels of a .hdr and .img pair, of which
    either may be compressed by gzip. Raises BadInput where one of the pair is missing."""
    base = path.name.removesuffix(".gz")
    if not base.endswith((".hdr", ".img")):
        return (path,)
    found = []
    for end in (".hdr", ".img"):
        # Beside a file that is given by name, whatever else there is does not count.
        given = [path] if base.endswith(end) else []
        beside = [path.with_name(base[:-4] + end + packed) for packed in ("", ".gz")]
        there = [candidate for candidate in given or beside if candidate.is_file()]
        if not there:
            raise BadInput(f"{path} has no {beside[0].name} or {beside[1].name} beside it; keep both files together.")
        found.append(there[0])
    return tuple(found)


def open_nifti(path: Path, reading: Reading = ASKING) -> nib.nifti1.Nifti1Pair:
    """The file with its header checked, of any dimension and with its voxels not yet read. Raises BadInput."""
    return settled(load(path), path, reading)[0]


def settled(
    image: nib.spatialimages.SpatialImage, path: Path, reading: Reading = ASKING
) -> tuple[nib.nifti1.Nifti1Pair, tuple[str, ...]]:
    """The image, NIfTI or FreeSurfer's, as a NIfTI one whose header says where it lies, and a sentence on each thing
    that `reading` had to settle. Raises BadInput where the header is wrong or leaves open what `reading` does too.
    """
    with _readable(path), _silent():
        if isinstance(image, nib.freesurfer.MGHImage):
            header = nib.nifti1.Nifti1Header()
            header.set_data_dtype(image.get_data_dtype())
            header.set_xyzt_units("mm")
            place(header, image.affine)
            image = nib.nifti1.Nifti1Image(image.dataobj, None, header)
        if isinstance(image, nib.analyze.AnalyzeImage) and not isinstance(image, nib.nifti1.Nifti1Pair):
            # Analyze 7.5 has voxel sizes, and nothing to be relied on that says where they lie.
            header = nib.nifti1.Nifti1Header()
            header.set_data_dtype(image.get_data_dtype())
            sizes = image.header.get_zooms()
            image = nib.nifti1.Nifti1Image(image.dataobj, None, header)
            image.header.set_zooms(sizes)
            image.header.set_xyzt_units("mm")
        if not isinstance(image, nib.nifti1.Nifti1Pair):
            raise BadInput(f"{path} is a {type(image).__name__}; convert it to NIfTI.")
        header = image.header.copy()  # that of an image in memory is its owner's
        if image.affine is not None and not np.allclose(image.affine, header.get_best_affine(), equal_nan=True):
            place(header, image.affine)  # in memory, the affine has been changed since
        unit = header.get_xyzt_units()[0]
        found = {"sform": header.get_sform(coded=True)[0], "qform": header.get_qform(coded=True)[0]}
    if unit in ("meter", "micron"):
        raise BadInput(f"{path} says that it is measured in {unit}s; convert its header to mm.")
    forms = {name: form for name, form in found.items() if form is not None}
    shape = tuple(int(n) for n in image.shape)  # FreeSurfer's have NumPy's numbers
    affine, notes = _affine(path, shape, forms, header, reading)
    if notes:
        place(header, affine)
    return type(image)(image.dataobj, header.get_best_affine(), header), notes


def kind_of(image: nib.spatialimages.SpatialImage) -> np.dtype:
    """The type of the voxels as they are stored, in a file or in memory."""
    return np.dtype(image.dataobj.dtype)  # type: ignore[attr-defined]


def read_voxels(image: nib.nifti1.Nifti1Pair, path: Path, frame: int | None = None) -> np.ndarray:
    """The voxels of an opened image after its scl_slope, or one frame of them, in a type of nibabel's choice. Raises
    BadInput.
    """
    if kind_of(image).kind not in "iuf":
        raise BadInput(f"{path} has {kind_of(image)} voxels; give one real number per voxel.")
    with _readable(path), np.errstate(all="ignore"):
        return np.asanyarray(image.dataobj if frame is None else image.dataobj[:, :, :, frame])


def place(header: nib.nifti1.Nifti1Header, affine: np.ndarray) -> None:
    """Writes the affine into both forms with code 1; a qform cannot hold shear, and where there is any has code 0."""
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=int(not is_sheared(affine)))


def described(affine: np.ndarray) -> str:
    """Orientation, voxel size and place of the first voxel."""
    origin = ", ".join(f"{x:g}" for x in affine[:3, 3].round(3))
    return f"{orientation(affine)}, {by(f'{x:.4g}' for x in spacing(affine))} mm, first voxel at {origin}"


def by(numbers: Iterable[object]) -> str:
    """'5x6x7'."""
    return "x".join(str(n) for n in numbers)


def _pair(header: Path, voxels: Path) -> nib.spatialimages.SpatialImage:
    """A NIfTI or an Analyze image in two files, with its voxels not yet read; nibabel wants both compressed or none."""
    with (gzip.open if header.suffix == ".gz" else open)(header, "rb") as file:
        start = file.read(nib.nifti2.Nifti2Header.sizeof_hdr)
    kinds = (nib.nifti1.Nifti1Pair, nib.nifti2.Nifti2Pair, nib.analyze.AnalyzeImage)
    kind = next((kind for kind in kinds if kind.header_class.may_contain_header(start)), None)
    if kind is None:
        raise nib.filebasedimages.ImageFileError("no header of a pair")
    return kind.from_file_map(kind.make_file_map({"header": str(header), "image": str(voxels)}))


def _affine(
    path: Path, shape: tuple[int, ...], forms: dict[str, np.ndarray], header: nib.nifti1.Nifti1Header, reading: Reading
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The affine and what had to be settled for it."""
    box = (*shape, 1, 1)[:3]
    distance = corner_distance(box, forms["sform"], box, forms["qform"]) if len(forms) == 2 else 0.0
    differ = not distance <= TOLERANCE_MM  # so is NaN
    note = None
    if not forms:
        if reading.assume_affine is None:
            raise BadInput(
                f"{path} does not say where it lies (sform and qform code are 0), and programs guess differently; give "
                "--assume-affine RAS, or whatever its axes are, to take its voxel sizes with its middle at the origin, "
                "or set a form, e.g. by `fslorient -setsformcode 1`."
            )
        forms = {"assumed affine": centred_affine(box, header["pixdim"][1:4].tolist(), reading.assume_affine)}
        note = "does not say where it lies"
    elif differ and reading.prefer is not None:
        forms = {reading.prefer: forms[reading.prefer]}
        note = f"has sform and qform that differ by {distance:.3g} mm"
    for name, form in forms.items():
        if is_singular(form):
            raise BadInput(f"{path} lies nowhere: its {name} {form.tolist()} cannot be inverted; repair its header.")
    if len(forms) == 2 and differ:
        sform, qform = forms["sform"], forms["qform"]
        # As measured of ITK 5.4: with both forms coded it takes the sform only by code 1 and at right angles.
        theirs = "sform" if header["sform_code"] == 1 and not is_sheared(sform) else "qform"
        users = "nibabel, FSL, ITK and ANTs take the sform"
        if theirs == "qform":
            users = "nibabel and FSL take the sform, ITK and ANTs the qform"
        raise BadInput(
            f"{path} has sform ({described(sform)}) and qform ({described(qform)}) that differ by {distance:.3g} mm, "
            f"and {users}; choose by --prefer sform or --prefer qform, or make them equal, e.g. by `fslorient "
            "-copysform2qform`."
        )
    name, affine = next(iter(forms.items()))
    return affine, () if note is None else (f"{path} {note}; its {name} was taken ({described(affine)}).",)


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
        if not path.is_file():  # an image in memory, which has another name
            raise BadInput(f"{path} cannot be read ({error}); load it again.") from error
        with path.open("rb") as file:
            start = file.read(2)
        found = "is corrupt, truncated or no NIfTI file"
        if path.name.endswith((".gz", ".mgz")) and start != b"\x1f\x8b":
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
