"""Images of any contrast from label maps, and the random numbers that say which.

The idea, that a network which sees a new contrast in every image comes to depend on none, is that of SynthMorph
(Hoffmann et al., TMI 2022) and SynthSeg (Billot et al., Med. Image Anal. 2023). What is drawn, and how the image is
made of it, are ours. `drawn` makes the few numbers of a pair on the host; `rendered` makes an image of them, and is
written once over NumPy or `jax.numpy`, which the caller hands in: what is looked at is what a network is trained on.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Integer, UInt8

from dilformer_jax.io.volumes import BadInput

# FreeSurfer's ids of each kind of structure, left and right; its tissue; its mean in a T1-weighted image, where that of
# white matter is 1. The means are those of the subject that VoxelMorph distributes for tests (Apache-2.0), by its own
# segmentation. SynthSeg's prior does not name its classes; taken in the order of its labels it has similar ratios.
KINDS: tuple[tuple[tuple[int, ...], str, float], ...] = (
    ((2, 41), "white", 1.0),
    ((3, 42), "grey", 0.64),  # cortex
    ((4, 43), "fluid", 0.23),  # lateral ventricles
    ((5, 44), "fluid", 0.35),
    ((7, 46), "white", 0.84),  # cerebellum
    ((8, 47), "grey", 0.59),
    ((10, 49), "deep", 0.85),  # thalamus
    ((11, 50), "deep", 0.74),  # caudate
    ((12, 51), "deep", 0.83),  # putamen
    ((13, 52), "deep", 1.0),  # pallidum
    ((14,), "fluid", 0.34),
    ((15,), "fluid", 0.27),
    ((16,), "white", 0.81),  # brainstem
    ((17, 53), "grey", 0.66),  # hippocampus
    ((18, 54), "grey", 0.65),  # amygdala
    ((26, 58), "deep", 0.73),
    ((28, 60), "deep", 0.91),
    ((24,), "fluid", 0.25),  # around the brain: last, for it is no structure to overlap
)
TISSUES = ("white", "grey", "deep", "fluid")
IDS = tuple(sorted(i for ids, *_ in KINDS[:-1] for i in ids)) + KINDS[-1][0]  # class k is IDS[k - 1], 0 background
STRUCTURES = IDS[:-1]
FLUID = len(IDS)  # the class of the fluid around the brain
KIND = np.array([next(k for k, kind in enumerate(KINDS) if i in kind[0]) for i in IDS])  # of class k at k - 1
TISSUE = np.array([TISSUES.index(tissue) for _, tissue, _ in KINDS])
T1 = np.array([mean for *_, mean in KINDS])
BELOW = (7, 8, 15, 16, 46, 47)  # cerebellum and brainstem, which many brain extractions cut off
KNOTS = 7
VERSION = 1  # of the images that `t1_like` makes: raise it whenever a map and a seed come to give another

# Lengths in mm; the largest of what is drawn uniformly from 0, and probabilities.
OPTIONS: dict[str, Any] = {
    "t1": 0.5,  # that a contrast is T1-like, else every kind of structure has a mean at random
    "remapped": 0.35,  # that a T1-like image is seen through a random curve
    "shared_contrast": 0.4,  # that both images have one contrast
    "without_below": 0.2,  # that a pair has neither cerebellum nor brainstem
    "surroundings": 0.15,  # that a brain lies in something like a skull and a scalp
    "soft": 0.3,  # that the brain is cut out before the image is blurred, not after
    "deformation": 9.0,  # standard deviation of the control points of a cubic B-spline; of what it moves, a third
    "controls": 10,  # control points along each axis
    "texture": 0.08,  # standard deviation within a structure, of white matter's mean in T1
    "noise": 0.05,
    "blur": 1.2,  # standard deviation of the point spread
    "thickness": 5.0,  # of slices along one axis, in the `thick` share of images
    "thick": 0.25,
    "coarseness": 2.5,  # of what is sampled alike along all axes, in the `coarse` share of images
    "coarse": 0.0,
    "bias": 1.2,  # standard deviation of the control points of its logarithm; of the logarithm, a third
    "gamma": 0.2,  # standard deviation of its logarithm
}


def classes(labels: Integer[np.ndarray, "x y z"], name: Any) -> UInt8[np.ndarray, "x y z"]:
    """FreeSurfer's ids as classes: k for IDS[k - 1]. Raises BadInput, about `name`, for an id that is not in IDS."""
    found = np.unique(labels)
    if others := [int(i) for i in found if i not in (0, *IDS)]:
        raise BadInput(
            f"{name} has the label {others[0]}, of which no image is made; keep {', '.join(map(str, IDS))} and set "
            "others to one of these or to 0."
        )
    ordered = np.array([0, *sorted(IDS)])
    number = np.array([0, *(IDS.index(i) + 1 for i in sorted(IDS))], np.uint8)
    return number[np.searchsorted(ordered, labels)]


