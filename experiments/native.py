"""What registration in native space is held to, on real brains: disturbed scans, swapped roles, no network.

    python experiments/native.py --data ../shared/data

IXI: two whole scans of 2 mm, stripped by their label maps, are registered as they are, and again after each was turned
by 25 degrees, stored with other axes and directions, resliced to 1x1x3 mm and moved by 30 mm. The second result,
carried back through the known disturbances, is scored by the original label maps. LPBA40: a pair registered both ways;
how far from its start a point of the brain comes back.
"""

import argparse
import dataclasses
import itertools
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from dilformer_jax.io import executables
from dilformer_jax.io.geometry import apply_affine
from dilformer_jax.io.transforms import Transform, carried
from dilformer_jax.io.volumes import Volume, read_image, read_labels
from dilformer_jax.ops import overlap
from dilformer_jax.registration.grids import content
from dilformer_jax.registration.pipeline import register
from dilformer_jax.registration.refine import Refinement
from dilformer_jax.registration.warps import masked, warped

RESLICED = 1.0, 1.0, 3.0  # mm
DEGREES, MILLIMETRES = 25, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with ixi_2mm_native and lpba40")
    parser.add_argument("--pairs", type=int, default=2, help="how many pairs of IXI")
    parser.add_argument("--swaps", type=int, default=2, help="how many pairs of LPBA40")
    options = parser.parse_args()
    executables.keep()
    scans = sorted((options.data / "ixi_2mm_native").glob("*_T1.nii.gz"))
    brains = [stripped(path) for path in scans]
    for a, b in list(itertools.permutations(range(len(scans)), 2))[: 5 * options.pairs : 5]:
        disturbed_pair(brains[a], brains[b], a, b)
    subjects = sorted((options.data / "lpba40").glob("S3[5-9]_t1.nii.gz"))
    for a, b in list(itertools.combinations(subjects, 2))[: 2 * options.swaps : 2]:
        swapped_pair(a, b)


def stripped(path: Path) -> tuple[Volume, Volume]:
    """A scan without what its label map leaves out, and the label map."""
    labels = read_labels(path.with_name(path.name.replace("_T1", "_T1_DLMUSE")))
    return masked(read_image(path), labels.array > 0), labels


def disturbed_pair(fixed: tuple[Volume, Volume], moving: tuple[Volume, Volume], *names: int) -> None:
    plain = register(fixed[0], moving[0], None, refinement=Refinement())
    changes = disturbance(fixed[0], (1, 2, -1), "IPR"), disturbance(moving[0], (-2, 1, 1), "LSA")
    changed = [disturbed(brain[0], *change) for brain, change in zip((fixed, moving), changes, strict=True)]
    found = register(*changed, None, refinement=Refinement())
    through = (changes[0][0], *found.transform, np.linalg.inv(changes[1][0]))
    before, after = (dice(fixed[1], moving[1], transform) for transform in (plain.transform, through))
    header = dice(fixed[1], moving[1], ())
    print(
        f"IXI {names[1]} to {names[0]}: Dice {header:.4f} before, {before:.4f} undisturbed, {after:.4f} disturbed "
        f"({before - after:+.4f} lost); folded {plain.metrics['folding_percent']:.3f} %, "
        f"{found.metrics['folding_percent']:.3f} %; warnings {[*plain.warnings, *found.warnings]}",
        flush=True,
    )


def disturbance(volume: Volume, axis: tuple[float, ...], orientation: str) -> tuple[np.ndarray, str]:
    """The rigid map, RAS mm to RAS mm, about the middle of what the image shows, and how its result is stored."""
    middle = apply_affine(volume.affine, np.argwhere(content(volume.array)).mean(axis=0))
    direction = np.array(axis) / np.linalg.norm(axis)
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(direction * np.deg2rad(DEGREES)).as_matrix()
    matrix[:3, 3] = middle - matrix[:3, :3] @ middle + MILLIMETRES * direction[[1, 2, 0]]
    return matrix, orientation


def disturbed(volume: Volume, matrix: np.ndarray, orientation: str) -> Volume:
    """The image carried along by the matrix and resliced, stored with axes that point to these directions."""
    corners = apply_affine(matrix @ volume.affine, np.argwhere(content(volume.array)))
    low, high = corners.min(axis=0) - 8, corners.max(axis=0) + 8
    rows = [next(k for k, ends in enumerate(("LR", "PA", "IS")) if letter in ends) for letter in orientation]
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (row, letter) in enumerate(zip(rows, orientation, strict=True)):
        forward = letter in "RAS"
        affine[row, column] = RESLICED[row] * (1 if forward else -1)
        affine[row, 3] = low[row] if forward else high[row]
    shape = tuple(int(np.ceil((high - low)[row] / RESLICED[row])) for row in rows)
    array = warped(volume, (np.linalg.inv(matrix),), shape, affine)
    return dataclasses.replace(volume, array=array, affine=affine)


def dice(fixed: Volume, moving: Volume, transform: Transform) -> float:
    moved = warped(moving, transform, fixed.array.shape, fixed.affine, "nearest")
    ids = [int(i) for i in np.intersect1d(fixed.array, moving.array) if i]
    return float(overlap.dice(fixed.array, moved, ids, moving.array).mean())


def swapped_pair(a: Path, b: Path) -> None:
    one, other = read_image(a), read_image(b)
    there, back = (
        register(x, y, None, refinement=Refinement(), affine="none") for x, y in ((one, other), (other, one))
    )
    start = apply_affine(one.affine, np.argwhere(content(one.array)))
    error = np.linalg.norm(carried(carried(start, there.transform), back.transform) - start, axis=1)
    far = np.linalg.norm(carried(start, there.transform) - start, axis=1)
    print(
        f"{a.name} and {b.name}, both ways: a point of the brain comes back {error.mean():.3f} mm from its start on "
        f"average, {np.percentile(error, 95):.3f} at the 95th percentile, from {far.mean():.2f} mm away",
        flush=True,
    )


if __name__ == "__main__":
    main()
