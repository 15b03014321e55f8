"""Learn2Reg's data sets and displacement files, after the organisers' `evaluation.py` (MDL-UzL/L2R).

A data set is a folder with a `NAME_dataset.json` that lists pairs of images of one shape. A submission has a file for
each pair, a displacement (D, H, W, 3) in voxels on the fixed grid, axes in the order of the NIfTI array. It is scored
by `map_coordinates(moving_labels, identity + disp, order=0)`: x + disp(x) is a place in the moving array, which is
this package's own convention, and the header's affine is not looked at. (A place less than half a voxel beyond a face
has label 0 there, and the nearest voxel's in `warp_labels`.)

Names: `disp_FFFF_MMMM`, the four digits of the fixed and then of the moving subject, or with those of their modality
`disp_FFFF_ffff_MMMM_mmmm`. The short one has been the challenges' (zero fields, LUMIR's instructions) where both
modalities are equal, or 0000 and 0001; the organisers' script of February 2025 takes it for 0000 and 0001 alone, and
the long one always.

The form of 2021 is an .npz of float16 (3, D/2, H/2, W/2), still in voxels of the whole grid, which the organisers
enlarged by `scipy.ndimage.zoom(disp, 2, order=2)`, the corners of both grids lying together.
"""

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Float32, Float64
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax.io.headers import DAMAGE, by, place
from dilformer_jax.io.volumes import BadInput, replacing, replacing_nifti

SPLITS = {
    "val": "registration_val",
    "test": "registration_test",
    "training": "training_paired_images",
}
FORMS = {"nifti": ".nii.gz", "2021": ".npz"}
NUMBERS = re.compile(r"(\d{4})_(\d{4})\.nii\.gz$")

Displacement = Float32[np.ndarray, "_ _ _ 3"]


@dataclass(frozen=True)
class Pair:
    """Two images by their paths in dataset.json, and the (subject, modality) that these end in."""

    fixed: str
    moving: str
    fixed_numbers: tuple[str, str]
    moving_numbers: tuple[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """What its file may be called, without suffix: as challenges have asked for it first."""
        (fixed, here), (moving, there) = self.fixed_numbers, self.moving_numbers
        short, long = f"disp_{fixed}_{moving}", f"disp_{fixed}_{here}_{moving}_{there}"
        return (short, long) if here == there or (here, there) == ("0000", "0001") else (long,)


@dataclass(frozen=True)
class Task:
    """The pairs of a split of a data set: their images' shape, the folder that their paths start from, and whether all
    images are of one modality."""

    name: str
    split: str
    shape: tuple[int, int, int]
    pairs: tuple[Pair, ...]
    folder: Path
    one_modality: bool

    def image(self, path: str) -> Path:
        """Where the image lies of which dataset.json has this path."""
        return self.folder / path.lstrip("/")


def read_task(path: Path | str, split: str = "val", folder: Path | None = None) -> Task:
    """A split of a dataset.json; the images lie in its folder unless another is given. The images are not looked at.

    Raises BadInput where the file is missing or is none, or has no such split.
    """
    path = Path(path)
    try:
        told = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error}); give Learn2Reg's NAME_dataset.json.") from error
    try:
        name, shape = str(told["name"]), _shape(told["tensorImageShape"])
        listed = {key: told[key] for key in SPLITS.values() if told.get(key)}
        pairs = tuple(_pair(entry, path) for entry in listed.get(SPLITS[split], ()))
        modalities = told.get("modality") or {}
        one = len(set(modalities.values() if isinstance(modalities, dict) else modalities)) <= 1
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        wanted = "name, tensorImageShape and pairs of fixed and moving"
        raise BadInput(f"{path} is no dataset.json of Learn2Reg ({error!r}); it has {wanted}.") from error
    if not pairs:
        there = ", ".join(short for short, key in SPLITS.items() if key in listed) or "none"
        raise BadInput(f"{path} has no pairs in {SPLITS[split]}; the splits that it has pairs for: {there}.")
    counts: dict[str, int] = {}
    for pair in pairs:
        counts[pair.names[0]] = counts.get(pair.names[0], 0) + 1
    twice = [stem for stem, count in counts.items() if count > 1]
    if twice:
        raise BadInput(f"{path} has {counts[twice[0]]} pairs whose file would be {twice[0]}; leave one of them.")
    return Task(name, split, shape, pairs, path.parent if folder is None else folder, one)