def options_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options with nothing left out. Raises BadInput for what does not exist or cannot be."""
    for name, value in given.items():
        if name not in OPTIONS:
            raise BadInput(f"synthesis has no '{name}'; it has {', '.join(OPTIONS)}.")
        if not value >= (4 if name == "controls" else 0):
            raise BadInput(f"synthesis.{name} is {value}; make it {4 if name == 'controls' else 0} or more.")
    return OPTIONS | dict(given)


def drawn(
    generator: np.random.Generator, options: Mapping[str, Any], voxel: tuple[float, float, float]
) -> dict[str, np.ndarray]:
    """The numbers of a pair, of the fixed and of the moving image in this order, for voxels of so many mm.

    key (2,) uint32 and, float32 unless said: elastic (2, g, g, g, 3) in voxels, bias (2, 5, 5, 5), means and
    deviations (2, 19 with the background), curve (2, 7), sigma and spacing (2, 3) in voxels, strip (2, 4): its blur in
    voxels and three thresholds; surroundings (2, 2), soft (2,) bool, noise and gamma (2,), kept (2, 33) uint8.
    """
    o, mm = options, np.asarray(voxel)
    kept = np.arange(len(IDS) + 1, dtype=np.uint8)
    if generator.random() < o["without_below"]:
        kept[[IDS.index(i) + 1 for i in BELOW]] = 0
    shared = generator.random() < o["shared_contrast"]
    images: list[dict[str, Any]] = []
    for _ in ("fixed", "moving"):
        contrast = _contrast(generator, o)
        if shared and images:
            contrast = {name: images[0][name] for name in contrast}
        around = generator.random() < o["surroundings"]
        spacing = np.ones(3)
        if generator.random() < o["thick"]:
            spacing[generator.integers(3)] = max(1.0, generator.uniform(1, max(1, o["thickness"])) / mm.mean())
        # Where none is coarse no number is drawn, so that images stay what they were before there were any.
        if o["coarse"] and generator.random() < o["coarse"]:
            spacing = np.maximum(spacing, generator.uniform(1, max(1, o["coarseness"])) / mm)
        sigma = generator.uniform(0, o["blur"], 3) / mm + 0.4 * (spacing - 1)
        size = (o["controls"],) * 3
        images.append(
            contrast
            | {
                "elastic": generator.uniform(0, o["deformation"]) * generator.standard_normal((*size, 3)) / mm,
                "bias": generator.uniform(0, o["bias"]) * generator.standard_normal((5, 5, 5)),
                "sigma": sigma,
                "spacing": spacing,
                # Of a brain blurred by 4 mm a half is at its surface, 0.15, 0.02 and 0.0005 are 4, 8 and 13 mm outside.
                "strip": [4 / mm.mean(), *((0.15, 0.02, 0.0005) if around else (generator.uniform(0.02, 0.9), 1, 1))],
                "surroundings": generator.uniform(0, 1, 2) if around else np.zeros(2),
                "soft": generator.random() < o["soft"],
                "noise": generator.uniform(0, o["noise"]),
                "gamma": np.exp(o["gamma"] * generator.standard_normal()),
            }
        )
    found = {name: np.stack([np.asarray(image[name]) for image in images]) for name in images[0]}
    found = {name: x if x.dtype == bool else x.astype(np.float32) for name, x in found.items()}
    return found | {"kept": np.stack([kept, kept]), "key": generator.integers(2**32, size=2, dtype=np.uint32)}


def _contrast(generator: np.random.Generator, o: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Means and deviations of the classes, the background's 0, and the curve through which they are seen."""
    curve = np.linspace(0, 1, KNOTS)
    if generator.random() < o["t1"]:
        means = T1 * (1 + 0.1 * generator.standard_normal(T1.size))
        if generator.random() < o["remapped"]:
            curve = generator.uniform(0, 1, KNOTS)
    else:
        # Between kinds that look like their tissue and kinds that have nothing to do with each other.
        own = generator.random()
        means = (1 - own) * generator.random(len(TISSUES))[TISSUE] + own * generator.random(TISSUE.size)
    deviations = generator.uniform(0, o["texture"], TISSUE.size)
    table = lambda values: np.concatenate([[0.0], values[KIND]])
    return {"means": table(means.clip(0, 1)), "deviations": table(deviations), "curve": curve}


