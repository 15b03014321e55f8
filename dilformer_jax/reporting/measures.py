"""What each number of a registered pair means, in which unit."""

from collections.abc import Mapping
from typing import Any

# Metric, name, unit, definition. `<metric>_before` and `<metric>_affine` are the same measure of the moving image by
# the headers alone, and after the affine.
MEASURES = (
    ("dice", "Dice", "", "2|A∩B| / (|A| + |B|), labels by nearest neighbour; mean over the structures of both"),
    ("hd95", "HD95", "mm", "95th percentile of surface distances, both directions pooled; mean over the structures"),
    ("correlation", "correlation", "", "Pearson's, of all voxels of the fixed grid"),
    ("affine_overlap", "affine overlap", "", "of the two images' content after the affine, 1 at best"),
    (
        "outside_grid_percent",
        "outside the model grid",
        "%",
        "of the fixed image's content; displacement continued there",
    ),
    ("displacement_mean_mm", "displacement, mean", "mm", "length of the deformable part, over the whole grid"),
    ("displacement_p95_mm", "displacement, 95th percentile", "mm", "the same"),
    ("folding_percent", "folding", "%", "voxels of the whole grid with Jacobian determinant <= 0, central differences"),
    (
        "ndv_percent",
        "non-diffeomorphic volume",
        "%",
        "digital diffeomorphism: folds of all corners' differences, by volume",
    ),
    ("sdlogj", "SDlogJ", "", "standard deviation of log(J + 3) without two voxels at each face (Learn2Reg)"),
    ("inverse_mean_mm", "inverse error, mean", "mm", "distance between a point and where forth and back takes it"),
    ("inverse_p99_mm", "inverse error, 99th percentile", "mm", "the same"),
    ("inverse_max_mm", "inverse error, largest", "mm", "the same"),
    ("inverse_unconverged_percent", "inverse not converged", "%", "voxels where its iteration did not settle"),
)


def rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each measure that a pair has: its name with the unit, before, after the affine, after, definition;
    then one for each step's seconds. A column that no measure has is left out."""
    found = []
    for key, name, unit, definition in MEASURES:
        if metrics.get(key) is not None:
            values = {"before": f"{key}_before", "after affine": f"{key}_affine", "after": key}
            numbers = {when: metrics.get(metric) for when, metric in values.items()}
            found.append({"measure": f"{name} [{unit}]" if unit else name, **numbers, "definition": definition})
    for step, seconds in metrics.get("seconds", {}).items():
        named = {"measure": f"time, {step} [s]", "before": None, "after affine": None}
        found.append({**named, "after": seconds, "definition": "wall clock"})
    empty = {when for when in ("before", "after affine") if all(row[when] is None for row in found)}
    return [{name: value for name, value in row.items() if name not in empty} for row in found]
