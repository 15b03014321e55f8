"""Displacements in files: ITK/ANTs displacement fields.

Such a field is a NIfTI file (X, Y, Z, 1, 3) of vectors in LPS mm on the fixed grid: a point p of the fixed image, in
mm, matches p + field(p) of the moving image, so both affines are included and ITK and ANTs apply the file as it is.
"""

from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float, Float32

from dilformer_jax.io.geometry import corner_distance, from_world, to_world
from dilformer_jax.io.volumes import TOLERANCE_MM, BadInput, Volume, open_nifti, read_voxels, replacing_nifti

RAS_TO_LPS = np.array([-1, -1, 1], np.float32)
VECTOR = 1007  # NIFTI_INTENT_VECTOR: ITK reads the last axis as the components of one voxel


def write_displacement(path: str | Path, u: Float[np.ndarray, "d h w 3"], fixed: Volume, moving: Volume) -> None:
    """Writes u (D, H, W, 3), voxels of the fixed grid with moved(x) = moving(x + u(x)), as an ITK displacement field.

    The file is read back and compared before it takes its name. Raises BadInput where the fixed affine is sheared,
    which ITK cannot represent, or where the file cannot be written.
    """
    if u.shape[:3] != fixed.array.shape:
        raise ValueError(f"the displacement has shape {u.shape}, but {fixed.path} has {fixed.array.shape}")
    if not np.isfinite(u).all():
        raise ValueError(f"the displacement for {fixed.path} has NaN or infinite values")
    header = nib.nifti1.Nifti1Header()
    header.set_qform(fixed.affine, code=1)
    affine = header.get_qform()  # as rotation and spacing, the only grids that ITK knows
    if corner_distance(fixed.array.shape, affine, fixed.array.shape, fixed.affine) > TOLERANCE_MM:
        raise BadInput(f"{fixed.path} has a sheared affine, which ITK fields cannot have; resample it to right angles.")
    header.set_sform(affine, code=1)
    header.set_xyzt_units("mm")
    header.set_intent("vector")
    field = to_world(u, affine, moving.affine) * RAS_TO_LPS
    path = Path(path)
    with replacing_nifti(path) as partial:
        nib.nifti1.Nifti1Image(field[:, :, :, None], None, header).to_filename(partial)
        error = np.abs(read_displacement(partial, fixed, moving) - u).max()
        if error > 1e-3:
            raise RuntimeError(f"{path} reads back {error:g} voxels away from what was written")


def read_displacement(path: str | Path, fixed: Volume, moving: Volume) -> Float32[np.ndarray, "d h w 3"]:
    """The displacement u (D, H, W, 3), in voxels, of an ITK displacement field that lies on the fixed grid.

    Raises BadInput where the file is no such field, lies on another grid or has non-finite values.
    """
    path = Path(path)
    image = open_nifti(path)
    shape = fixed.array.shape
    if len(image.shape) != 5 or image.shape[3:] != (1, 3) or image.header["intent_code"] != VECTOR:
        found = f"has shape {image.shape} and intent code {image.header['intent_code']}"
        raise BadInput(f"{path} {found} and is no ITK displacement field (X, Y, Z, 1, 3) of intent {VECTOR}; give one.")
    if image.shape[:3] != shape:
        found = f"has {image.shape[:3]} voxels where {fixed.path} has {shape}"
        raise BadInput(f"{path} {found}; give the field of this fixed image.")
    distance = corner_distance(shape, image.affine, shape, fixed.affine)
    if distance > TOLERANCE_MM:
        raise BadInput(f"{path} lies {distance:.3g} mm away from {fixed.path}; give the field of this fixed image.")
    field = read_voxels(image, path)[:, :, :, 0]
    if not np.isfinite(field).all():
        raise BadInput(f"{path} has {np.count_nonzero(~np.isfinite(field))} NaN or infinite values; write it again.")
    return from_world(field * RAS_TO_LPS, image.affine, moving.affine)
