"""Instance optimisation: the displacement of one pair, found or improved by descent on its own similarity.

Coarse to fine from nothing, which is a classical registration by itself, or at the finest level from the displacement
of a network. What is descended is dissimilarity + weight · roughness of what is sought, by Adam: behind a network, of
what is added to its displacement, which stands for what training has taught of likely deformations. To weigh the
roughness of the whole would undo that (experiments/results/refinement.md).

A velocity v, of which the displacement is exp(v), takes the gradient of the displacement for its own, and it is v whose
roughness is weighed: as in the log-domain demons of Vercauteren et al. (MICCAI 2008), an update of the displacement is
added to the velocity. Against the gradient through scaling and squaring it takes a sixth of the time and finds as much.
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
from dilformer_jax.ops import information, regularisers, similarities, spatial

Image = Float32[np.ndarray, "_ _ _"]
Displacement = Float32[np.ndarray, "_ _ _ 3"]
SMALLEST = 8  # voxels along each axis of the coarsest level
LARGEST = 2**21  # voxels of the finest level: of larger images it is half their resolution, or a quarter
LEVELS = 4
SLOPE = 1e-2  # of a voxel's part of the objective: below it Adam makes no whole steps of what is mostly rounding
INTEGRATION = 4  # squarings of a velocity during the descent; at its end there are more
# Of the regulariser, chosen on two pairs of LPBA40 (experiments/results/refinement.md).
WEIGHTS = {
    ("lncc", "diffusion"): 2.0,
    ("lncc", "bending"): 1.0,
    ("mind", "diffusion"): 0.3,
    ("mind", "bending"): 0.1,
    ("nmi", "diffusion"): 10.0,
    ("nmi", "bending"): 1.0,
}
SIMILARITIES, REGULARISERS = (tuple(dict.fromkeys(names)) for names in zip(*WEIGHTS, strict=True))


@dataclass(frozen=True)
class Refinement:
    """How a pair is refined.

    Attributes:
      steps: descent steps at the finest level; from nothing, each coarser level takes twice as many as the next.
      diffeomorphic: whether a stationary velocity is sought, which is integrated, instead of a displacement; where the
        pair comes with a displacement, what is integrated comes before it.
      similarity: 'lncc', for images of one contrast; 'mind', by self-similarity, or 'nmi', normalised mutual
        information, for images of two.
      regulariser: 'diffusion' or 'bending' (`ops.regularisers`), which leaves affine deformations free.
      weight: of the regulariser; by default that of `WEIGHTS`.
      window: LNCC's, in voxels of the level.
      rate: Adam's, in voxels of the level.

    Raises:
      ValueError: steps below 0, an unknown similarity or regulariser, a window, weight or rate that cannot be.
    """

    steps: int = 50
    diffeomorphic: bool = False
    similarity: str = "lncc"
    regulariser: str = "diffusion"
    weight: float | None = None
    window: int = 9
    rate: float = 0.2

    @classmethod
    def usual(cls, steps: int, *, network: bool, **given: Any) -> "Refinement":
        """What is not given is chosen for refining behind a network, by a velocity, or without one, by a displacement:
        behind a network a velocity gains as much and hardly folds (experiments/results/refinement.md)."""
        return cls(steps, **{"diffeomorphic": network, **given})

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES or self.regulariser not in REGULARISERS:
            raise ValueError(
                f"A refinement is by one of {SIMILARITIES} and one of {REGULARISERS}, "
                f"got {self.similarity!r} and {self.regulariser!r}."
            )
        if self.weight is None:
            object.__setattr__(self, "weight", WEIGHTS[self.similarity, self.regulariser])
        assert self.weight is not None
        if self.steps < 0 or self.window < 1 or self.window % 2 == 0 or not self.weight >= 0 or not self.rate > 0:
            raise ValueError(
                "A refinement has 0 steps or more, an odd window, a weight that is not negative and a positive rate, "
                f"got {self}."
            )


@dataclass(frozen=True, eq=False)
class Refined:
    """A pair's displacement and its inverse, in voxels on the grid of both; the inverse is None where it is not known
    but by inverting the displacement."""

    displacement: Displacement
    inverse: Displacement | None


def refine(
    fixed: Image,
    moving: Image,
    how: Refinement,
    initial: Displacement | None = None,
    names: tuple[Any, Any] = ("fixed", "moving"),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    initial_inverse: Displacement | None = None,
) -> Refined:
    """The displacement, in voxels, on the grid that both images share; intensities are as in their files, `spacing` is
    that of the voxels along each axis.

    The diffeomorphic form has an inverse, exp(-v), and so has what it makes of an `initial` displacement whose
    `initial_inverse` is given. Compiles once for each shape. Raises BadInput, saying which of `names` it is, for an
    image that is too small or whose intensities cannot be scaled, and ValueError for shapes that differ and for an
    inverse of nothing.
    """
    if fixed.shape != moving.shape:
        raise ValueError(f"fixed is {fixed.shape} and moving {moving.shape}; both lie on one grid")
    if initial is None and initial_inverse is not None:
        raise ValueError("An initial_inverse is that of an initial displacement; give both.")
    check_shape(fixed.shape, names[0])
    program = compiled(fixed.shape, how, initial is not None, initial_inverse is not None)
    images = [_prepared(image, name) for image, name in zip((fixed, moving), names, strict=True)]
    # Of what shape a voxel is matters, not how large it is.
    cube = np.array(spacing) / np.prod(spacing) ** (1 / 3)
    given = [field for field in (initial, initial_inverse) if field is not None]
    return Refined(*jax.tree.map(np.asarray, program(*images, cube.astype(np.float32), *given)))


def check_shape(shape: tuple[int, ...], name: Any) -> None:
    """Raises BadInput, about `name`, where an axis is too short for the windows of its coarsest level."""
    if min(shape) < SMALLEST:
        raise BadInput(
            f"{name} is {by(shape)}, too small to be refined, which takes {SMALLEST} voxels or more along each axis; "
            "resample it to smaller voxels or pad it."
        )


def compiled(shape: tuple[int, ...], how: Refinement, from_initial: bool, from_inverse: bool = False) -> Any:
    """The program for volumes of this shape: (fixed, moving, spacing) and, where it starts from one, a displacement
    and, where that is known, its inverse."""
    # The cache tells an argument left out from one that is given.
    return _compiled(shape, how, from_initial, from_inverse)


@functools.lru_cache(maxsize=16)
def _compiled(shape, how, from_initial, from_inverse):
    finest, coarsest = levels(shape)
    coarsest = finest if from_initial else coarsest
    d, h, w = (-(-size // 2**coarsest) * 2**coarsest for size in shape)

    def program(fixed, moving, spacing, *given):
        fixed, moving = (_padded(x[..., None], (d, h, w)) for x in (fixed, moving))
        fields = found(fixed, moving, spacing, how, finest, coarsest, *(_padded(field, (d, h, w)) for field in given))
        return jax.tree.map(lambda u: u[: shape[0], : shape[1], : shape[2]], fields)

    cube, image = jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32)
    fields = [jax.ShapeDtypeStruct((*shape, 3), jnp.float32)] * (from_initial + from_inverse)
    return jax.jit(program).lower(image, image, cube, *fields).compile()


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
    initial_inverse: Float[Array, "d h w 3"] | None = None,
) -> tuple[Float[Array, "d h w 3"], Float[Array, "d h w 3"] | None]:
    """The displacement, and its inverse where it is known, of two images of intensities around 0 to 1, whose axes are
    halved `coarsest` times."""
    pyramid = [(fixed, moving, initial)]
    for _ in range(coarsest):
        f, m, u = pyramid[-1]
        pyramid.append((spatial.average(f), spatial.average(m), None if u is None else spatial.average(u) / 2))
    x = jnp.zeros((*pyramid[coarsest][0].shape[:3], 3))
    for level in range(coarsest, finest - 1, -1):
        f, m, u = pyramid[level]
        x = spatial.resize_displacement(x, f.shape[:3])
        x = _descended(f, m, u, x, spacing, how, how.steps * 2 ** (level - finest))
    enlarged = lambda x: spatial.resize_displacement(x, fixed.shape[:3])
    if not how.diffeomorphic:
        return _total(initial, enlarged(x), how), None
    # A velocity is enlarged when it is integrated, which takes less time and is as smooth.
    u = _total(initial, enlarged(spatial.integrate(x)), how)
    if initial is not None and initial_inverse is None:
        return u, None
    back = enlarged(spatial.integrate(-x))
    return u, back if initial_inverse is None else spatial.compose(back, initial_inverse)


def _total(initial, x, how):
    if initial is None:
        return x
    return spatial.compose(initial, x) if how.diffeomorphic else initial + x


def _descended(fixed, moving, initial, x, spacing, how, steps):
    """The displacement or velocity after so many steps, in a rolled loop."""
    descent = optax.adam(how.rate, eps=SLOPE)
    likeness = _likeness(fixed, moving, how)
    roughness = regularisers.REGULARISERS[how.regulariser]

    def objective(x):
        # What a velocity moves has the gradient that a displacement would have.
        u = x + lax.stop_gradient(spatial.integrate(x, INTEGRATION) - x) if how.diffeomorphic else x
        return fixed.size * (how.weight * roughness(x, spacing) - likeness(_total(initial, u, how)))

    def step(_, carried):
        x, state = carried
        updates, state = descent.update(jax.grad(objective)(x), state)
        return optax.apply_updates(x, updates), state

    return lax.fori_loop(0, steps, step, (x, descent.init(x)))[0]


def _likeness(fixed, moving, how):
    """How alike the images are, as a function of the displacement."""
    if how.similarity == "lncc":
        return lambda u: similarities.lncc(fixed, spatial.warp(moving, u), how.window)
    if how.similarity == "nmi":
        return lambda u: information.nmi(fixed.ravel(), spatial.warp(moving, u).ravel())
    still, other = similarities.self_similarity(fixed), similarities.self_similarity(moving)
    return lambda u: -similarities.mse(still, spatial.warp(other, u))


def _padded(x, shape):
    """Continued by its border value."""
    margins = [(0, wanted - size) for size, wanted in zip(x.shape[:3], shape, strict=True)]
    return jnp.pad(x, (*margins, (0, 0)), mode="edge")


def _prepared(image: Image, name: Path | str) -> Image:
    try:
        return normalise(image, "percentile")
    except BadInput as fault:
        raise BadInput(f"{name}: {fault}") from fault
