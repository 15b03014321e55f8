"""Instance optimisation: the displacement of one pair, found or improved by descent on its own similarity.

Coarse to fine from nothing, which is a classical registration by itself, or at the finest level from the displacement
of a network. What is descended is −LNCC + weight · diffusion, by Adam.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from jax import lax
from jaxtyping import Array, Float, Float32

from dilformer_jax.data.preprocessing import by
from dilformer_jax.io.volumes import BadInput, normalise
from dilformer_jax.ops import losses, spatial

Image = Float32[np.ndarray, "_ _ _"]
Displacement = Float32[np.ndarray, "_ _ _ 3"]
SMALLEST = 8  # voxels along each axis of the coarsest level
LARGEST = 2**21  # voxels of the finest level: of larger images it is half their resolution, or a quarter
LEVELS = 4
SLOPE = 1e-2  # of a voxel's part of the objective: below it Adam makes no whole steps of what is mostly rounding
INTEGRATION = 4  # squarings of a velocity: a quarter of a voxel at a time, of a displacement of four


@dataclass(frozen=True)
class Refinement:
    """How a pair is refined.

    Attributes:
      steps: descent steps at the finest level; from nothing, each coarser level takes twice as many as the next.
      diffeomorphic: whether a stationary velocity is sought, which is integrated, instead of a displacement; where the
        pair comes with a displacement, what is integrated comes before it.
      window: LNCC's, in voxels of the level.
      weight: of the diffusion (`ops.losses.diffusion`).
      rate: Adam's, in voxels of the level.

    Raises:
      ValueError: steps below 0, a window, weight or rate that cannot be.
    """

    steps: int = 50
    diffeomorphic: bool = False
    window: int = 9
    weight: float = 2.0
    rate: float = 0.2

    def __post_init__(self) -> None:
        if self.steps < 0 or self.window < 1 or self.window % 2 == 0 or not self.weight >= 0 or not self.rate > 0:
            raise ValueError(
                "A refinement has 0 steps or more, an odd window, a weight that is not negative and a positive rate, "
                f"got {self}."
            )


def refine(
    fixed: Image,
    moving: Image,
    how: Refinement,
    initial: Displacement | None = None,
    names: tuple[Any, Any] = ("fixed", "moving"),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Displacement:
    """The displacement, in voxels, on the grid that both images share; intensities are as in their files, `spacing` is
    that of the voxels along each axis.

    Compiles once for each shape. Raises BadInput, saying which of `names` it is, for an image that is too small or
    whose intensities cannot be scaled, and ValueError for shapes that differ.
    """
    if fixed.shape != moving.shape:
        raise ValueError(f"fixed is {fixed.shape} and moving {moving.shape}; both lie on one grid")
    check_shape(fixed.shape, names[0])
    program = compiled(fixed.shape, how, initial is not None)
    images = [_prepared(image, name) for image, name in zip((fixed, moving), names, strict=True)]
    # Of what shape a voxel is matters, not how large it is.
    cube = np.array(spacing) / np.prod(spacing) ** (1 / 3)
    return np.asarray(program(*images, cube.astype(np.float32), *([] if initial is None else [initial])))


def check_shape(shape: tuple[int, ...], name: Any) -> None:
    """Raises BadInput, about `name`, where an axis is too short for the windows of its coarsest level."""
    if min(shape) < SMALLEST:
        raise BadInput(
            f"{name} is {by(shape)}, too small to be refined, which takes {SMALLEST} voxels or more along each axis; "
            "resample it to smaller voxels or pad it."
        )


@functools.lru_cache(maxsize=8)
def compiled(shape: tuple[int, ...], how: Refinement, from_initial: bool) -> Any:
    """The program for volumes of this shape: (fixed, moving, spacing) and, where it starts from one, a displacement."""
    finest, coarsest = levels(shape)
    coarsest = finest if from_initial else coarsest
    d, h, w = (-(-size // 2**coarsest) * 2**coarsest for size in shape)

    def program(fixed, moving, spacing, initial=None):
        fixed, moving = (_padded(x[..., None], (d, h, w)) for x in (fixed, moving))
        initial = None if initial is None else _padded(initial, (d, h, w))
        return found(fixed, moving, spacing, how, finest, coarsest, initial)[: shape[0], : shape[1], : shape[2]]

    cube, image = jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32)
    field = [jax.ShapeDtypeStruct((*shape, 3), jnp.float32)] * from_initial
    return jax.jit(program).lower(image, image, cube, *field).compile()


def levels(shape: tuple[int, ...]) -> tuple[int, int]:
    """The finest and the coarsest level, in halvings, for images of this shape."""
    finest = 0
    while math.prod(-(-size // 2**finest) for size in shape) > LARGEST and min(shape) >= SMALLEST * 2 ** (finest + 1):
        finest += 1
    coarsest = finest
    while coarsest < finest + LEVELS - 1 and min(shape) >= SMALLEST * 2 ** (coarsest + 1):
        coarsest += 1
    return finest, coarsest


def found(
    fixed: Float[Array, "d h w 1"],
    moving: Float[Array, "d h w 1"],
    spacing: Float[Array, "3"],
    how: Refinement,
    finest: int,
    coarsest: int,
    initial: Float[Array, "d h w 3"] | None = None,
) -> Float[Array, "d h w 3"]:
    """The displacement of two images of intensities around 0 to 1, whose axes are halved `coarsest` times."""
    pyramid = [(fixed, moving, initial)]
    for _ in range(coarsest):
        f, m, u = pyramid[-1]
        pyramid.append((spatial.average(f), spatial.average(m), None if u is None else spatial.average(u) / 2))
    x = jnp.zeros((*pyramid[coarsest][0].shape[:3], 3))
    for level in range(coarsest, finest - 1, -1):
        f, m, u = pyramid[level]
        x = spatial.resize_displacement(x, f.shape[:3])
        x = _descended(f, m, u, x, spacing, how, how.steps * 2 ** (level - finest))
    # A velocity is enlarged when it is integrated, which takes less time and is as smooth.
    x = spatial.integrate(x, INTEGRATION) if how.diffeomorphic else x
    return _total(initial, spatial.resize_displacement(x, fixed.shape[:3]), how)


def _total(initial, x, how):
    if initial is None:
        return x
    return spatial.compose(initial, x) if how.diffeomorphic else initial + x


def _descended(fixed, moving, initial, x, spacing, how, steps):
    """The displacement or velocity after so many steps, in a rolled loop."""
    descent = optax.adam(how.rate, eps=SLOPE)

    def objective(x):
        u = _total(initial, spatial.integrate(x, INTEGRATION) if how.diffeomorphic else x, how)
        similarity = losses.lncc(fixed, spatial.warp(moving, u), how.window)
        return fixed.size * (how.weight * losses.diffusion(u, spacing) - similarity)

    def step(_, carried):
        x, state = carried
        updates, state = descent.update(jax.grad(objective)(x), state)
        return optax.apply_updates(x, updates), state

    return lax.fori_loop(0, steps, step, (x, descent.init(x)))[0]


def _padded(x, shape):
    """Continued by its border value."""
    margins = [(0, wanted - size) for size, wanted in zip(x.shape[:3], shape, strict=True)]
    return jnp.pad(x, (*margins, (0, 0)), mode="edge")


def _prepared(image: Image, name: Path | str) -> Image:
    try:
        return normalise(image, "percentile")
    except BadInput as fault:
        raise BadInput(f"{name}: {fault}") from fault
