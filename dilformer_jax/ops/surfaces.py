"""Distances in mm between the surfaces of the structures of two label maps, by the two definitions in use.

MedPy's surface is the voxels with a neighbour across a face that is outside the structure or outside the volume; its
distances run from centre to centre, and each voxel counts once. The surface of DeepMind's `surface-distance`, which
Learn2Reg uses, is the corners of voxels around which lie voxels inside and voxels outside; its distances run from
corner to corner, and each corner counts by its area. The two differ by half a voxel and more, so that numbers of one
are not to be compared with numbers of the other.
"""

import functools
import itertools
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Bool, Float64, Int64, Integer
from scipy import ndimage  # type: ignore[import-untyped]
from scipy.spatial import KDTree  # type: ignore[import-untyped]

from dilformer_jax.ops import surfels
from dilformer_jax.ops.overlap import check_same_shape, present, ranks

Labels = Integer[np.ndarray, "_ _ _"]
Mask = Bool[np.ndarray, "_ _ _"]
Points = Int64[np.ndarray, "_ 3"]
Distances = Float64[np.ndarray, " _"]
VOXELS = ("hd", "hd95", "assd")
CORNERS = ("hd95_max", "nsd")
# Measured with the regions of LPBA40: points of a k-d tree's leaf, the fastest of 5 to 80; how far, in voxels, nearest
# points are looked for one step after the other, the fastest of 2 to 5; the steps that are tried at once, and of how
# many points.
LEAF = 48
REACH = 4
STOPS = (0, 7, 27, 57, 123)
BLOCK = 1 << 12


def surface_scores(
    fixed: Labels,
    moved: Labels,
    labels: Sequence[int],
    spacing: Sequence[float | int],
    moving: Labels | None = None,
    *,
    tolerance: float | int = 1.0,
    workers: int = 2,
    only: Collection[str] | None = None,
) -> dict[str, Float64[np.ndarray, " labels"]]:
    """Surface distances of each label in `fixed` and in `moved`, the label map after warping.

    Args:
      labels: those scored, in the order of the values.
      spacing: mm per voxel along each array axis.
      moving: the label map before warping, which may have another shape.
      tolerance: mm, of "nsd".
      workers: threads.
      only: the measures wanted; all of them without it.

    Returns:
      The measures by name:
      "hd": Hausdorff distance, the largest distance of either direction, in mm (MedPy's `hd`).
      "hd95": 95th percentile, as NumPy interpolates it, of the distances of both directions pooled, in mm (MedPy's
        `hd95`).
      "assd": mean of the distances of both directions pooled, in mm (MedPy's `assd` since 0.5; before, and elsewhere,
        it was the mean of the two directed means).
      "hd95_max": the larger of the two directed distances within which lie 95 % of a surface's area, in mm
        (DeepMind's `compute_robust_hausdorff(..., 95)`).
      "nsd": normalised surface distance, also surface Dice: the part of the area of both surfaces that is within the
        tolerance of the other one, 0 to 1 (DeepMind's `compute_surface_dice_at_tolerance`).
      NaN where the label is absent from `fixed` or `moving`; where it vanished in warping, "nsd" is 0 and the others,
      which do not exist, are NaN. Without `moving` the moved map stands in, and a label that vanished counts as absent.

    Raises:
      ValueError: fixed and moved differ in shape, or a measure that is not of these.
    """
    check_same_shape(fixed, moved)
    wanted = [key for key in (*VOXELS, *CORNERS) if only is None or key in only]
    if only is not None and len(wanted) != len(set(only)):
        raise ValueError(f"surface distances are {', '.join((*VOXELS, *CORNERS))}, got {', '.join(only)}")
    (first, of), (second, _) = ranks(fixed, labels), ranks(moved, labels)
    boxes = [ndimage.find_objects(places, max(len(labels), 1)) for places in (first, second)]
    in_fixed, in_moved = (np.array([box[rank - 1] is not None for rank in of], bool) for box in boxes)
    known = in_fixed & (in_moved if moving is None else present(moving, labels))

    def scored(label: int) -> dict[str, float]:
        rank = of[label]
        masks = [places[box[rank - 1]] == rank for places, box in zip((first, second), boxes, strict=True)]
        starts = [np.array([edge.start for edge in box[rank - 1]]) for box in boxes]
        return _scores(masks, starts, spacing, wanted, tolerance)

    # The largest first, so that no thread is left with one at the end.
    size = lambda label: -sum(np.prod([edge.stop - edge.start for edge in box[of[label] - 1]]) for box in boxes)
    order = sorted(np.flatnonzero(known & in_moved).tolist(), key=size)
    values = {key: np.full(len(labels), np.nan) for key in wanted}
    if "nsd" in wanted:
        values["nsd"][known & ~in_moved] = 0.0
    with ThreadPoolExecutor(workers) as pool:
        for label, found in zip(order, pool.map(scored, order), strict=True):
            for key in wanted:
                values[key][label] = found[key]
    return values


