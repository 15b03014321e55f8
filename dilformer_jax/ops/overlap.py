"""Overlap of label maps: Dice, and Klein's target and union overlaps.

A structure is *absent* when it is missing from one of the two inputs: its value is NaN and belongs in no mean. It has
*vanished* when both inputs have it and the warped label map does not: its overlap is 0, which belongs in the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Integer, UInt

Labels = Integer[np.ndarray, "_ _ _"]
PerLabel = Float64[np.ndarray, " labels"]
# Labels that span no more than this are looked up in a table; others are searched for.
TABLE = 1 << 16


def present(volume: Labels, labels: Sequence[int]) -> Bool[np.ndarray, " labels"]:
    """Which of the labels occur in the volume."""
    numbers, of = ranks(volume, labels)
    return _counts(numbers, len(labels))[of] > 0


def dice(fixed: Labels, moved: Labels, labels: Sequence[int], moving: Labels | None = None) -> PerLabel:
    """Dice overlap 2|F∩M| / (|F| + |M|) of each label in `fixed` and in `moved`, the label map after warping.

    NaN where the label is absent from `fixed` or from `moving`, the label map before warping (which may have another
    shape); 0 where it vanished in warping. Without `moving` the moved map stands in, and a label that vanished counts
    as absent. Raises ValueError when fixed and moved differ in shape.
    """
    found = _voxels(fixed, moved, labels, moving)
    return _ratio(2 * found.both, found.fixed + found.moved, found.known)


def target_overlap(fixed: Labels, moved: Labels, labels: Sequence[int], moving: Labels | None = None) -> PerLabel:
    """Target overlap |F∩M| / |F| of each label: how much of the fixed region was hit (Klein et al., NeuroImage 2009).

    NaN, 0 and ValueError as of `dice`.
    """
    found = _voxels(fixed, moved, labels, moving)
    return _ratio(found.both, found.fixed, found.known)


def union_overlap(fixed: Labels, moved: Labels, labels: Sequence[int], moving: Labels | None = None) -> PerLabel:
    """Union overlap |F∩M| / |F∪M| of each label, Jaccard's (Klein et al., NeuroImage 2009).

    NaN, 0 and ValueError as of `dice`.
    """
    found = _voxels(fixed, moved, labels, moving)
    return _ratio(found.both, found.fixed + found.moved - found.both, found.known)


def totals(fixed: Labels, moved: Labels, labels: Sequence[int]) -> dict[str, float]:
    """Klein's overlaps of a whole label map, summed over the labels before dividing (NeuroImage 2009).

    "target" Σ|F∩M| / Σ|F|, "mean" 2 Σ|F∩M| / Σ(|F| + |M|) and "union" Σ|F∩M| / Σ|F∪M|: large labels weigh more, and
    one that either map lacks counts with no intersection. NaN where neither has any of the labels. Raises ValueError
    when fixed and moved differ in shape, or where a label is named twice.
    """
    if len(set(labels)) != len(labels):
        raise ValueError(f"each label counts once in the totals, and some are named twice: {list(labels)}")
    found = _voxels(fixed, moved, labels, None)
    first, second, both = (float(counts.sum()) for counts in (found.fixed, found.moved, found.both))
    ratio = lambda numerator, denominator: numerator / denominator if denominator else float("nan")
    return {
        "target": ratio(both, first),
        "mean": ratio(2 * both, first + second),
        "union": ratio(both, first + second - both),
    }


def mean_present(values: Float[np.ndarray, " labels"]) -> float:
    """Mean over the labels that have a value; NaN where none has."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def mean_absent_zero(values: Float[np.ndarray, " labels"]) -> float:
    """Mean over all labels of a fixed list with 0 for those without a value, as RDP and TransMorph take it; NaN for an
    empty list."""
    return float(np.mean(np.nan_to_num(values, nan=0.0))) if len(values) else float("nan")


def ranks(volume: Labels, labels: Sequence[int]) -> tuple[UInt[np.ndarray, "_ _ _"], Int[np.ndarray, " labels"]]:
    """The volume in C order with small numbers for labels, 0 for what is none, and each label's number.

    Atlases have ids of hundreds of millions, too many to count one by one or to make a list of boxes for.
    """
    ids, inverse = np.unique(np.asarray(labels, np.int64), return_inverse=True)
    kind = np.uint8 if len(ids) < 1 << 8 else np.uint16 if len(ids) < 1 << 16 else np.uint32
    if not len(ids):
        return np.zeros(volume.shape, kind), inverse
    out = np.empty(volume.shape, kind)
    numbers = np.arange(1, len(ids) + 1, dtype=kind)
    table = np.zeros(min(ids[-1] - ids[0], TABLE) + 3, kind)
    if len(table) < TABLE:
        table[ids - ids[0] + 1] = numbers
    # By planes, whose copies as the integers of an index stay in the cache.
    for plane, into in zip(np.ascontiguousarray(volume), out, strict=True):
        values = plane.astype(np.int64)
        if len(table) < TABLE:
            # What lies outside the table is clipped to its first and last entry, which are 0.
            table.take(values - (ids[0] - 1), out=into, mode="clip")
        else:
            places = np.minimum(np.searchsorted(ids, values), len(ids) - 1)
            into[...] = np.where(ids[places] == values, numbers[places], 0)
    return out, inverse + 1


def check_same_shape(fixed: Labels, moved: Labels) -> None:
    """Raises ValueError unless the two maps have the same shape."""
    if fixed.shape != moved.shape:
        raise ValueError(f"fixed labels are {fixed.shape}, moved labels {moved.shape}: both belong on the fixed grid")


@dataclass(frozen=True, eq=False)
class _Voxels:
    """Voxels of each label in either map and in both, and whether both inputs have the label."""

    fixed: Int[np.ndarray, " labels"]
    moved: Int[np.ndarray, " labels"]
    both: Int[np.ndarray, " labels"]
    known: Bool[np.ndarray, " labels"]


def _voxels(fixed: Labels, moved: Labels, labels: Sequence[int], moving: Labels | None) -> _Voxels:
    check_same_shape(fixed, moved)
    (first, of), (second, _) = ranks(fixed, labels), ranks(moved, labels)
    in_fixed, in_moved, both = (
        _counts(numbers, len(labels))[of] for numbers in (first, second, first[first == second])
    )
    in_moving = in_moved > 0 if moving is None else present(moving, labels)
    return _Voxels(in_fixed, in_moved, both, (in_fixed > 0) & in_moving)


def _counts(numbers: UInt[np.ndarray, "..."], labels: int) -> Int[np.ndarray, " counts"]:
    # Most voxels are none of the labels, and to leave them out takes less time than to count them.
    return np.bincount(numbers[numbers > 0], minlength=labels + 1)


def _ratio(
    numerator: Int[np.ndarray, " labels"], denominator: Int[np.ndarray, " labels"], known: Bool[np.ndarray, " labels"]
) -> PerLabel:
    return np.divide(numerator, denominator, out=np.full(len(known), np.nan), where=known)
