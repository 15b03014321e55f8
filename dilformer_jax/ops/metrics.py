"""Measures of a registration, each with the definition it goes by: overlap, surface distance, folding.

Everything here takes NumPy arrays of whole volumes. A structure is *absent* when it is missing from one of the two
inputs: its value is NaN and belongs in no mean. It has *vanished* when both inputs have it and the warped label map
does not: its Dice is 0, which belongs in the mean, and its surface distance, which does not exist, is NaN. So, label
by label, `absent = isnan(dice)` and `vanished = isnan(hd95) & ~isnan(dice)`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64, Integer
from scipy.spatial import KDTree  # type: ignore[import-untyped]

Labels = Integer[np.ndarray, "_ _ _"]
Displacement = Float[np.ndarray, "D H W 3"]
Determinant = Float[np.ndarray, "D H W"]


def present(volume: Labels, labels: Sequence[int]) -> Bool[np.ndarray, " labels"]:
    """Which of the labels occur in the volume."""
    return _counts(volume, labels) > 0


def dice(
    fixed_labels: Labels, moved_labels: Labels, labels: Sequence[int], moving_labels: Labels | None = None
) -> Float64[np.ndarray, " labels"]:
    """Dice overlap 2|A∩B| / (|A| + |B|) of each label.

    NaN where the label is absent from `fixed_labels` or from `moving_labels`, the label map before warping (which may
    have another shape); 0 where it vanished in warping. Without `moving_labels` the moved ones stand in, and a label
    that vanished counts as absent. Raises ValueError when fixed and moved differ in shape.
    """
    _check_same_shape(fixed_labels, moved_labels)
    fixed = _counts(fixed_labels, labels)
    moved = _counts(moved_labels, labels)
    both = _counts(fixed_labels[fixed_labels == moved_labels], labels)
    moving = moved if moving_labels is None else _counts(moving_labels, labels)
    scores = np.full(len(labels), np.nan)
    np.divide(2.0 * both, fixed + moved, out=scores, where=(fixed > 0) & (moving > 0))
    return scores


def hausdorff(
    fixed_labels: Labels,
    moved_labels: Labels,
    labels: Sequence[int],
    spacing: Sequence[float | int],
    moving_labels: Labels | None = None,
    percent: float | int = 95,
) -> tuple[Float64[np.ndarray, " labels"], Float64[np.ndarray, " labels"]]:
    """`hd95` and `hd95_max` of each label in mm, from one set of distances; `percent=100` gives the Hausdorff distance.

    A surface voxel is one with a neighbour across a face that is outside the label or outside the volume, and its
    distance is to the nearest surface voxel of the other map, centre to centre. `spacing` is mm per voxel along each
    array axis. NaN where the label is absent or has vanished. Raises ValueError when fixed and moved differ in shape.
    """
    _check_same_shape(fixed_labels, moved_labels)
    pooled = np.full(len(labels), np.nan)
    larger = np.full(len(labels), np.nan)
    known = np.ones(len(labels), bool) if moving_labels is None else present(moving_labels, labels)
    fixed_surfaces = _surfaces(fixed_labels, labels, spacing)
    moved_surfaces = _surfaces(moved_labels, labels, spacing)
    for k, (fixed, moved) in enumerate(zip(fixed_surfaces, moved_surfaces, strict=True)):
        if known[k] and len(fixed) and len(moved):
            forth, back = _nearest(fixed, moved), _nearest(moved, fixed)
            pooled[k] = np.percentile(np.concatenate([forth, back]), percent)
            larger[k] = max(np.percentile(forth, percent), np.percentile(back, percent))
    return pooled, larger


def hd95(
    fixed_labels: Labels,
    moved_labels: Labels,
    labels: Sequence[int],
    spacing: Sequence[float | int],
    moving_labels: Labels | None = None,
) -> Float64[np.ndarray, " labels"]:
    """95th percentile, in mm, of the surface distances of both directions pooled, as in `medpy.metric.binary.hd95`."""
    return hausdorff(fixed_labels, moved_labels, labels, spacing, moving_labels)[0]


def hd95_max(
    fixed_labels: Labels,
    moved_labels: Labels,
    labels: Sequence[int],
    spacing: Sequence[float | int],
    moving_labels: Labels | None = None,
) -> Float64[np.ndarray, " labels"]:
    """The larger, in mm, of the two directed 95th percentiles of the surface distances.

    DeepMind's `surface-distance` and Learn2Reg take the larger one too, but weight each surface element by its area;
    this is the variant in which every surface voxel counts once.
    """
    return hausdorff(fixed_labels, moved_labels, labels, spacing, moving_labels)[1]


def jacobian_determinant(displacement: Displacement) -> Determinant:
    """Determinant of the derivative of x + u(x): how many times its volume each voxel takes up in the moving image.

    Derivatives as `np.gradient` takes them, central inside and one-sided at the faces, in the precision of the input.
    Raises ValueError for another shape than (D, H, W, 3), and where an axis has only one voxel.
    """
    if displacement.ndim != 4 or displacement.shape[3] != 3 or min(displacement.shape[:3]) < 2:
        raise ValueError(f"a displacement is (D, H, W, 3) with 2 voxels an axis or more, not {displacement.shape}")
    (a, b, c), (d, e, f), (g, h, i) = (np.gradient(displacement[..., axis]) for axis in range(3))
    for diagonal in (a, e, i):
        diagonal += 1
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def folded(displacement: Displacement, *, determinant: Determinant | None = None) -> Bool[np.ndarray, "D H W"]:
    """The voxels whose Jacobian determinant is not positive; a determinant that is not a number is not positive."""
    return ~((jacobian_determinant(displacement) if determinant is None else determinant) > 0)


def folding_percent(displacement: Displacement, *, determinant: Determinant | None = None) -> float:
    """Percent of the voxels of the whole volume, background included, whose Jacobian determinant is <= 0.

    The figure of VoxelMorph, TransMorph and RDP. Give `determinant` where `jacobian_determinant` is known already.
    """
    return 100.0 * float(np.mean(folded(displacement, determinant=determinant)))


def sdlogj(displacement: Displacement, *, determinant: Determinant | None = None) -> float:
    """Standard deviation of log(J + 3), Learn2Reg's SDlogJ, without the two outermost voxels of each face.

    The +3 is theirs (`log((jacobian_determinant(u) + 3).clip(1e-9, 1e9)).std()` in `evaluation.py` of MDL-UzL/L2R): it
    makes the figure smaller than the standard deviation of log J. Their stencil [-½, 0, ½], zero-padded, is that of
    `jacobian_determinant` in what the crop leaves. Raises ValueError where it leaves nothing.
    """
    if min(displacement.shape[:3]) < 5:
        raise ValueError(f"SDlogJ leaves out two voxels at each face; {displacement.shape[:3]} has none left")
    jacobian = jacobian_determinant(displacement) if determinant is None else determinant
    return float(np.std(np.log(np.clip(jacobian[2:-2, 2:-2, 2:-2] + 3, 1e-9, 1e9)), dtype=np.float64))


def _check_same_shape(fixed: np.ndarray, moved: np.ndarray) -> None:
    if fixed.shape != moved.shape:
        raise ValueError(f"fixed labels are {fixed.shape}, moved labels {moved.shape}: both belong on the fixed grid")


def _counts(volume: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Voxels of each label, in one pass over the volume."""
    if not len(labels):
        return np.zeros(0, int)
    # By their places in the list: atlases have ids of hundreds of millions, too many to count one by one.
    ids, inverse = np.unique(np.asarray(labels), return_inverse=True)
    wanted = volume[(volume >= ids[0]) & (volume <= ids[-1])]
    places = np.searchsorted(ids, wanted)
    return np.bincount(places[ids[places] == wanted], minlength=len(ids))[inverse]


