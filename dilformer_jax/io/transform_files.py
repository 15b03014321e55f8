"""Transform files of every kind that is known here, told apart by what they hold."""

import gzip
import struct
import zlib
from pathlib import Path

from dilformer_jax.io import freesurfer, fsl, itk, voxel_fields
from dilformer_jax.io.headers import BadInput
from dilformer_jax.io.text import read_text
from dilformer_jax.io.transforms import Transform
from dilformer_jax.io.volumes import Volume, open_nifti

START = 348  # bytes that tell binary files apart: those of a NIfTI header
M3Z = struct.pack(">f", 1)  # the version that FreeSurfer's morphs begin with
HDF5 = b"\x89HDF"


def read_transform(path: Path, fixed: Volume | None = None, moving: Volume | None = None) -> Transform:
    """The transform, fixed RAS mm to moving RAS mm, of a file: a displacement field of ITK, a warp of FSL or
    FreeSurfer, an array in voxels; an affine of ITK, ANTs, FLIRT or an LTA. A text of 16 numbers alone is FLIRT's.

    FSL's need the images' headers: a warp the moving image's, a matrix both. Raises BadInput where the file is none of
    these or what it needs is missing.
    """
    if not path.is_file():
        raise BadInput(f"{path} does not exist; give a transform file.")
    start = _start(path)
    if start[:4] in (struct.pack(f"{order}i", size) for order in "<>" for size in (348, 540)):
        return (_nifti(path, moving),)
    if len(start) >= 28 and struct.unpack(">i", start[:4])[0] & 0xFF == 1 and start[:2] == b"\0\0":
        return (freesurfer.read_warp(path),)
    if start[:4] == M3Z:
        raise BadInput(f"{path} is an m3z morph; convert it by `mri_warp_convert --inm3z ... --outitk field.nii.gz`.")
    if start[:4] == HDF5:
        raise BadInput(
            f"{path} is an HDF5 file; take ITK's transforms out of it by `CompositeTransformUtil --disassemble` first."
        )
    if path.name.endswith((".nii", ".nii.gz", ".mgz", ".mgh")):
        open_nifti(path)  # says what is wrong with it
    if itk.is_matlab(path):
        return (itk.read_affine(path),)
    text = read_text(path).lstrip()
    if text.startswith("#Insight"):
        return (itk.read_affine(path),)
    if text.startswith("type") or "\nnxforms" in text:
        return (freesurfer.read_lta(path),)
    if text and text[0] in "+-.0123456789":
        return (fsl.read_flirt(path, fixed, moving),)
    raise BadInput(
        f"{path} is no transform that is known here; give a field or affine of ITK or ANTs, a warp or matrix of FSL, a "
        "warp (.mgz) or LTA of FreeSurfer, or an array in voxels with its JSON file."
    )


def write_transform(path: Path, transform: Transform, form: str, fixed: Volume, moving: Volume) -> str:
    """Writes a transform in a form, 'itk', 'fsl', 'freesurfer' or 'voxel', as it stands between these images.

    Returns a sentence on what the form cannot hold, or nothing. Raises ValueError for another form, BadInput where the
    file cannot be written, RuntimeError where it reads back as something else.
    """
    if form == "itk":
        return itk.write_field(path, transform, fixed)
    if form == "freesurfer":
        return freesurfer.write_warp(path, transform, fixed, moving)
    if form == "fsl":
        fsl.write_warp(path, transform, fixed, moving)
    elif form == "voxel":
        voxel_fields.write_field(path, transform, fixed, moving)
    else:
        raise ValueError(f"a transform is written as itk, fsl, freesurfer or voxel, not {form!r}")
    return ""


def _start(path: Path) -> bytes:
    """The first bytes of a file, decompressed where it is by gzip and whole that far."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            return file.read(START)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return b""  # whoever reads it says that it is damaged
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); check its permissions.") from error


def _nifti(path: Path, moving: Volume | None) -> itk.Field:
    """A field in NIfTI: ITK's has five dimensions, FSL's an intent, an array in voxels a JSON file."""
    image = open_nifti(path)
    code = int(image.header["intent_code"])
    if code == fsl.WARP or code in fsl.COEFFICIENTS:
        return fsl.read_warp(path, moving)
    if len(image.shape) == 4 and image.shape[3] == 3:
        if not voxel_fields.sidecar(path).is_file():
            raise BadInput(
                f"{path} has three numbers a voxel and intent code {code}, and does not say what they are; give "
                f"an array in voxels with {voxel_fields.sidecar(path).name} beside it, or FSL's of intent {fsl.WARP}."
            )
        return voxel_fields.read_field(path)
    return itk.read_field(path)
