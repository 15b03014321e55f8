"""How a displacement folds: Jacobian determinants by differences, and the volume that is not mapped one to one.

A displacement u is in voxels, (D, H, W, 3), and maps x to x + u(x). The volumes are gone through by slabs that stay in
the cache, in two threads.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

Displacement = Float[np.ndarray, "D H W 3"]
Determinant = Float[np.ndarray, "D H W"]
Mask = Bool[np.ndarray, "D H W"]
WORKERS = 2
# Voxels of a slab: the fastest of 2^13 to 2^18, measured with 160x192x160 ones.
SLAB = 1 << 16


def jacobian_determinant(displacement: Displacement) -> Determinant:
    """Determinant of the derivative of x + u(x): how many times its volume each voxel takes up in the moving image.

    Derivatives as `np.gradient` takes them, central inside and one-sided at the faces, in the precision of the input.
    Raises ValueError for another shape than (D, H, W, 3), and where an axis has only one voxel.
    """
    if displacement.ndim != 4 or displacement.shape[3] != 3 or min(displacement.shape[:3]) < 2:
        raise ValueError(f"a displacement is (D, H, W, 3) with 2 voxels an axis or more, not {displacement.shape}")
    depth = len(displacement)
    found = np.empty(displacement.shape[:3], displacement.dtype)

    def fill(start: int, stop: int) -> None:
        low, high = max(start - 1, 0), min(stop + 1, depth)
        inner = slice(start - low, stop - low)
        rows = []
        for axis in range(3):
            u = np.ascontiguousarray(displacement[low:high, ..., axis])
            rows.append([np.gradient(u, axis=0)[inner], *np.gradient(u[inner], axis=(1, 2))])
            rows[axis][axis] += 1
        found[start:stop] = _dot(rows[0], _cross(rows[1], rows[2]))

    _by_slabs(fill, found.shape)
    return found


def folded(displacement: Displacement, *, determinant: Determinant | None = None) -> Mask:
    """The voxels whose Jacobian determinant is not positive; a determinant that is not a number is not positive."""
    return ~((jacobian_determinant(displacement) if determinant is None else determinant) > 0)


def folding_percent(
    displacement: Displacement, *, determinant: Determinant | None = None, mask: Mask | None = None
) -> float:
    """Percent of the voxels whose Jacobian determinant is <= 0: of the whole volume, background included, or of `mask`.

    The whole volume's is the figure of VoxelMorph, TransMorph and RDP. Give `determinant` where `jacobian_determinant`
    is known already. NaN for a mask without voxels.
    """
    found = folded(displacement, determinant=determinant)
    if mask is None:
        return 100.0 * np.count_nonzero(found) / found.size
    voxels = np.count_nonzero(mask)
    return 100.0 * np.count_nonzero(found & mask) / voxels if voxels else float("nan")


def sdlogj(displacement: Displacement, *, determinant: Determinant | None = None) -> float:
    """Standard deviation of log(J + 3), Learn2Reg's SDlogJ, without the two outermost voxels of each face.

    The +3 is theirs (`log((jacobian_determinant(u) + 3).clip(1e-9, 1e9)).std()` in `evaluation.py` of MDL-UzL/L2R): it
    makes the figure smaller than the standard deviation of log J. Their stencil [-½, 0, ½], zero-padded, is that of
    `jacobian_determinant` in what the crop leaves. Raises ValueError where it leaves nothing.
    """
    if min(displacement.shape[:3]) < 5:
        raise ValueError(f"SDlogJ leaves out two voxels at each face; {displacement.shape[:3]} has none left")
    jacobian = (jacobian_determinant(displacement) if determinant is None else determinant)[2:-2, 2:-2, 2:-2]

    def moments(start: int, stop: int) -> tuple[int, float, float]:
        logs = np.log(np.clip(jacobian[start:stop] + 3, 1e-9, 1e9)).astype(np.float64)
        return logs.size, float(logs.mean()), float(logs.var())

    sizes, means, variances = np.array(_by_slabs(moments, jacobian.shape)).T
    mean = np.average(means, weights=sizes)
    return float(np.sqrt(np.average(variances + (means - mean) ** 2, weights=sizes)))


def ndv_percent(displacement: Displacement, mask: Mask | None = None) -> float:
    """Non-diffeomorphic volume, in percent of the voxels (Liu et al., "On Finite Difference Jacobian Computation in
    Deformable Image Registration", IJCV 2024).

    x + u(x) maps the grid's points and is linear in the tetrahedra between them. A cube of eight points is divided into
    five tetrahedra, in two ways; each voxel that has all its 26 neighbours is the vertex of ten of them: one at the
    corner of each of the eight cubes around it, whose edges are the steps to three neighbours, and of two that fill the
    middle of a cube, that towards +++ and that towards ---, whose edges are the face diagonals. With det the six-fold
    signed volume of an image of a tetrahedron, a voxel's non-diffeomorphic volume is the sum of its ten max(-det, 0) /
    6, halved because of the two ways. The percentage is the sum over voxels by their number, without the outermost
    voxels of each face: of the whole volume so cropped, or of the mask so cropped. That is what the authors' code did
    for the paper, and what MIR does; their package since April 2023 continues the displacement beyond the faces by its
    border value instead and crops nothing.

    What folds is measured here by how much it folds, and so that no fold is missed, as central differences miss those
    of a checkerboard. (Their NDP, by contrast, is `folding_percent` in the same cropped mask.) Volumes are computed in
    the precision of the input and added up in float64. NaN for a cropped mask without voxels, and where u is not a
    number. Raises ValueError for another shape than (D, H, W, 3), and where an axis has fewer than three voxels.
    """
    if displacement.ndim != 4 or displacement.shape[3] != 3 or min(displacement.shape[:3]) < 3:
        raise ValueError(f"a displacement is (D, H, W, 3) with 3 voxels an axis or more, not {displacement.shape}")
    depth, height, width = displacement.shape[:3]
    inside = None if mask is None else mask[1:-1, 1:-1, 1:-1]
    voxels = (depth - 2) * (height - 2) * (width - 2) if inside is None else np.count_nonzero(inside)

    def volume(start: int, stop: int) -> float:
        found = _folded_volume(displacement[start : stop + 2])
        return float(np.sum(found if inside is None else found * inside[start:stop], dtype=np.float64))

    total = sum(_by_slabs(volume, (depth - 2, height, width)))
    return 100.0 * total / voxels if voxels else float("nan")


def _folded_volume(displacement: Displacement) -> Float[np.ndarray, "D-2 H-2 W-2"]:
    """Half the negative volume of the ten tetrahedra of each voxel that has all its neighbours."""
    depth, height, width = displacement.shape[:3]
    # All voxels in one line, a neighbour being so many steps along it: every operand is contiguous. What the steps give
    # across the faces is cut off in the end.
    x, y, z = height * width, width, 1
    first, last = x + y + z, depth * x - (x + y + z)
    points = np.ascontiguousarray(np.moveaxis(displacement, 3, 0)).reshape(3, -1)
    forward = [points[:, step:] - points[:, :-step] for step in (x, y, z)]
    for axis in range(3):
        forward[axis][axis] += 1  # from the image of each voxel to that of the next one

    def edge(axis: int, offset: int = 0) -> Float[np.ndarray, "3 n"]:
        return forward[axis][:, first + offset : last + offset]

    negative = np.zeros(last - first, displacement.dtype)
    for b in (edge(1), edge(1, -y)):
        for c in (edge(2), edge(2, -z)):
            normal = _cross(b, c)
            for a in (edge(0), edge(0, -x)):
                negative -= np.minimum(_dot(a, normal), 0)
    up = _cross(edge(1) + edge(2, y), edge(0) + edge(2, x))
    negative -= np.minimum(_dot(edge(0) + edge(1, x), up), 0)
    down = _cross(edge(1, -y) + edge(2, -y - z), edge(0, -x) + edge(2, -x - z))
    negative -= np.minimum(_dot(edge(0, -x) + edge(1, -x - y), down), 0)
    found = np.zeros(((depth - 2), height, width), displacement.dtype)
    found.ravel()[y + z : -(y + z)] = negative
    return found[:, 1:-1, 1:-1] / 12


Vector = Sequence[np.ndarray] | np.ndarray


def _cross(a: Vector, b: Vector) -> Vector:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _dot(a: Vector, b: Vector) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _by_slabs(function: Callable[[int, int], Any], shape: tuple[int, ...]) -> list[Any]:
    """What the function of the first plane and of that after the last gives for each slab of planes along axis 0."""
    planes = max(SLAB // (shape[1] * shape[2]), 1)
    starts = range(0, shape[0], planes)
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(lambda start: function(start, min(start + planes, shape[0])), starts))