def _surfaces(volume: np.ndarray, labels: Sequence[int], spacing: Sequence[float | int]) -> list[np.ndarray]:
    """Surface voxels of each label as (n, 3) points in mm: mask minus 6-neighbour erosion, of all labels at once."""
    surface = np.zeros(volume.shape, bool)
    for axis in range(3):
        values, marks = np.moveaxis(volume, axis, 0), np.moveaxis(surface, axis, 0)
        border = values[1:] != values[:-1]
        marks[1:] |= border
        marks[:-1] |= border
        marks[[0, -1]] = True
    index = np.flatnonzero(surface)
    index = index[np.isin(volume.ravel()[index], labels)]
    order = np.argsort(volume.ravel()[index], kind="stable")
    index = index[order]
    found = volume.ravel()[index]
    points = np.stack(np.unravel_index(index, volume.shape), axis=-1) * np.asarray(spacing, float)
    first = np.searchsorted(found, labels, side="left")
    last = np.searchsorted(found, labels, side="right")
    return [points[i:j] for i, j in zip(first, last, strict=True)]


def _nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance from each point to the nearest of the others."""
    # Midpoint splits suit points on a grid: half the time of the balanced tree, and less than distance transforms of
    # the labels' boxes, whose cost grows with the box.
    return KDTree(others, balanced_tree=False, compact_nodes=False).query(points)[0]