def write_displacement(path: Path, u: Displacement, affine: Float64[np.ndarray, "4 4"], form: str = "nifti") -> None:
    """Writes a displacement in voxels in one of FORMS; the `affine` of the fixed image is for those who look at it.

    Raises BadInput where the file cannot be written, and for odd axes in the form of 2021.
    """
    if form == "2021":
        if any(size % 2 for size in u.shape[:3]):
            raise BadInput(f"{path} would be half of {by(u.shape[:3])}, which has odd axes; give --form nifti.")
        half = np.stack([ndimage.zoom(u[..., axis], 0.5, order=2) for axis in range(3)]).astype(np.float16)
        with replacing(path) as partial:
            np.savez_compressed(partial, half)
        return
    header = nib.nifti1.Nifti1Header()
    place(header, affine)
    header.set_xyzt_units("mm")
    with replacing_nifti(path) as partial:
        nib.nifti1.Nifti1Image(u, None, header).to_filename(partial)


def read_displacement(path: Path, shape: tuple[int, ...], form: str = "nifti") -> Displacement:
    """A displacement as the organisers' script reads it, in voxels, of images of this shape; in the form of 2021 on the
    whole grid again. An .npz of one whole array is as good as a NIfTI file, as since 2025.

    Raises BadInput where they would refuse it, or what they would score makes no sense: damaged, of another shape or
    type, or not finite.
    """
    wanted = (3, *(size // 2 for size in shape)) if form == "2021" else (*shape, 3)
    try:
        array = _npz(path) if path.name.endswith(".npz") else _nifti(path)
    except BadInput:
        raise
    # NumPy answers a damaged archive with nearly anything, of memory that there is not among it.
    except (*DAMAGE, zipfile.BadZipFile, TypeError, AttributeError, MemoryError) as error:
        raise BadInput(f"{path.name} cannot be read ({error}); write it again.") from error
    if array.shape != wanted:
        raise BadInput(f"{path.name} has shape {by(array.shape)} where {by(wanted)} is asked for{_hint(array, shape)}.")
    if array.dtype.kind != "f" or (form == "2021" and array.dtype != np.float16):
        asked = "float16" if form == "2021" else "float32"
        raise BadInput(f"{path.name} has {array.dtype} values; write {asked}.")
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise BadInput(f"{path.name} has {bad} NaN or infinite values; write numbers.")
    if form == "2021":
        whole = [ndimage.zoom(component.astype(np.float32), 2, order=2) for component in array]
        return np.stack(whole, axis=-1)
    return array.astype(np.float32, copy=False)


def _nifti(path: Path) -> np.ndarray:
    if not path.name.endswith(".nii.gz"):
        raise BadInput(f"{path.name} is neither .nii.gz nor .npz; write one of these.")
    # In the type that is stored, unless a scl_slope makes other numbers of it.
    return np.asarray(nib.load(path).dataobj)  # type: ignore[attr-defined]


def _npz(path: Path) -> np.ndarray:
    # No pickles: the organisers' script would run what is in them.
    with np.load(path, allow_pickle=False) as arrays:
        if len(arrays.files) != 1:
            raise BadInput(f"{path.name} has {len(arrays.files)} arrays ({', '.join(arrays.files)}); leave one.")
        return arrays[arrays.files[0]]


def _hint(array: np.ndarray, shape: tuple[int, ...]) -> str:
    """What the shape looks like instead."""
    if array.shape == (*shape, 1, 3):
        return ": an ITK field of vectors in mm; convert it to an array in voxels"
    if array.shape == (3, *shape):
        return "; move the components to the last axis"
    if array.shape == (3, *(size // 2 for size in shape)):
        return ": the form of 2021; give --form 2021 to check that"
    if sorted(array.shape) == sorted((*shape, 3)):
        return "; its axes are in another order"
    return ""


def _shape(told: Any) -> tuple[int, int, int]:
    """Of tensorImageShape, which has a list for each modality, or one alone."""
    d, h, w = (int(size) for size in (told["0"] if isinstance(told, dict) else told))
    return d, h, w


def _pair(entry: dict[str, str], path: Path) -> Pair:
    numbers = []
    for role in ("fixed", "moving"):
        match = NUMBERS.search(entry[role])
        if not match:
            raise BadInput(
                f"{path} has a {role} image {entry[role]!r} whose name does not end in SSSS_MMMM.nii.gz, the digits of "
                "subject and modality that its displacement is named by; rename it."
            )
        numbers.append((match[1], match[2]))
    return Pair(entry["fixed"], entry["moving"], *numbers)
