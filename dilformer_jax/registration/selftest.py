"""One small registration whose result is known: of two phantoms, by refinement, compared with what is stored beside.

The descent is deterministic, but compilers and processors round in their own ways, and each step carries that on.
What is measured of the result is measured by SciPy, so that a difference is the registration's.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax.data.phantoms import LABELS, phantom
from dilformer_jax.io.volumes import BadInput, replacing
from dilformer_jax.ops import folding, overlap
from dilformer_jax.registration import refine

GOLDEN = Path(__file__).with_suffix(".json")
SEEDS, SHAPE, STEPS, POINTS = (1, 2), (48, 56, 48), 10, 50
# By how much each figure may differ; displacements by their length in voxels. The largest that was measured on a CPU:
# Dice 0.00002, displacements 0.00004 on average and 0.0003 at most, between the compiler's levels of optimisation, AVX2
# and AVX-512, 1 and 4 simulated devices, one core and two; with noise of a millionth of the intensities 0.0004 on
# average and 0.013 at most.
TOLERANCES = {
    "dice_before": 1e-3,
    "correlation_before": 1e-3,
    "dice": 2e-3,
    "correlation": 5e-4,
    "folding_percent": 0.02,
    "displacement_mean": 0.01,
    "displacement_max": 0.15,
}


def measured() -> dict[str, Any]:
    """The two phantoms before and after: Dice (mean over the structures), Pearson's correlation, folding in percent of
    the voxels, and `displacement`, in voxels, at `points` (fixed voxels of the brain)."""
    (fixed, labels), (moving, moving_labels) = (phantom(seed, SHAPE) for seed in SEEDS)
    u = refine.refine(fixed, moving, refine.Refinement(STEPS, "lncc"))
    at = np.indices(SHAPE) + np.moveaxis(u, -1, 0)
    moved = ndimage.map_coordinates(moving, at, order=1, mode="nearest")
    moved_labels = ndimage.map_coordinates(moving_labels, at, order=0, mode="constant")
    dice = lambda of: float(np.nanmean(overlap.dice(labels, of, list(LABELS), moving_labels)))
    alike = lambda image: float(np.corrcoef(fixed.ravel(), image.ravel())[0, 1])
    brain = np.argwhere(labels > 0)
    points = brain[np.random.default_rng(0).choice(len(brain), POINTS, replace=False)]
    return {
        "dice_before": dice(moving_labels),
        "dice": dice(moved_labels),
        "correlation_before": alike(moving),
        "correlation": alike(moved),
        "folding_percent": folding.folding_percent(u),
        "points": points.tolist(),
        "displacement": u[tuple(points.T)].tolist(),
    }


def stored() -> dict[str, Any]:
    """What `record` wrote. Raises BadInput where the package has come without it."""
    try:
        return json.loads(GOLDEN.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{GOLDEN} cannot be read ({error}); install dilformer-jax anew.") from error


def drift(now: dict[str, Any], then: dict[str, Any]) -> dict[str, float]:
    """How far each of `TOLERANCES` is from what it was; not a number where either is not one, or not the same points
    were looked at."""
    found = {name: abs(now[name] - then[name]) for name in TOLERANCES if name in now}
    same = now["points"] == then["points"]
    apart = (
        np.linalg.norm(np.subtract(now["displacement"], then["displacement"]), axis=-1)
        if same
        else np.array([math.nan])
    )
    return found | {"displacement_mean": float(apart.mean()), "displacement_max": float(apart.max())}


def record(path: Path = GOLDEN) -> None:
    """Writes down what is measured now: for when the algorithm was changed on purpose. From the clone:

    python -c 'from dilformer_jax.registration import selftest; selftest.record()'
    """
    rounded = json.loads(json.dumps(measured()), parse_float=lambda text: round(float(text), 5))
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in rounded.items()]
    with replacing(path) as partial:
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
