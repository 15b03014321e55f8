"""Displacements as a plain array in voxels, for programs of one's own, with a JSON file that says what they are.

`NAME.nii.gz` is float32 (D, H, W, 3) on the fixed grid, u with moved(x) = moving[x + u(x)]: x + u(x) is an index into
the moving image's own array, whatever its grid, and component a is along its array axis a. `NAME.json` beside it says
so and has both grids, so that the pair of files is a whole transform.
"""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float32, Float64

from dilformer_jax.io.geometry import is_singular, reframed, to_world
from dilformer_jax.io.headers import BadInput, place
from dilformer_jax.io.transforms import Field, Grid, Transform, check_agreement, grid_of, total_displacement
from dilformer_jax.io.volumes import Volume, open_nifti, read_voxels, replacing, replacing_nifti

UNITS, MAPS = "voxels", "fixed->moving"
MEANING = {
    "units": UNITS,
    "frame": "moved[x] = moving[x + u[x]]: x indexes the fixed array, x + u[x] the moving array",
    "vector_axis": -1,
    "components": "along array axes 0, 1, 2",
    "maps": MAPS,
    "affine_included": True,
}


def sidecar(path: Path) -> Path:
    """The JSON file that belongs to a NIfTI file."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")


def displacement(transform: Transform, fixed: Volume | Grid, moving: Volume | Grid) -> Float32[np.ndarray, "d h w 3"]:
    """A transform as u on the fixed grid, moved[x] = moving[x + u[x]]: in voxels of the moving array, whatever its
    grid."""
    here, there = grid_of(fixed), grid_of(moving)
    return reframed(total_displacement(transform, here), here.affine, np.linalg.inv(there.affine), np.eye(4))


def write_field(path: str | Path, transform: Transform, fixed: Volume | Grid, moving: Volume | Grid) -> None:
    """Writes a transform as an array in voxels and its JSON file, and reads both back before they take their names.

    Raises BadInput where they cannot be written.
    """
    path = Path(path)
    here, there = grid_of(fixed), grid_of(moving)
    u = displacement(transform, here, there)
    header = nib.nifti1.Nifti1Header()
    place(header, here.affine)
    header.set_xyzt_units("mm")
    grids = {
        name: {"shape": [int(n) for n in grid.shape], "affine": np.asarray(grid.affine, float).tolist()}
        for name, grid in (("fixed", here), ("moving", there))
    }
    with replacing_nifti(path) as partial, replacing(sidecar(path)) as description:
        nib.nifti1.Nifti1Image(u, None, header).to_filename(partial)
        description.write_text(json.dumps({**MEANING, **grids}, indent=2) + "\n", "utf-8")
        check_agreement(path, (read_field(partial, description),), transform, here)


def read_field(path: str | Path, description: Path | None = None) -> Field:
    """An array in voxels as a field on the fixed grid, RAS mm; `description` is its JSON file, beside it by default.

    Raises BadInput where either is missing, damaged or says anything else than `write_field` does.
    """
    path = Path(path)
    beside = sidecar(path) if description is None else description
    try:
        told = json.loads(beside.read_text("utf-8"))
        meant = {key: told[key] for key in ("units", "vector_axis", "maps", "affine_included")}
        shape = tuple(told["fixed"]["shape"])
        fixed, moving = (_affine(told[name]["affine"]) for name in ("fixed", "moving"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{beside} is missing, damaged or does not describe {path.name}; keep both files of a voxel array together."
        ) from error
    if meant != {key: MEANING[key] for key in meant}:
        raise BadInput(f"{beside} tells of {meant}; give an array in {UNITS} that maps {MAPS}, vectors last.")
    image = open_nifti(path)
    if image.shape != (*shape, 3):
        raise BadInput(f"{path} has shape {image.shape} where {beside.name} says {(*shape, 3)}; give a pair.")
    u = np.asarray(read_voxels(image, path), np.float32)
    bad = np.count_nonzero(~np.isfinite(u))
    if bad:
        raise BadInput(f"{path} has {bad} NaN or infinite values; write it again.")
    return Field(to_world(u, fixed, moving), fixed)


def _affine(rows: list[list[float]]) -> Float64[np.ndarray, "4 4"]:
    matrix = np.array(rows, np.float64)
    if matrix.shape != (4, 4) or is_singular(matrix):
        raise ValueError("no affine")
    return matrix