def rendered(
    xp: ModuleType, maps: Any, numbers: Mapping[str, Any], affine: Any, flips: Any, white: Any
) -> dict[str, Any]:
    """One image (D, H, W) of a class map (D, H, W) and what goes with it, by the numbers of one image of `drawn`.

    `affine` (3, 4) and `flips` (3,) are as in `data.pipeline.batches`: the map is read, at the nearest voxel, at where
    the affine map leads from the place that the spline has led to, and is background beyond its faces. `white`
    (2, D, H, W) is normal noise. `xp` is numpy or jax.numpy.

    Returns: `image`, float32, from 0 to 1 as io.volumes.normalise's 'percentile' has it (by a sample of voxels where
    they are many); `labels`, uint8, the classes as they have come to lie, without the fluid around the brain; `clean`,
    the mean of each structure in T1, the same in every image, which a similarity can compare whatever `image` shows.
    """
    lying = numbers["kept"][_moved(xp, maps, numbers["elastic"], affine, flips)]
    structure = (lying > 0) & (lying < FLUID)
    blur, fluid, *bands = (numbers["strip"][k] for k in range(4))
    near = filtered(xp, structure.astype(xp.float32), blur * xp.ones(3), xp.ones(3))
    inside = structure | ((lying == FLUID) & (near > fluid))
    x = xp.where(inside, numbers["means"][lying] + numbers["deviations"][lying] * white[0], 0)
    for band, value in zip(bands[::-1], numbers["surroundings"][::-1], strict=True):
        # From outside in.
        x = xp.where(~inside & (near > band), value, x)
    support = inside | (near > bands[1])
    x = filtered(xp, x, numbers["sigma"], numbers["spacing"])
    x = _seen(xp, x, numbers["curve"]) * xp.exp(spline(xp, numbers["bias"][..., None], x.shape)[0])
    x = xp.maximum(x + numbers["noise"] * white[1], 0) * (support | numbers["soft"])
    labels = xp.where(structure, lying, 0).astype(xp.uint8)
    return {"image": _normalised(xp, x) ** numbers["gamma"], "clean": xp.asarray(CLEAN)[labels], "labels": labels}


CLEAN = np.concatenate([[0], T1[KIND]]).astype(np.float32)


def _moved(xp: ModuleType, maps: Any, elastic: Any, affine: Any, flips: Any) -> Any:
    shape = maps.shape
    u = spline(xp, elastic, shape)
    away = [
        u[axis] + xp.expand_dims(xp.arange(n, dtype=xp.float32) - (n - 1) / 2, [a for a in range(3) if a != axis])
        for axis, n in enumerate(shape)
    ]
    place, inside = xp.zeros(shape, xp.int32), xp.ones(shape, bool)
    for axis, n in enumerate(shape):
        q = away[axis] + affine[axis, 3] + sum(affine[axis, other] * away[other] for other in range(3))
        voxel = xp.round(xp.where(flips[axis], -q, q) + (n - 1) / 2).astype(xp.int32)
        inside &= (voxel >= 0) & (voxel < n)
        place = place * n + voxel
    return xp.where(inside, maps.reshape(-1)[xp.where(inside, place, 0)], 0)


