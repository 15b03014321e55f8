"""Several methods on the same pairs: their numbers, what separates them, and the tables of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from dilformer_jax.reporting import results, statistics
from dilformer_jax.reporting.results import Common, Run
from dilformer_jax.reporting.statistics import Design

# Metric, name, unit, direction (1: more is better), how it is written. One that is not here has no better end.
METRICS = {
    "dice": ("Dice", "", 1, ".3f"),
    "dice_trilinear": ("Dice (trilinear)", "", 1, ".3f"),
    "dice_absent0": ("Dice (absent = 0)", "", 1, ".3f"),
    "dice_groups": ("Dice (groups)", "", 1, ".3f"),
    "dice_trilinear_groups": ("Dice (groups, trilinear)", "", 1, ".3f"),
    "target_overlap": ("Target overlap", "", 1, ".3f"),
    "union_overlap": ("Union overlap", "", 1, ".3f"),
    "total_target_overlap": ("Total target overlap", "", 1, ".3f"),
    "total_mean_overlap": ("Total mean overlap", "", 1, ".3f"),
    "total_union_overlap": ("Total union overlap", "", 1, ".3f"),
    "hd95": ("HD95", "mm", -1, ".2f"),
    "hd95_max": ("HD95 (max)", "mm", -1, ".2f"),
    "hd": ("HD", "mm", -1, ".2f"),
    "assd": ("ASSD", "mm", -1, ".2f"),
    "nsd": ("NSD", "", 1, ".3f"),
    "tre_mm": ("TRE", "mm", -1, ".2f"),
    "folding_percent": ("Folding", "%", -1, ".2g"),
    "folding_mask_percent": ("Folding in the mask", "%", -1, ".2g"),
    "ndv_percent": ("NDV", "%", -1, ".2g"),
    "sdlogj": ("SDlogJ", "", -1, ".3f"),
    "inverse_consistency_mm": ("Inverse consistency", "mm", -1, ".2f"),
}
SHOWN = ("dice", "hd95", "folding_percent", "ndv_percent", "sdlogj")
# Of the displacement: 0 where there is none, which is no merit.
REGULARITY = ("folding_percent", "folding_mask_percent", "ndv_percent", "sdlogj")
ALIGNED = "affine (as distributed)"


@dataclass(frozen=True, eq=False)
class Scored:
    """A method as a row: each pair's measures, each pair's Dice by structure, and what it costs.

    `baseline` is of the identity and the affine, whose displacement is no deformation.
    """

    name: str
    baseline: bool
    values: Mapping[str, Float[np.ndarray, " pairs"]]
    dice: Float[np.ndarray, "pairs labels"]
    seconds: float = math.nan
    device: str = ""
    parameters: int | None = None


def scored(runs: Sequence[Run], names: Sequence[str], metrics: Sequence[str], within: Common) -> list[Scored]:
    """The rows: doing nothing, the affine, and then the other runs in their order.

    Where no run is the identity, its row is made of what the runs measured before registration. Where none is the
    affine, its row has no values; data that were aligned when they were distributed have one row for both.
    """
    rows = [_scored(run, name, metrics, within) for run, name in zip(runs, names, strict=True)]
    kinds = [_kind(run) for run in runs]
    aligned = any(run.aligned for run in runs)
    chosen = [row for kind in ("identity", "affine") for row, its in zip(rows, kinds, strict=True) if its == kind]
    if "identity" not in kinds:
        chosen.insert(0, _identity(runs, metrics, within))
    if aligned:
        chosen[0] = replace(chosen[0], name=ALIGNED if chosen[0].name == "identity" else chosen[0].name)
    elif "affine" not in kinds:
        chosen.append(_empty("affine", metrics, within))
    return chosen + [row for row, kind in zip(rows, kinds, strict=True) if kind == "method"]


def reference(rows: Sequence[Scored], metrics: Sequence[str]) -> Scored:
    """The row of the best mean Dice, or, where that is not compared, of the first metric that has a better end.

    What does not deform does not win by its regularity.
    """
    for metric in sorted((metric for metric in metrics if metric in METRICS), key=lambda metric: metric != "dice"):
        running = [row for row in rows if not (row.baseline and metric in REGULARITY)]
        means = [METRICS[metric][2] * _mean(row.values[metric]) for row in running]
        if np.isfinite(means).any():
            return running[int(np.nanargmax(means))]
    return rows[-1]


def compared(
    rows: Sequence[Scored], metrics: Sequence[str], against: Scored, design: Design, resamples: int
) -> list[dict[str, Any]]:
    """A record for each metric and method: mean, population sd and n over the pairs that have a value, the interval of
    the mean, and, of the pairs where both have one, the difference to `against` with interval, p and effect sizes.

    All of them see the same resamples. p is corrected over the methods, for each metric by itself.
    """
    nothing = np.full(next(iter(against.values.values())).shape, np.nan)
    columns = [row.values[metric] for metric in metrics for row in rows]
    differences = [
        nothing if row is against else row.values[metric] - against.values[metric] for metric in metrics for row in rows
    ]
    drawn = statistics.resampled_means(np.stack([*columns, *differences], axis=1), design, resamples)
    of_means, of_differences = np.split(statistics.interval(drawn, design), 2, axis=1)
    p = np.array([statistics.wilcoxon(difference) for difference in differences]).reshape(len(metrics), len(rows))
    adjusted = np.concatenate([statistics.holm(tests) for tests in p])
    records = []
    for k, (metric, row) in enumerate((metric, row) for metric in metrics for row in rows):
        records.append(
            {
                "metric": metric,
                "method": row.name,
                "mean": _mean(columns[k]),
                "sd": float(np.std(columns[k], where=np.isfinite(columns[k]))) if _count(columns[k]) else math.nan,
                "low": float(of_means[0, k]),
                "high": float(of_means[1, k]),
                "n": _count(columns[k]),
                "reference": against.name,
                "difference": _mean(differences[k]),
                "difference_low": float(of_differences[0, k]),
                "difference_high": float(of_differences[1, k]),
                "n_paired": _count(differences[k]),
                "p": float(p.flat[k]),
                "p_holm": float(adjusted[k]),
                "rank_biserial": statistics.rank_biserial(differences[k]),
                "cohen_dz": statistics.cohen_dz(differences[k]),
            }
        )
    return records


def ranks(records: Sequence[Mapping[str, Any]], rows: Sequence[Scored]) -> dict[tuple[str, str], int]:
    """{(metric, method): 1 or 2} of the best and the second mean, where the metric has a better end.

    What does not deform has no part in measures of regularity. Equal means share a rank.
    """
    plain = {row.name for row in rows if row.baseline}
    found: dict[tuple[str, str], int] = {}
    for metric in dict.fromkeys(record["metric"] for record in records):
        if metric not in METRICS:
            continue
        sign = METRICS[metric][2]
        means = {
            record["method"]: sign * record["mean"]
            for record in records
            if record["metric"] == metric
            and np.isfinite(record["mean"])
            and not (metric in REGULARITY and record["method"] in plain)
        }
        best = sorted(set(means.values()), reverse=True)[:2]
        found |= {(metric, name): best.index(mean) + 1 for name, mean in means.items() if mean in best}
    return found


def label_means(row: Scored, within: Common) -> dict[int, float]:
    """{label: mean Dice over the pairs that have a value}; NaN where none has."""
    return {label: _mean(values) for label, values in zip(within.labels, row.dice.T, strict=True)}


def missing(rows: Sequence[Scored], within: Common) -> list[str]:
    """Sentences on rows that stand there without values, and on how they would get them."""
    pairs = (
        f"--pairs {within.protocol}" if within.protocol.endswith(".csv") else f"--protocol {within.protocol} --data DIR"
    )
    return [
        f"{row.name} was not evaluated: `dilformer evaluate --method affine {pairs} --output FOLDER`, and this command "
        "with FOLDER as another run, fill its row."
        for row in rows
        if not any(np.isfinite(values).any() for values in row.values.values())
    ]


def _kind(run: Run) -> str:
    """identity, affine or method; what was refined after either is a method."""
    if "refinement" in run.method:
        return "method"
    return next((kind for kind in ("identity", "affine") if run.method.startswith(kind)), "method")


def _scored(run: Run, name: str, metrics: Sequence[str], within: Common) -> Scored:
    measured = results.values(run, "seconds", within)
    parameters = run.timing.get("parameters")
    return Scored(
        name,
        _kind(run) != "method",
        {metric: results.values(run, metric, within) for metric in metrics},
        results.per_label(run, "dice", within),
        float(run.timing.get("median_seconds") or (np.nanmedian(measured) if _count(measured) else math.nan)),
        str(run.timing.get("device") or ""),
        None if parameters is None else int(parameters),
    )


def _identity(runs: Sequence[Run], metrics: Sequence[str], within: Common) -> Scored:
    """What any of the runs measured before registration, and a displacement of 0, which is regular."""
    empty = _empty("identity", metrics, within)
    found = {
        metric: np.zeros(len(within.pairs)) if metric in REGULARITY else values
        for metric, values in empty.values.items()
    }
    dice = empty.dice
    for run in runs:
        for metric in set(metrics).difference(REGULARITY):
            # Nothing is interpolated: trilinear and nearest are the same.
            before = "dice_before" if metric == "dice_trilinear" else f"{metric}_before"
            found[metric] = _first(found[metric], results.values(run, before, within))
        dice = _first(dice, results.per_label(run, "dice_before", within))
    return replace(empty, values=found, dice=dice)


def _empty(name: str, metrics: Sequence[str], within: Common) -> Scored:
    nothing = np.full((len(within.pairs), len(within.labels)), np.nan)
    return Scored(name, True, {metric: np.full(len(within.pairs), np.nan) for metric in metrics}, nothing)


def _first(values: np.ndarray, more: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, more)


def _count(values: np.ndarray) -> int:
    return int(np.isfinite(values).sum())


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if _count(values) else math.nan