def _scores(
    masks: Sequence[Mask],
    starts: Sequence[Int64[np.ndarray, "3"]],
    spacing: Sequence[float | int],
    wanted: Collection[str],
    tolerance: float | int,
) -> dict[str, float]:
    """The measures of one label, whose boxes start at these voxels of the volume."""
    found = {}
    if set(VOXELS) & set(wanted):
        pooled = np.concatenate(
            _distances([_edge(mask) + start for mask, start in zip(masks, starts, strict=True)], spacing)
        )
        if "hd" in wanted:
            found["hd"] = float(pooled.max())
        if "hd95" in wanted:
            found["hd95"] = float(np.percentile(pooled, 95))
        if "assd" in wanted:
            found["assd"] = float(pooled.mean())
    if set(CORNERS) & set(wanted):
        codes = [surfels.codes(mask) for mask in masks]
        points = [np.argwhere((code != 0) & (code != 255)) for code in codes]
        area = surfels.areas(spacing)
        areas = [area[code[tuple(at.T)]] for code, at in zip(codes, points, strict=True)]
        both = _distances([at + start for at, start in zip(points, starts, strict=True)], spacing)
        if "hd95_max" in wanted:
            found["hd95_max"] = max(_quantile(each, weights, 0.95) for each, weights in zip(both, areas, strict=True))
        if "nsd" in wanted:
            within = sum(weights[each <= tolerance].sum() for each, weights in zip(both, areas, strict=True))
            found["nsd"] = float(within / sum(weights.sum() for weights in areas))
    return found


def _edge(mask: Mask) -> Points:
    """The voxels of a mask with a neighbour across a face that is not of it."""
    padded = np.pad(mask, 1)
    inner = mask.copy()
    for axis in range(3):
        for step in (slice(None, -2), slice(2, None)):
            inner &= padded[tuple(step if axis == other else slice(1, -1) for other in range(3))]
    return np.argwhere(mask & ~inner)


def _distances(points: Sequence[Points], spacing: Sequence[float | int]) -> list[Distances]:
    """Of each point of either surface, the distance in mm to the nearest of the other.

    All are computed from whole voxels, so that equal distances are equal numbers, wherever in the volume.
    """
    scale = np.asarray(spacing, float)
    steps, lengths = _ball(tuple(scale.tolist()))
    # Both surfaces in one line of voxels with room for the steps, which are then steps along the line.
    reach = np.abs(steps).max(axis=0)
    low = np.minimum(points[0].min(axis=0), points[1].min(axis=0)) - reach
    shape = np.maximum(points[0].max(axis=0), points[1].max(axis=0)) + reach + 1 - low
    strides = np.array([shape[1] * shape[2], shape[2], 1])
    places = [(each - low) @ strides for each in points]
    found = []
    for this, other in ((0, 1), (1, 0)):
        line = np.zeros(int(shape.prod()), bool)
        line[places[other]] = True
        blocks = np.array_split(places[this], len(places[this]) // BLOCK + 1)
        distances = np.concatenate([_near(block, line, steps @ strides, lengths) for block in blocks])
        far = np.flatnonzero(np.isinf(distances))
        if len(far):
            # Midpoint splits suit points on a grid: half the time of the balanced tree, and less than distance
            # transforms of the labels' boxes, whose cost grows with the box.
            tree = KDTree(points[other] * scale, LEAF, compact_nodes=False, balanced_tree=False)
            nearest = tree.query(points[this][far] * scale)[1]
            distances[far] = _length((points[other][nearest] - points[this][far]) * scale)
        found.append(distances)
    return found


def _near(
    places: Int64[np.ndarray, " _"], line: Bool[np.ndarray, " _"], steps: Int64[np.ndarray, " _"], lengths: Distances
) -> Distances:
    """The distance from each place on a line to the first of the steps from it that hits, infinite where none does.

    The better a registration, the more of the distances are found here, in a tenth of the time of a tree.
    """
    found = np.full(len(places), np.inf)
    left = np.arange(len(places))
    stops = [*(stop for stop in STOPS if stop < len(steps)), len(steps)]
    for start, stop in itertools.pairwise(stops):
        hits = line[places[left, None] + steps[start:stop]]
        first = hits.argmax(axis=1)
        hit = hits[np.arange(len(left)), first]
        found[left[hit]] = lengths[start + first[hit]]
        left = left[~hit]
    return found


@functools.lru_cache(maxsize=8)
def _ball(spacing: tuple[float, ...]) -> tuple[Points, Distances]:
    """The steps of a ball with the volume of one of `REACH` voxels' radius, the shortest first, and their lengths."""
    radius = REACH * float(np.prod(spacing)) ** (1 / 3)
    ends = [int(radius / size) for size in spacing]
    steps = np.stack(np.meshgrid(*(np.arange(-end, end + 1) for end in ends), indexing="ij"), axis=-1).reshape(-1, 3)
    lengths = _length(steps * np.array(spacing))
    order = np.argsort(lengths, kind="stable")
    order = order[: np.searchsorted(lengths[order], radius, side="right")]
    return steps[order], lengths[order]


def _length(vectors: Float64[np.ndarray, "_ 3"]) -> Distances:
    x, y, z = vectors.T
    return np.sqrt(x * x + y * y + z * z)


def _quantile(distances: Distances, weights: Distances, part: float) -> float:
    """The least distance up to which lies this part of the weight."""
    # Sorted by weight too, as theirs: where the part ends at a sum of weights, rounding would else tip it.
    order = np.lexsort((weights, distances))
    sums = np.cumsum(weights[order]) / weights.sum()
    return float(distances[order[min(int(np.searchsorted(sums, part)), len(order) - 1)]])
