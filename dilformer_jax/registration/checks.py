"""Whether a registration is to be trusted: its metrics against stated thresholds.

The thresholds are conventions for brains, not laws: a check that warns asks for a look at the pictures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VERDICTS = ("pass", "warn", "fail")  # from the best to the worst


@dataclass(frozen=True)
class Check:
    """A value against two thresholds: beyond `warn` it asks for a look, beyond `fail` it is not to be trusted.

    Beyond is above them, or below them where `fail` lies below `warn`; an infinite `fail` is never reached.
    """

    name: str
    value: float
    unit: str
    warn: float
    fail: float
    meaning: str

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`; a value that is not a number fails."""
        beyond = (lambda limit: self.value > limit) if self.fail > self.warn else (lambda limit: self.value < limit)
        if math.isnan(self.value) or beyond(self.fail):
            return "fail"
        return "warn" if beyond(self.warn) else "pass"

    @property
    def thresholds(self) -> str:
        """Both thresholds in words, such as "warn > 0.1, fail > 1"."""
        sign = ">" if self.fail > self.warn else "<"
        limits = (("warn", self.warn), ("fail", self.fail))
        return ", ".join(f"{name} {sign} {limit:g}" for name, limit in limits if math.isfinite(limit))


# The metric that is checked, and the check's name, unit, thresholds and meaning.
LIMITS: tuple[tuple[str, str, str, float, float, str], ...] = (
    (
        "affine_overlap",
        "affine overlap",
        "",
        0.5,
        0.2,
        "overlap of the two images' content after the affine, 1 at best",
    ),
    (
        "correlation_affine",
        "similarity after the affine",
        "",
        0.3,
        -math.inf,
        "Pearson's correlation of fixed and aligned; low between contrasts, else a poor start",
    ),
    (
        "outside_grid_percent",
        "fixed content outside the model grid",
        "%",
        1.0,
        10.0,
        "there the displacement is continued",
    ),
    ("folding_percent", "folding", "%", 0.1, 1.0, "voxels of the whole grid whose Jacobian determinant is 0 or less"),
    ("inverse_mean_mm", "inverse error, mean", "mm", 0.5, 2.0, "distance from where a point goes and comes back to"),
    (
        "inverse_p99_mm",
        "inverse error, 99th percentile",
        "mm",
        2.0,
        5.0,
        "the same, of the worst hundredth of the voxels",
    ),
    (
        "inverse_unconverged_percent",
        "inverse not converged",
        "%",
        0.1,
        1.0,
        "voxels where the iteration for the inverse did not settle",
    ),
    (
        "displacement",
        "displacement against size",
        "%",
        10.0,
        25.0,
        "its 95th percentile, of the longest side of the content",
    ),
    ("correlation", "gain in correlation", "", 0.0, -0.05, "of moved over moving or aligned, the better one"),
    ("dice", "gain in Dice", "", 0.0, -0.02, "of moved over moving or aligned, the better one; mean over structures"),
)


def checks(metrics: Mapping[str, Any]) -> tuple[Check, ...]:
    """The checks of a pair's metrics, those that it has; a metric that is missing gives none.

    Beside the metrics of `Registration`: `extent_mm`, the longest side of the fixed image's content, for the size of
    the displacement. Where `dice_before` or `correlation_before` is not a number (no structure in common, a constant
    image), there is no gain to check.
    """
    values = {**metrics, "displacement": None, "correlation": None, "dice": None}
    if metrics.get("extent_mm") and "displacement_p95_mm" in metrics:
        values["displacement"] = 100 * metrics["displacement_p95_mm"] / metrics["extent_mm"]
    for name in ("correlation", "dice"):
        earlier = [metrics.get(f"{name}_{when}") for when in ("before", "affine")]
        starts = [start for start in earlier if start is not None and math.isfinite(start)]
        if starts and name in metrics:
            values[name] = metrics[name] - max(starts)
    return tuple(
        Check(name, float(values[key]), unit, warn, fail, meaning)
        for key, name, unit, warn, fail, meaning in LIMITS
        if values.get(key) is not None
    )


def verdict(checks: Sequence[Check]) -> str:
    """The worst verdict of the checks; "warn" where there are none, for nothing was looked at."""
    return max((check.verdict for check in checks), key=VERDICTS.index, default="warn")