def spline(xp: ModuleType, controls: Any, shape: tuple[int, ...]) -> Any:
    """The cubic B-spline (c, D, H, W) with these control points (g, g, g, c): the second and the last but one along an
    axis lie on the volume's first and last voxel."""
    d, h, w = (_basis(xp, n, controls.shape[axis]) for axis, n in enumerate(shape))
    # The axis of most voxels last, so that what lies in between is small.
    rows = xp.einsum("abcn,zc->nabz", controls, w)
    planes = xp.einsum("nabz,yb->nayz", rows, h)
    return xp.einsum("xa,nak->nxk", d, planes.reshape(*planes.shape[:2], -1)).reshape(-1, *shape)


def _basis(xp: ModuleType, n: int, controls: int) -> Any:
    t = 1 + xp.arange(n, dtype=xp.float32) * ((controls - 3) / max(n - 1, 1))
    away = xp.abs(t[:, None] - xp.arange(controls, dtype=xp.float32))
    return xp.where(away < 1, 2 / 3 - away**2 + away**3 / 2, xp.clip(2 - away, 0, None) ** 3 / 6)


def filtered(xp: ModuleType, x: Any, sigma: Any, spacing: Any) -> Any:
    """The volume as seen through a Gaussian of these standard deviations (3,), at samples so many voxels (3,) apart
    along each axis, between which it is linear.

    A matrix product an axis, whatever the width: on a GPU nothing is faster.
    """
    for axis, n in enumerate(x.shape):
        matrix = _filter(xp, n, sigma[axis], spacing[axis])
        x = xp.moveaxis(xp.tensordot(matrix, x, axes=(1, axis)), 0, axis)
    return x


def _filter(xp: ModuleType, n: int, sigma: Any, spacing: Any) -> Any:
    place = xp.arange(n, dtype=xp.float32)
    samples = xp.minimum(place * spacing, n - 1)[:, None]
    # No narrower than this, lest a sample between two voxels see neither.
    weights = xp.exp(-0.5 * ((place - samples) / xp.maximum(sigma, 0.2)) ** 2)
    between = xp.clip(1 - xp.abs(place[:, None] / spacing - place), 0, None)
    return between @ (weights / weights.sum(1, keepdims=True))


def _seen(xp: ModuleType, x: Any, curve: Any) -> Any:
    """Through the curve, linear between its knots from 0 to 1."""
    x = xp.clip(x, 0, 1) * (KNOTS - 1)
    return sum(curve[knot] * xp.clip(1 - xp.abs(x - knot), 0, None) for knot in range(KNOTS))


def _normalised(xp: ModuleType, x: Any) -> Any:
    step = 2 if x.size > 2**19 else 1
    sample = x[::step, ::step, ::step].reshape(-1)
    ordered = xp.sort(xp.where(sample > 0, sample, xp.inf))
    last = xp.maximum((sample > 0).sum() - 1, 0)
    low, high = (ordered[(share * last).astype(xp.int32)] for share in (0.001, 0.999))
    range_ = xp.where(high > low, high - low, 1)
    return xp.clip((x - xp.where(xp.isfinite(low), low, 0)) / range_, 0, 1)


def t1_like(maps: UInt8[np.ndarray, "d h w"], seed: int) -> Float32[np.ndarray, "d h w"]:
    """The image of a class map at 1 mm that validation sees: T1-like, with a little of everything, cut out of its
    surroundings, and where the map lies."""
    generator = np.random.default_rng(seed)
    none = ("remapped", "without_below", "surroundings", "soft", "deformation", "thick", "coarse")
    gentle = dict.fromkeys(none, 0) | {"t1": 1}
    numbers = {name: x[0] for name, x in drawn(generator, OPTIONS | gentle, (1.0, 1.0, 1.0)).items()}
    numbers["strip"][1] = 0.5
    white = generator.standard_normal((2, *maps.shape), np.float32)
    still: Float[np.ndarray, "3 4"] = np.zeros((3, 4), np.float32)
    return rendered(np, maps, numbers, still, np.zeros(3, bool), white)["image"].astype(np.float32)
