"""Scores of a method over pairs of subjects, on the grids and at the resolution of their files."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Float32, Int32

from dilformer_jax.data.preprocessing import load
from dilformer_jax.data.subjects import Pair, Subject
from dilformer_jax.data.volumes import opened
from dilformer_jax.io.geometry import spacing
from dilformer_jax.io.volumes import Volume, check_same_grid
from dilformer_jax.ops import metrics
from dilformer_jax.registration import refine
from dilformer_jax.registration.pipeline import deformation, identity, warp_labels
from dilformer_jax.registration.predictor import Predictor
from dilformer_jax.registration.refine import Refinement

WORKERS = 2
RAW = {"normalise": "none"}  # the files' own voxels: a predictor does its preprocessing itself
DEFINITION = {
    "displacement": "on the grid of the image files, in voxels, moved(x) = moving(x + u(x)); no affine beforehand",
    "dice": "2|A∩B| / (|A| + |B|) of each label, the moving label map warped once by nearest neighbour on the grid of "
    "its file; a pair's value is the mean over its labels",
    "dice_before": "the same of the unwarped moving label map",
    "hd95": "95th percentile, in mm, of the distances between surface voxels, both directions pooled (MedPy)",
    "hd95_max": "the larger of the two directed 95th percentiles, in mm; every surface voxel counts once",
    "folding_percent": "voxels of the whole volume with Jacobian determinant <= 0, np.gradient's differences, at label "
    "resolution",
    "sdlogj": "standard deviation of log(J + 3) without two voxels at each face (Learn2Reg, with its offset of 3)",
    "seconds": "from two images in memory to the displacement at full resolution, preprocessing included; compilation, "
    "warping and metrics not",
    "absent": "a label missing from either input: no value, in no mean",
    "vanished": "a label of both inputs that warping removed: Dice 0, no surface distance",
}


@dataclass(frozen=True, eq=False)
class Method:
    """What is scored: `displacement(fixed, moving, names, spacing)`, which is timed; `compile(shape, name)` is not."""

    name: str
    displacement: Callable[..., np.ndarray]
    compile: Callable[..., None]
    check_shape: Callable[..., None]
    sha256: str | None


@dataclass(frozen=True, eq=False)
class Case:
    """A pair as a method registered it: images, labels where there are any, displacement and the seconds it took."""

    pair: Pair
    fixed: Volume
    moving: Volume
    fixed_labels: Int32[np.ndarray, "D H W"] | None
    moving_labels: Int32[np.ndarray, "D H W"] | None
    displacement: Float32[np.ndarray, "D H W 3"]
    seconds: float


def method_of(predictor: Predictor | None, refinement: Refinement | None = None) -> Method:
    """The method that is a network, or that of doing nothing; given a refinement, refined, or refinement alone."""
    if predictor is not None:
        method = Method(
            predictor.name,
            lambda fixed, moving, names, spacing: predictor.displacement(fixed, moving, names),
            predictor.compile,
            predictor.check_shape,
            predictor.sha256,
        )
    else:
        nothing = lambda fixed, moving, names, spacing: identity(fixed, moving)
        method = Method("identity", nothing, _nothing, _nothing, None)
    if refinement is None:
        return method

    def displacement(fixed, moving, names, spacing):
        initial = None if predictor is None else predictor.displacement(fixed, moving, names)
        return refine.refine(fixed, moving, refinement, initial, names, spacing).displacement

    def compile_both(shape, name):
        method.compile(shape, name)
        refine.check_shape(shape, name)
        refine.compiled(shape, refinement, predictor is not None)

    def check_both(shape, name):
        method.check_shape(shape, name)
        refine.check_shape(shape, name)

    kind = "a velocity" if refinement.diffeomorphic else "a displacement"
    name = f"{method.name}, {refinement.steps} steps of refinement of {kind}"
    return Method(name, displacement, compile_both, check_both, method.sha256)


def check(pairs: Sequence[Pair], method: Method) -> None:
    """Raises BadInput, from the headers alone, where a pair does not share a grid or is too small for the method."""
    grids = {}
    for subject in dict.fromkeys(subject for pair in pairs for subject in (pair.fixed, pair.moving)):
        image = opened(subject)
        if image is not None:  # a bare array says nothing but in its whole
            # An array that takes no memory: only its shape is looked at.
            grids[subject] = Volume(
                np.broadcast_to(np.float32(0), image.shape[:3]), _affine(subject), subject.image, image.header
            )
    for pair in pairs:
        if pair.fixed in grids and pair.moving in grids:
            check_same_grid(grids[pair.fixed], grids[pair.moving])
            method.check_shape(grids[pair.fixed].array.shape, pair.fixed.image)


def scores(pairs: Sequence[Pair], labels: Sequence[int], method: Method) -> Iterator[dict[str, Any]]:
    """A row of results for each pair, as `reporting.tables.write_results` takes them, measured by `DEFINITION`."""
    with ThreadPoolExecutor(WORKERS) as pool:
        for first in range(0, len(pairs), WORKERS):
            # The clock runs with nothing beside it: displacements first, their measurement in threads after them.
            cases = [registered(pair, method) for pair in pairs[first : first + WORKERS]]
            yield from pool.map(lambda case: row(case, labels), cases)


def registered(pair: Pair, method: Method) -> Case:
    """Reads and registers a pair. Raises BadInput as reading and the method do, and where the grids differ."""
    (fixed, fixed_labels), (moving, moving_labels) = _read(pair.fixed), _read(pair.moving)
    check_same_grid(fixed, moving)
    method.compile(fixed.array.shape, fixed.path)
    start = time.perf_counter()
    u = method.displacement(fixed.array, moving.array, (fixed.path, moving.path), spacing(fixed.affine))
    return Case(pair, fixed, moving, fixed_labels, moving_labels, u, time.perf_counter() - start)


def row(case: Case, labels: Sequence[int]) -> dict[str, Any]:
    """The results of one pair; those of labels only where both subjects have a label map."""
    found: dict[str, Any] = {
        "name": case.pair.name,
        "fixed": case.pair.fixed.name,
        "moving": case.pair.moving.name,
        **deformation(case.displacement),
        "seconds": case.seconds,
        "absent": [],
        "vanished": [],
    }
    fixed, moving = case.fixed_labels, case.moving_labels
    if fixed is None or moving is None:
        return found
    moved = warp_labels(moving, case.displacement)
    dice = metrics.dice(fixed, moved, labels, moving)
    hd95, hd95_max = metrics.hausdorff(fixed, moved, labels, spacing(case.fixed.affine), moving)
    before = metrics.dice(fixed, moving, labels, moving)
    for name, values in (("dice_before", before), ("dice", dice), ("hd95", hd95), ("hd95_max", hd95_max)):
        found[name] = float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
        found[f"{name}_per_label"] = dict(zip(labels, values.tolist(), strict=True))
    absent, vanished = np.isnan(dice), np.isnan(hd95) & ~np.isnan(dice)
    found["absent"] = [label for label, is_so in zip(labels, absent, strict=True) if is_so]
    found["vanished"] = [label for label, is_so in zip(labels, vanished, strict=True) if is_so]
    return found


def overlap(case: Case, labels: Sequence[int]) -> dict[str, float]:
    """A pair's mean Dice of the identity and of the displacement, all that training asks for; empty where the two
    subjects have no structure in common."""
    if case.fixed_labels is None or case.moving_labels is None:
        return {}
    moved = warp_labels(case.moving_labels, case.displacement)
    before = metrics.dice(case.fixed_labels, case.moving_labels, labels)
    after = metrics.dice(case.fixed_labels, moved, labels, case.moving_labels)
    if np.isnan(after).all():
        return {}
    return {"dice_identity": float(np.nanmean(before)), "dice": float(np.nanmean(after))}


def _read(subject: Subject) -> tuple[Volume, np.ndarray | None]:
    image, labels = load(subject, RAW)  # kept in memory, so that each file is decoded once
    file = opened(subject)
    header = nib.nifti1.Nifti1Header() if file is None else file.header
    return Volume(image[..., 0], _affine(subject), subject.image, header), labels


def _affine(subject: Subject) -> np.ndarray:
    # Label maps of which images are made lie each in a frame of its own: voxels are compared, as those of bare arrays.
    file = opened(subject)
    return np.eye(4) if file is None or subject.seed is not None else file.affine


def _nothing(shape: tuple[int, ...], name: object) -> None:
    """Doing nothing needs no compilation and takes any shape."""
