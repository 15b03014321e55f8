"""Instance optimisation: the displacement of one pair, found or improved on the pair's own images.

A greedy compositive scheme, as in greedy (Yushkevich et al. 2016) and FireANTs (Jena et al. 2024), on an image pyramid:

    force         how the similarity changes with the displacement of each voxel
    update        Adam's step along the smoothed force, one step length for each voxel's vector
    displacement  u <- smooth(u(x + update(x)) + update(x))

Smoothing the force makes the deformation fluid, smoothing the displacement elastic. Adam's step is damped: where a
force is far below `DAMPING`, the voxel moves by less than the rate. Without damping, noise in regions without edges
moves voxels as far as edges do (experiments/results/refinement.md).

From nothing the descent starts at the coarsest level; behind a network, a few levels above the finest.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from dilformer_jax.data.preprocessing import by
from dilformer_jax.io.volumes import BadInput, normalise
from dilformer_jax.ops import information, similarities, smoothing, spatial
from dilformer_jax.registration import contrasts

Image = Float32[np.ndarray, "_ _ _"]
Displacement = Float32[np.ndarray, "_ _ _ 3"]
Volume = Float[Array, "d h w 1"]
Field = Float[Array, "d h w 3"]

SMALLEST = 8  # voxels along each axis of the coarsest level
LARGEST = 2**24  # voxels of the finest level: of larger images it is half their resolution, or a quarter
LEVELS = 4
LEVELS_BEHIND = 3  # behind a network, whose displacement is right at the coarser ones
MORE = 4  # times as many steps at each coarser level,
MOST = 100  # but no more than these, or than at the finest level
# The force on a voxel, in the units of its similarity summed over the volume, at which its update is half of the rate.
DAMPING = {"lncc": 0.06, "mind": 0.3, "nmi": 0.03}
COARSE_SMOOTHING = 1.0  # voxels, of the force at coarser levels, or the finest level's where that is larger
SIMILARITIES = ("auto", *DAMPING)
MOMENTUM, SPREAD = 0.9, 0.99  # Adam's decay of the mean force and of its square
CHECKED = 10  # steps, between two tests of convergence


@dataclass(frozen=True)
class Refinement:
    """How a pair is refined.

    Attributes:
      steps: at the finest level; each coarser level takes `MORE` times as many, up to `MOST`.
      similarity: 'lncc', for images of one contrast; 'mind', by self-similarity, or 'nmi', normalised mutual
        information, for images of two; 'auto': lncc where `contrasts.one_contrast` finds one contrast, elsewhere mind,
        but a network's displacement is left as it is.
      window: LNCC's, in voxels of the level.
      rate: the length of an update, in voxels of the level.
      update_smoothing: standard deviation of the Gaussian that smooths the force at the finest level, in voxels.
      total_smoothing: that of the displacement, after every step.
      finest: the finest level, in halvings of the images: 0 is their full resolution.
      tolerance: a level ends early when `CHECKED` steps raise the similarity by less than this part of it.

    Raises:
      ValueError: an unknown similarity, or a number that cannot be.
    """

    steps: int = 5
    similarity: str = "auto"
    window: int = 7
    rate: float = 0.5
    update_smoothing: float = 0.7
    total_smoothing: float = 0.5
    finest: int = 0
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"The similarity of a refinement is one of {SIMILARITIES}, not {self.similarity!r}.")
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"The window of a refinement has an odd number of voxels, got {self.window}.")
        if not self.rate > 0:
            raise ValueError(f"The rate of a refinement is above 0, got {self.rate}.")
        if self.steps < 1:
            raise ValueError(f"The steps of a refinement are 1 or more, got {self.steps}.")
        for name in ("update_smoothing", "total_smoothing", "finest", "tolerance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"The {name} of a refinement is 0 or more, got {getattr(self, name)}.")


# Measured in experiments/results/refinement.md: 'fast' is the network alone.
PRESETS: Mapping[str, Refinement | None] = {
    "fast": None,
    "default": Refinement(),
    "best": Refinement(steps=20),
}


def from_options(
    preset: str | None,
    steps: int | None,
    *,
    network: bool,
    default_preset: str | None,
    option: Callable[[str], str] = str,
    **given: Any,
) -> Refinement | None:
    """Returns the refinement that a user's options describe, or None for the network alone.

    Args:
      preset: a name of `PRESETS`. Without it, and without `steps`, `default_preset` holds; if that is None, nothing is
        refined.
      steps: replaces the preset's steps at the finest level; 0 means no refinement.
      network: whether a network registers the pair first.
      default_preset: see `preset`.
      option: renders the name of an option for messages, for example 'refine' as '--refine'.
      given: further attributes of `Refinement`, which replace the preset's.

    Raises:
      BadInput: an unknown preset, options that exclude each other, a value that cannot be, or nothing to register by.
    """
    if preset is not None and preset not in PRESETS:
        raise BadInput(f"{option('preset')} is {preset!r}; give one of {', '.join(PRESETS)}.")
    if steps is not None and steps < 0:
        raise BadInput(f"{option('refine')} is {steps}; give 0 or more steps, 10 for example.")
    base = preset or (default_preset if steps is None else "default")
    how = None if base is None else PRESETS[base]
    if preset is not None and steps is not None and (how is None) != (steps == 0):
        meaning = "refines" if how else "is the network alone"
        raise BadInput(f"{option('preset')} {preset} {meaning}, {option('refine')} {steps} says otherwise; give one.")
    if how is None or steps == 0:
        if given:
            raise BadInput(
                f"{option(next(iter(given)))} says how to refine; give {option('preset')} default with it, or "
                f"{option('refine')} and a number of steps."
            )
        if not network and default_preset is not None:
            raise BadInput(
                "Nothing would register this pair, neither a network nor refinement; give "
                f"{option('preset')} default or a network's weights."
            )
        return None
    known = [field.name for field in fields(Refinement) if field.name != "steps"]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise BadInput(f"A refinement has no {unknown[0]}; it has {', '.join(known)}.")
    changes: dict[str, Any] = given if steps is None else {"steps": steps, **given}
    try:
        return replace(how, **changes)
    except ValueError as error:
        raise BadInput(f"{error}") from error


def refine(
    fixed: Image,
    moving: Image,
    how: Refinement,
    initial: Displacement | None = None,
    names: tuple[Any, Any] = ("fixed", "moving"),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Displacement:
    """The displacement, in voxels, on the grid that both images share, found from nothing or from an `initial` one.

    Intensities are as in their files; `spacing` is that of the voxels along each axis, in any unit. Compiles once for
    each shape.

    Raises:
      BadInput: an image, one of `names`, is too small or its intensities cannot be scaled.
      ValueError: the shapes differ.
    """
    if fixed.shape != moving.shape:
        raise ValueError(f"fixed is {fixed.shape} and moving {moving.shape}; both lie on one grid")
    check_shape(fixed.shape, names[0])
    with_similarity = choose_similarity(how, fixed, moving, names, initial)
    if with_similarity is None:
        assert initial is not None
        return initial
    program = compiled(fixed.shape, with_similarity, initial is not None)
    images = [_prepared(image, name) for image, name in zip((fixed, moving), names, strict=True)]
    # The shape of a voxel matters, not its size.
    cube = np.array(spacing) / np.prod(spacing) ** (1 / 3)
    given = [] if initial is None else [initial]
    return np.asarray(program(*images, cube.astype(np.float32), *given))


def choose_similarity(
    how: Refinement,
    fixed: Image,
    moving: Image,
    names: tuple[Any, Any] = ("fixed", "moving"),
    initial: Displacement | None = None,
) -> Refinement | None:
    """Replaces the similarity 'auto' by the one that fits the pair; any other stays as it is.

    Returns None if the images show two contrasts and there is an `initial` displacement, from a network: LNCC, MIND and
    NMI all made that worse (experiments/results/refinement.md). Raises BadInput as `refine` does.
    """
    if how.similarity != "auto":
        return how
    still, other = (_prepared(image, name) for image, name in zip((fixed, moving), names, strict=True))
    if initial is not None:
        other = np.asarray(_warp(other[..., None], initial)[..., 0])
    # Every second voxel along each axis is enough for this statistic.
    one = contrasts.one_contrast(still[::2, ::2, ::2], other[::2, ::2, ::2], warped=initial is not None)
    if not one and initial is not None:
        return None
    return replace(how, similarity="lncc" if one else "mind")


def check_shape(shape: tuple[int, ...], name: Any) -> None:
    """Raises BadInput, about `name`, where an axis is too short for the windows of its coarsest level."""
    if min(shape) < SMALLEST:
        raise BadInput(
            f"{name} is {by(shape)}, too small to be refined, which takes {SMALLEST} voxels or more along each axis; "
            "resample it to smaller voxels or pad it."
        )


def compiled(shape: tuple[int, ...], how: Refinement, from_initial: bool) -> Any:
    """The program for volumes of this shape: (fixed, moving, spacing) and, where it starts from one, a displacement."""
    # The cache tells an argument left out from one that is given.
    return _compiled(shape, how, from_initial)


@functools.lru_cache(maxsize=16)
def _compiled(shape, how, from_initial):
    finest, coarsest = levels(shape, how.finest, LEVELS_BEHIND if from_initial else LEVELS)
    d, h, w = (-(-size // 2**coarsest) * 2**coarsest for size in shape)

    def program(fixed, moving, spacing, initial=None):
        fixed, moving = (_padded(x[..., None], (d, h, w)) for x in (fixed, moving))
        start = None if initial is None else _padded(initial, (d, h, w))
        return optimise(fixed, moving, spacing, how, finest, coarsest, start)[: shape[0], : shape[1], : shape[2]]

    cube, image = jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32)
    start = [jax.ShapeDtypeStruct((*shape, 3), jnp.float32)] * from_initial
    return jax.jit(program).lower(image, image, cube, *start).compile()


def levels(shape: tuple[int, ...], finest: int = 0, count: int = LEVELS) -> tuple[int, int]:
    """The finest and the coarsest of up to `count` levels, in halvings, for images of this shape: `finest` or, of
    volumes over `LARGEST`, a coarser one."""
    large_enough = lambda level: min(shape) >= SMALLEST * 2**level
    voxels = lambda level: math.prod(-(-size // 2**level) for size in shape)
    while finest > 0 and not large_enough(finest):
        finest -= 1
    while voxels(finest) > LARGEST and large_enough(finest + 1):
        finest += 1
    coarsest = finest
    while coarsest < finest + count - 1 and large_enough(coarsest + 1):
        coarsest += 1
    return finest, coarsest


def optimise(
    fixed: Volume,
    moving: Volume,
    spacing: Float[Array, "3"],
    how: Refinement,
    finest: int,
    coarsest: int,
    initial: Field | None = None,
) -> Field:
    """Returns the displacement, in voxels, that aligns two images of intensities between about 0 and 1.

    It descends from level `coarsest` to level `finest`; each axis is divisible by 2**coarsest. The product of `spacing`
    is 1. The images' axes, not a batch, come first: (d, h, w, 1).
    """
    if how.similarity == "lncc":
        fixed, moving = fixed - fixed.mean(), moving - moving.mean()
    pyramid = [(fixed, moving)]
    for _ in range(coarsest):
        fixed, moving = (spatial.average(image) for image in pyramid[-1])
        pyramid.append((fixed, moving))
    u = jnp.zeros((*pyramid[coarsest][0].shape[:3], 3))
    if initial is not None:
        u = initial
        for _ in range(coarsest):
            u = spatial.average(u) / 2
    for level in range(coarsest, finest - 1, -1):
        fixed, moving = pyramid[level]
        u = spatial.resize_displacement(u, fixed.shape[:3])
        steps = min(how.steps * MORE ** (level - finest), max(how.steps, MOST))
        update_smoothing = how.update_smoothing if level == finest else max(COARSE_SMOOTHING, how.update_smoothing)
        u = _optimise_level(fixed, moving, u, spacing, how, steps, update_smoothing)
    return spatial.resize_displacement(u, pyramid[0][0].shape[:3])


def _optimise_level(fixed, moving, u, spacing, how, steps, update_smoothing):
    """Returns the displacement after at most `steps` steps; the loop is rolled, so that it compiles quickly."""
    slope = _slope(fixed, how)
    smoothed = lambda x, sigma: smoothing.gaussian(x, sigma / spacing, radius=smoothing.radius(sigma)) if sigma else x

    def unfinished(state):
        # Sums of the similarity over the last two blocks of `CHECKED` steps.
        step, (before, now) = state[0], state[-1]
        converged = (step % CHECKED == 0) & (now - before < how.tolerance * jnp.abs(before))
        return (step < steps) & ~((step >= 2 * CHECKED) & converged)

    def step_once(state):
        step, u, mean, square, (before, now) = state
        moved = spatial.warp(moving, u)
        change, likeness = slope(moved)
        gradient = jnp.concatenate([spatial.difference(moved, axis) for axis in (-4, -3, -2)], -1)
        force = smoothed(change * gradient, update_smoothing)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * force
        square = SPREAD * square + (1 - SPREAD) * jnp.square(force).mean(-1, keepdims=True)
        count = step + 1.0
        spread = jnp.sqrt(square / (1 - SPREAD**count)) + DAMPING[how.similarity]
        update = how.rate / (1 - MOMENTUM**count) * mean / spread
        u = smoothed(spatial.compose(u, update), how.total_smoothing)
        first = step % CHECKED == 0
        sums = jnp.where(first, now, before), jnp.where(first, 0.0, now) + likeness
        return step + 1, u, mean, square, sums

    nothing = jnp.float32(0)
    start = jnp.int32(0), u, jnp.zeros_like(u), jnp.zeros_like(u[..., :1]), (nothing, nothing)
    return lax.while_loop(unfinished, step_once, start)[1]


def _slope(fixed: Volume, how: Refinement) -> Callable[[Volume], tuple[Volume, Array]]:
    """Returns a function of the moved image: the derivative of the summed similarity to each of its voxels, and the
    similarity's mean."""
    if how.similarity == "lncc":
        return similarities.lncc_slope(fixed, how.window)
    if how.similarity == "nmi":
        likeness = lambda moved: information.nmi(fixed.ravel(), moved.ravel())
    else:
        fixed_features = similarities.self_similarity(fixed)
        likeness = lambda moved: -similarities.mse(fixed_features, similarities.self_similarity(moved))

    def slope(moved):
        value, change = jax.value_and_grad(likeness)(moved)
        return fixed.size * change, value

    return slope


_warp = jax.jit(spatial.warp)


def _padded(x, shape):
    """Continued by its border value."""
    margins = [(0, wanted - size) for size, wanted in zip(x.shape[:3], shape, strict=True)]
    return jnp.pad(x, (*margins, (0, 0)), mode="edge")


def _prepared(image: Image, name: Path | str) -> Image:
    try:
        return normalise(image, "percentile")
    except BadInput as fault:
        raise BadInput(f"{name}: {fault}") from fault
