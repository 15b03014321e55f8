"""A registered pair's scores, by the definitions that stand beside them in every result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int32

from dilformer_jax.data.subjects import Pair
from dilformer_jax.io.geometry import spacing
from dilformer_jax.io.volumes import Volume
from dilformer_jax.ops import correspondence, folding, overlap, surfaces
from dilformer_jax.registration.grids import content
from dilformer_jax.registration.pipeline import warp_labels

DEFINITION = {
    "displacement": "on the grid of the image files, in voxels, moved(x) = moving(x + u(x)); an affine map that a "
    "method begins with is part of it",
    "dice": "2|A∩B| / (|A| + |B|) of each label, the moving label map warped once by nearest neighbour on the grid of "
    "its file; a pair's value is the mean over the labels that both its subjects have",
    "dice_absent0": "the same, a label missing from either subject counted as 0, as where a fixed list is scored",
    "dice_before": "dice of the unwarped moving label map",
    "dice_trilinear": "dice of the moving label map warped as one-hot maps, trilinearly, of which the largest is taken",
    "dice_groups": "mean over the protocol's groups of structures, a group's value being the mean dice of its members, "
    "absent ones as 0",
    "dice_trilinear_groups": "the same of dice_trilinear",
    "target_overlap": "|A∩B| / |A|, A in the fixed image (Klein et al. 2009), mean over labels; nearest neighbour",
    "union_overlap": "|A∩B| / |A∪B| (Jaccard), mean over labels; nearest neighbour",
    "total_target_overlap": "target overlap with both volumes summed over the labels before they are divided (Klein)",
    "total_mean_overlap": "2|A∩B| / (|A| + |B|) summed likewise",
    "total_union_overlap": "|A∩B| / |A∪B| summed likewise",
    "hd95": "95th percentile, in mm, of the distances between surface voxels, both directions pooled (MedPy)",
    "hd95_before": "hd95 of the unwarped moving label map",
    "hd95_max": "the larger of the two directed 95 % quantiles, in mm, of surface elements weighted by their area "
    "(DeepMind's surface-distance, Learn2Reg)",
    "hd": "the largest distance, in mm, between surface voxels",
    "assd": "mean, in mm, of the distances between surface voxels, both directions pooled (MedPy 0.5)",
    "nsd": "share of both surfaces' area that lies within the tolerance of the other one (DeepMind's surface Dice)",
    "folding_percent": "voxels of the whole volume with Jacobian determinant <= 0, np.gradient's differences, central "
    "and one-sided at the faces, at label resolution (VoxelMorph, TransMorph, RDP; RDP prints the fraction)",
    "folding_mask_percent": "the same among the voxels where the fixed image is brighter than its background",
    "ndv_percent": "non-diffeomorphic volume: of the tetrahedra around each voxel, the mean volume that is turned "
    "over, in percent of the volume (Liu et al., IJCV 2024)",
    "sdlogj": "standard deviation of log(J + 3) without two voxels at each face (Learn2Reg, with its offset of 3)",
    "tre_mm": "mean distance, in mm, of the moving landmarks from where the displacement, interpolated linearly, takes "
    "the fixed ones",
    "tre_before_mm": "the same of no displacement",
    "inverse_consistency_mm": "mean length of u(x + v(x)) + v(x), where x + v(x) is in the volume, v being found with "
    "the images exchanged",
    "seconds": "from two images in memory to the displacement at full resolution in memory, preprocessing included; "
    "compilation, reading, warping and scores not; other pairs are scored at the same time (see timing)",
    "absent": "a label missing from either input: no value, in no mean but dice_absent0 and dice_groups",
    "vanished": "a label of both inputs that warping removed: Dice 0, no surface distance, nsd 0",
}


@dataclass(frozen=True)
class Scoring:
    """What is scored: label ids, groups of them by name, and the tolerance of nsd in mm."""

    labels: tuple[int, ...]
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tolerance: float = 1.0

    @property
    def definition(self) -> dict[str, str]:
        """`DEFINITION` of what is scored so."""
        grouped = {"dice_groups", "dice_trilinear_groups"}
        found = {name: text for name, text in DEFINITION.items() if self.groups or name not in grouped}
        return found | {"nsd": f"{DEFINITION['nsd']}; tolerance {self.tolerance:g} mm"}


@dataclass(frozen=True, eq=False)
class Case:
    """A pair as a method registered it: images, labels where there are any, displacement and the seconds it took; the
    displacement of the pair exchanged where it was asked for, and its landmarks, in voxels of the fixed and of the
    moving image, where it has any."""

    pair: Pair
    fixed: Volume
    moving: Volume
    fixed_labels: Int32[np.ndarray, "D H W"] | None
    moving_labels: Int32[np.ndarray, "D H W"] | None
    displacement: Float32[np.ndarray, "D H W 3"]
    seconds: float
    backward: Float32[np.ndarray, "D H W 3"] | None = None
    points: tuple[Float64[np.ndarray, "n 3"], Float64[np.ndarray, "n 3"]] | None = None


def row(case: Case, scoring: Scoring) -> dict[str, Any]:
    """The results of one pair, as `reporting.tables.write_results` takes them; those of labels only where both subjects
    have a label map."""
    u, sides = case.displacement, spacing(case.fixed.affine)
    determinant = folding.jacobian_determinant(u)
    found: dict[str, Any] = {
        "name": case.pair.name,
        "fixed": case.pair.fixed.name,
        "moving": case.pair.moving.name,
        "folding_percent": folding.folding_percent(u, determinant=determinant),
        "folding_mask_percent": folding.folding_percent(u, determinant=determinant, mask=content(case.fixed.array)),
        "ndv_percent": folding.ndv_percent(u),
        "sdlogj": folding.sdlogj(u, determinant=determinant) if min(u.shape[:3]) > 4 else float("nan"),
        "seconds": case.seconds,
        "absent": [],
        "vanished": [],
    }
    if case.backward is not None:
        consistency = correspondence.inverse_consistency(u, case.backward, sides)
        found["inverse_consistency_mm"] = consistency["mean_mm"]
    if case.points is not None:
        found["tre_mm"] = float(correspondence.tre(*case.points, u, sides).mean())
        found["tre_before_mm"] = float(correspondence.tre(*case.points, np.zeros_like(u), sides).mean())
    if case.fixed_labels is not None and case.moving_labels is not None:
        found |= _labelled(case.fixed_labels, case.moving_labels, u, sides, scoring)
    return found


def _labelled(
    fixed: np.ndarray, moving: np.ndarray, u: np.ndarray, sides: tuple[float, float, float], scoring: Scoring
) -> dict[str, Any]:
    """Scores of the label maps, each metric's mean and, by label, `<metric>_per_label`."""
    labels, tolerance = scoring.labels, scoring.tolerance
    still = not u.any()
    moved = moving if still else warp_labels(moving, u)
    trilinear = moving if still else warp_labels(moving, u, "one-hot")
    distances = surfaces.surface_scores(fixed, moved, labels, sides, moving, tolerance=tolerance)
    scores = {
        "dice": overlap.dice(fixed, moved, labels, moving),
        "dice_before": overlap.dice(fixed, moving, labels, moving),
        "dice_trilinear": overlap.dice(fixed, trilinear, labels, moving),
        "target_overlap": overlap.target_overlap(fixed, moved, labels, moving),
        "union_overlap": overlap.union_overlap(fixed, moved, labels, moving),
        **distances,
        "hd95_before": distances["hd95"]
        if still
        else surfaces.surface_scores(fixed, moving, labels, sides, moving, only=("hd95",))["hd95"],
    }
    found: dict[str, Any] = {}
    for name, values in scores.items():
        found[name] = overlap.mean_present(values)
        found[f"{name}_per_label"] = dict(zip(labels, values.tolist(), strict=True))
    found["dice_absent0"] = overlap.mean_absent_zero(scores["dice"])
    if scoring.groups:
        for name in ("dice", "dice_trilinear"):
            by_label = dict(zip(labels, np.nan_to_num(scores[name]), strict=True))
            means = [np.mean([by_label[label] for label in members]) for members in scoring.groups.values()]
            found[f"{name}_groups"] = float(np.mean(means))
    found |= {f"total_{name}_overlap": value for name, value in overlap.totals(fixed, moved, labels).items()}
    absent, vanished = np.isnan(scores["dice"]), np.isnan(scores["hd95"]) & ~np.isnan(scores["dice"])
    found["absent"] = [label for label, is_so in zip(labels, absent, strict=True) if is_so]
    found["vanished"] = [label for label, is_so in zip(labels, vanished, strict=True) if is_so]
    return found


def dice_of(case: Case, labels: Sequence[int]) -> dict[str, float]:
    """A pair's mean Dice of the identity and of the displacement, all that training asks for; empty where the two
    subjects have no structure in common."""
    if case.fixed_labels is None or case.moving_labels is None:
        return {}
    moved = warp_labels(case.moving_labels, case.displacement)
    before = overlap.dice(case.fixed_labels, case.moving_labels, labels)
    after = overlap.dice(case.fixed_labels, moved, labels, case.moving_labels)
    if np.isnan(after).all():
        return {}
    return {"dice_identity": float(np.nanmean(before)), "dice": float(np.nanmean(after))}
