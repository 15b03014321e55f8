"""Transforms in FSL's files: FNIRT's warp fields and FLIRT's matrices.

FSL counts in mm from an image's first voxel along its array axes, by the header's voxel sizes, and reverses the first
axis where the determinant of the affine is positive ("neurological" storage). A relative warp is a NIfTI file
(X, Y, Z, 3) on the fixed grid: a point p of the fixed image, in its FSL mm, matches p + warp(p) in the moving image's
FSL mm; an absolute one holds p + warp(p). A matrix takes FSL mm of the moving image to those of the fixed image.
Neither means anything without the headers of the images it belongs to.
"""

from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float64, Real

from dilformer_jax.io.geometry import reframed
from dilformer_jax.io.headers import BadInput
from dilformer_jax.io.text import check_affine, numbers, read_text
from dilformer_jax.io.transforms import Field, Transform, check_agreement, grid_of, total_displacement
from dilformer_jax.io.volumes import Volume, nifti, open_nifti, read_voxels, replacing, replacing_nifti

WARP = 2006  # FSL_FNIRT_DISPLACEMENT_FIELD
COEFFICIENTS = (2007, 2008, 2009, 2016, 2017)  # of splines and cosines, by FNIRT and topup
RELATIVE = b"relative"  # in the intent's name, which FSL leaves empty


def to_fsl(shape: tuple[int, ...], header: nib.nifti1.Nifti1Header) -> Float64[np.ndarray, "4 4"]:
    """The matrix from voxel indices of an image to its FSL mm."""
    sizes = np.abs(header["pixdim"][1:4]).astype(np.float64)
    matrix = np.diag([*sizes, 1])
    if np.linalg.det(header.get_best_affine()) > 0:
        matrix[0, 0], matrix[0, 3] = -sizes[0], (shape[0] - 1) * sizes[0]
    return matrix


def _image_to_fsl(image: Volume) -> Float64[np.ndarray, "4 4"]:
    return to_fsl(image.array.shape, nifti(np.broadcast_to(np.uint8(0), image.array.shape), image).header)


def write_warp(path: str | Path, transform: Transform, fixed: Volume, moving: Volume) -> None:
    """Writes a transform as a relative warp on the fixed grid, sheared ones too, and reads it back before it takes its
    name. Raises BadInput where the file cannot be written."""
    path = Path(path)
    # By way of an image, so that FSL finds the very voxel sizes and forms of the fixed image in the warp.
    like = nifti(np.broadcast_to(np.float32(0), fixed.array.shape), fixed)
    identity = np.eye(4)
    voxels = reframed(
        total_displacement(transform, grid_of(fixed)), fixed.affine, np.linalg.inv(moving.affine), identity
    )
    warp = reframed(voxels, identity, _image_to_fsl(moving), to_fsl(fixed.array.shape, like.header))
    header = like.header.copy()
    header["intent_code"], header["intent_name"] = WARP, RELATIVE
    with replacing_nifti(path) as partial:
        type(like)(warp, None, header).to_filename(partial)
        check_agreement(path, (read_warp(partial, moving),), transform, grid_of(fixed))


def read_warp(path: str | Path, moving: Volume | None) -> Field:
    """FSL's relative or absolute warp as a field on its own grid, RAS mm.

    FSL does not say which of the two a file holds. As its programs do, this takes for absolute what varies less once
    the places of the voxels are taken away. Raises BadInput where the file is none, or where `moving`, without whose
    header it means nothing, is missing.
    """
    path = Path(path)
    image = open_nifti(path)
    code = int(image.header["intent_code"])
    if code in COEFFICIENTS:
        raise BadInput(
            f"{path} holds FNIRT's coefficients, no field; convert it by `fnirtfileutils --withaff --outformat=field`."
        )
    if len(image.shape) != 4 or image.shape[3] != 3 or code != WARP:
        found = f"has shape {image.shape} and intent code {code}"
        raise BadInput(f"{path} {found} and is no FSL warp (X, Y, Z, 3) of intent {WARP}; give one.")
    if moving is None:
        raise BadInput(f"{path} is an FSL warp, which counts from the moving image's header; give that with --moving.")
    vectors = np.asarray(read_voxels(image, path), np.float32)
    bad = np.count_nonzero(~np.isfinite(vectors))
    if bad:
        raise BadInput(f"{path} has {bad} NaN or infinite values; write it again.")
    start = to_fsl(image.shape, image.header)
    if image.header["intent_name"].item().strip(b"\0") != RELATIVE:
        relative = reframed(vectors, np.diag([0, 0, 0, 1]), np.eye(4), start)
        if relative.std(axis=(0, 1, 2)).sum() < vectors.std(axis=(0, 1, 2)).sum():
            vectors = relative
    through = moving.affine @ np.linalg.inv(_image_to_fsl(moving))
    return Field(reframed(vectors, start, through, image.affine), image.affine)


def write_flirt(path: str | Path, matrix: Real[np.ndarray, "4 4"], fixed: Volume, moving: Volume) -> None:
    """Writes an affine, RAS mm of the fixed image to RAS mm of the moving image, as FLIRT's matrix.

    Read back before it takes its name. Raises BadInput where it cannot be inverted or written.
    """
    path = Path(path)
    check_affine(path, matrix)
    to_moving = _image_to_fsl(moving) @ np.linalg.inv(moving.affine)
    to_fixed = _image_to_fsl(fixed) @ np.linalg.inv(fixed.affine)
    flirt = to_fixed @ np.linalg.inv(matrix) @ np.linalg.inv(to_moving)
    with replacing(path) as partial:
        partial.write_text("".join("  ".join(f"{x:.15g}" for x in row) + "\n" for row in flirt))
        check_agreement(path, (read_flirt(partial, fixed, moving),), (matrix,), grid_of(fixed))


def read_flirt(path: str | Path, fixed: Volume | None, moving: Volume | None) -> Float64[np.ndarray, "4 4"]:
    """An affine, RAS mm of the fixed image to RAS mm of the moving image, from FLIRT's matrix.

    Raises BadInput where the file holds anything else, or where either image is missing.
    """
    path = Path(path)
    found = numbers(path, read_text(path))
    if len(found) != 16:
        raise BadInput(f"{path} has {len(found)} numbers where FLIRT's matrix has 16; give one.")
    flirt = found.reshape(4, 4)
    check_affine(path, flirt)
    missing = [f"--{name}" for name, image in (("fixed", fixed), ("moving", moving)) if image is None]
    if fixed is None or moving is None:
        raise BadInput(
            f"{path} is taken for FLIRT's matrix, which counts from the headers of both images; give the missing ones "
            f"with {' and '.join(missing)}."
        )
    from_moving = moving.affine @ np.linalg.inv(_image_to_fsl(moving))
    to_fixed = _image_to_fsl(fixed) @ np.linalg.inv(fixed.affine)
    return from_moving @ np.linalg.inv(flirt) @ to_fixed
