"""Affine pre-alignment of two images of any shape, spacing, orientation and place: moments, then rigid, then affine.

What is descended is −NMI, in lengths of the fixed content and from its centre, so that neither the unit nor the origin
of the world matters, between grids of one size around what the images show.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float64
from scipy.spatial.transform import Rotation  # type: ignore[import-untyped]

from dilformer_jax.io.geometry import apply_affine
from dilformer_jax.io.volumes import Volume
from dilformer_jax.ops import information, sampling
from dilformer_jax.registration.content import Content, Mask, content

# Mean brightness beyond the rim, of that within, from which and at which only the rim counts. Measured: brain and
# brain or head and head up to 0.11, brain and head from 0.20.
BEYOND = (0.13, 0.18)
STARTS = 24
COARSE, RIGID, AFFINE = (40, 0.1), (20, 0.02), (50, 0.02)  # steps, and the first one's length in radii
# Measured on real brains, right and wrong pairs: see the warnings.
POOR = 0.5
SCALES = (0.7, 1.4)  # a descent reaches 0.68 and 1.48; brains of two data sets differ by up to 1.3
OVERLAP = 0.5
APART = 0.05  # of the fixed foreground in the moving field of view: less is none


@dataclass(frozen=True)
class Similarity:
    """How alike two images are: normalised mutual information (1 to 2) around the content of the smaller one, and
    the correlation of intensities (-1 to 1) over its foreground, both averaged over a few millimetres."""

    nmi: float
    correlation: float


@dataclass(frozen=True, eq=False)
class Alignment:
    """An affine transform and how it came about.

    Attributes:
      matrix: maps points of the fixed image to points of the moving image, RAS mm.
      similarity_before: where the headers put the images.
      similarity: after the alignment.
      overlap: the share of the fixed image's foreground that lands in the moving image's field of view.
      start: from which of the starts it came.
      warnings: sentences for the user.
    """

    matrix: Float64[np.ndarray, "4 4"]
    similarity_before: Similarity
    similarity: Similarity
    overlap: float
    start: str
    warnings: tuple[str, ...]


def align(
    fixed: Volume,
    moving: Volume,
    *,
    fixed_mask: Mask | None = None,
    moving_mask: Mask | None = None,
    search: bool = False,
) -> Alignment:
    """The affine transform under which the moving image is most like the fixed one.

    Masks lie on the images' own grids; what they leave out counts as background. With `search` the headers are
    believed neither where the images lie nor which way they are turned: it starts from all 24 rotations of the axes.

    Raises:
      BadInput: an image or a mask that shows nothing.
      ValueError: a mask of another shape than its image.
    """
    a, b = content(fixed, fixed_mask), content(moving, moving_mask)
    # The difference of the origins first: a shift of both leaves no trace.
    origins = np.asarray(fixed.affine[:3, 3], np.float64) - moving.affine[:3, 3]
    gap = a.linear @ a.centre - b.linear @ b.centre + origins
    shared = _landed(a, b, np.eye(3), gap)
    warnings = []
    if shared < APART:
        warnings.append(
            f"fields of view do not overlap (centres {np.linalg.norm(gap):.0f} mm apart); header origins are probably "
            "wrong. Started from the centres of mass."
        )
    # The smaller content gives the samples: a brain lies somewhere in a head, but a head nowhere in a brain.
    one, other, near = (b, a, -gap) if b.radius < a.radius else (a, b, gap)
    header = np.column_stack([np.eye(3), near / one.radius])
    starts = _searched() if search else _nearby(header[:, 3] if shared >= APART else None)
    matrices = np.stack([matrix for _, matrix in starts])
    placed, winner, before, after = _run(one, other, header, matrices)
    if search:
        *_, mirrored = _run(one, other, header, matrices * np.array([-1.0, 1, 1, 1]))
        if mirrored.nmi > after.nmi + 0.01:
            warnings.append(
                f"a mirror image is more alike (NMI {mirrored.nmi:.3f} instead of {after.nmi:.3f}); left and right may "
                "be exchanged in one of the headers. No image was mirrored."
            )
    between = np.linalg.inv(placed) if one is b else placed
    linear, offset = between[:3, :3], between[:3, 3]
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = apply_affine(moving.affine, b.centre) + offset - linear @ apply_affine(fixed.affine, a.centre)
    overlap = _landed(a, b, linear, offset)
    warnings += _doubts(after, linear, overlap)
    return Alignment(matrix, before, after, overlap, starts[winner][0], tuple(warnings))


def _run(
    one: Content, other: Content, header: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, int, Similarity, Similarity]:
    """The best transform (4, 4) from one centre to the other, in mm, its start and the similarities."""
    unit = one.radius
    placed, winner, before, after = jax.device_get(
        program()(
            one.grids,
            other.grids,
            one.rims(),
            np.float32(one.foreground),
            np.float32(one.box(unit)[:3]),
            np.float32(np.linalg.inv(other.box(unit))[:3]),
            np.float32(header),
            np.float32(starts),
        )
    )
    matrix = np.vstack([np.float64(placed), np.eye(4)[3:]])
    matrix[:3, 3] *= unit
    return matrix, int(winner), Similarity(*map(float, before)), Similarity(*map(float, after))


def _doubts(similarity: Similarity, linear: np.ndarray, overlap: float) -> list[str]:
    found = []
    if similarity.correlation < POOR:
        found.append(
            f"the images are little alike after affine alignment (correlation {similarity.correlation:.2f}, NMI "
            f"{similarity.nmi:.3f}; brains that match have {POOR:g} and more); look at the result."
        )
    scales = np.linalg.svd(linear, compute_uv=False)
    if scales[0] > SCALES[1] or scales[-1] < SCALES[0]:
        found.append(
            f"the alignment scales lengths by {scales[-1]:.2f} to {scales[0]:.2f}, more than brains differ; look at it."
        )
    if overlap < OVERLAP:
        found.append(
            f"only {overlap:.0%} of the fixed image's foreground lies in the moving image's field of view after "
            "alignment."
        )
    return found


def _landed(a: Content, b: Content, linear: np.ndarray, offset: np.ndarray) -> float:
    """The share of a's foreground that lies in b's field of view under x -> linear · x + offset, in mm between
    the centres."""
    n = len(a.foreground)
    voxels = a.low + (np.argwhere(a.foreground) + 0.5) / n * (a.high - a.low)
    world = (voxels - a.centre) @ (linear @ a.linear).T + offset
    place = world @ np.linalg.inv(b.linear).T + b.centre
    inside = (place >= -0.5) & (place <= np.array(b.shape) - 0.5)
    return float(inside.all(1).mean())


# --- Starts: where a fixed point, in radii around the fixed centre, lies around the moving one ---


def _nearby(gap: np.ndarray | None) -> list[tuple[str, np.ndarray]]:
    """The headers' own place, where it is known, the centres of mass, and turns around both."""
    axes = [axis for axis in itertools.product((-1, 0, 1), repeat=3) if np.abs(axis).sum() in (1, 3)]
    turns = [(0, (1, 0, 0)), *((30, axis) for axis in axes), (60, (1, 0, 0)), (-60, (1, 0, 0))]
    starts = []
    places = [("centres of mass", np.zeros(3)), *([] if gap is None else [("headers", gap)])]
    for name, place in places:
        for angle, axis in turns:
            turn = Rotation.from_rotvec(np.deg2rad(angle) * np.array(axis) / np.linalg.norm(axis)).as_matrix()
            told = f"{name}, {angle}° around {axis}" if angle else name
            starts.append((told, np.column_stack([turn, place])))
    return (starts * 2)[:STARTS]


def _searched() -> list[tuple[str, np.ndarray]]:
    """The rotations that carry axes to axes."""
    starts = []
    for turn in np.rint(Rotation.create_group("O").as_matrix()):
        to = " ".join("IPL.RAS"[3 + int(column @ (1, 2, 3))] for column in turn.T)
        starts.append((f"centres of mass, R A S to {to}", np.column_stack([turn, np.zeros(3)])))
    return starts


# --- The program ---


@functools.cache
def program() -> Any:
    # Small steps in loops: what the CPU's compiler does beyond this takes as long as an alignment and saves nothing.
    little = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(_aligned, compiler_options=little if jax.default_backend() == "cpu" else None)


def _aligned(
    fixed: tuple[Array, ...],
    moving: tuple[Array, ...],
    rims: tuple[Array, ...],
    foreground: Float[Array, "n n n"],
    fixed_box: Float[Array, "3 4"],
    moving_box: Float[Array, "3 4"],
    header: Float[Array, "3 4"],
    starts: Float[Array, "s 3 4"],
) -> tuple[Float[Array, "3 4"], Array, Float[Array, "2"], Float[Array, "2"]]:
    """The best transform, which start it came from, and NMI and correlation where the headers put it and at the end."""
    coarse, fine = (_likeness(*images, fixed_box, moving_box) for images in zip(fixed, moving, strict=True))
    inner, rim = (x[::2, ::2, ::2].ravel() for x in rims)
    none, rigid, free = jnp.zeros((len(starts), 12)), np.repeat([1.0, 0.0], 6), np.ones(12)
    found = _descended(lambda x: coarse(_placed(x, starts), inner)[0], none, _rates((COARSE, rigid)))
    placed = _placed(found, starts)
    winner = jnp.argmax(coarse(placed, inner)[0])
    best = placed[winner][None]
    # What the moving image alone shows around the foreground, a head around a brain, does not count.
    moved = fine(best, rim)[1][0]
    mean = lambda weight: (weight * moved).sum() / jnp.maximum(weight.sum(), 1)
    beyond = mean(1 - rim) / jnp.maximum(mean(rim), 1e-6)
    weights = 1 - (1 - rim) * jnp.clip((beyond - BEYOND[0]) / (BEYOND[1] - BEYOND[0]), 0, 1)
    found = _descended(lambda x: fine(_placed(x, best), weights)[0], none[:1], _rates((RIGID, rigid), (AFFINE, free)))
    best = _placed(found, best)
    nmi, moved = fine(jnp.concatenate([header[None], best]), weights)
    weight, still = (x[::2, ::2, ::2].ravel() for x in (foreground, fixed[-1]))
    scores = jnp.stack([nmi, jax.vmap(lambda x: _correlation(still, x, weight))(moved)], axis=1)
    return best[0], winner, scores[0], scores[1]


def _likeness(fixed: Array, moving: Array, fixed_box: Array, moving_box: Array) -> Any:
    """A function of transforms (s, 3, 4) and weights (n): the NMI of each transform, and the moved samples (s, n)."""
    n = len(fixed)
    unit = (jnp.arange(0, n, 2, dtype=jnp.float32) + 0.5) / n
    points = jnp.stack([*jnp.meshgrid(unit, unit, unit, indexing="ij"), jnp.ones([n // 2] * 3)], -1).reshape(-1, 4)
    points = _product(points, fixed_box.T)
    samples = fixed[::2, ::2, ::2].ravel()

    def likeness(transforms, weights):
        linear = _product(moving_box[:, :3], transforms)
        linear = linear.at[:, :, 3].add(moving_box[:, 3])
        places = _product(points, linear[:, :, :3].swapaxes(1, 2)) + linear[:, None, :, 3]
        places = jnp.clip(places * n - 0.5, 0, n - 1)[None, :, :, None]
        moved = sampling.trilinear(moving[None, ..., None], places, jnp.full(3, n - 1.0))[0, ..., 0, 0]
        return jax.vmap(lambda x: information.nmi(samples, x, weights=weights))(moved), moved

    return likeness


def _placed(parameters: Float[Array, "s 12"], starts: Float[Array, "s 3 4"]) -> Float[Array, "s 3 4"]:
    """The starts changed by a rotation vector, a shift in radii, and a stretch: the six of a symmetric matrix."""
    x, y, z = parameters[:, :3].T
    zero = jnp.zeros_like(x)
    cross = jnp.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(-1, 3, 3)
    angle = jnp.sqrt(x * x + y * y + z * z + 1e-12)[:, None, None]
    turn = jnp.eye(3) + jnp.sin(angle) / angle * cross + (1 - jnp.cos(angle)) / angle**2 * _product(cross, cross)
    a, b, c, d, e, f = parameters[:, 6:].T
    stretch = jnp.stack([a, d, e, d, b, f, e, f, c], -1).reshape(-1, 3, 3)
    stretch = jnp.eye(3) + stretch + _product(stretch, stretch) / 2  # positive, whatever the parameters
    linear = _product(starts[:, :, :3], _product(turn, stretch))
    return jnp.concatenate([linear, starts[:, :, 3:] + parameters[:, 3:6, None]], axis=2)


def _descended(likeness: Any, parameters: Float[Array, "s 12"], rates: Float[Array, "k 12"]) -> Float[Array, "s 12"]:
    """The parameters after steps of Adam (Kingma & Ba, ICLR 2015) up the likeness, each of its own rate."""
    slope = jax.grad(lambda x: likeness(x).sum())

    def step(number, carried):
        x, mean, square = carried
        gradient = slope(x)
        mean, square = 0.8 * mean + 0.2 * gradient, 0.95 * square + 0.05 * gradient**2
        count = number + 1.0
        ahead = (mean / (1 - 0.8**count)) / (jnp.sqrt(square / (1 - 0.95**count)) + 1e-6)
        return x + rates[number] * ahead, mean, square

    return lax.fori_loop(0, len(rates), step, (parameters, 0 * parameters, 0 * parameters))[0]


def _rates(*stages: tuple[tuple[int, float], np.ndarray]) -> Float[Array, "k 12"]:
    """The step of each parameter at each time, which falls to a twentieth over each stage."""
    falling = lambda steps, rate: rate * 0.05 ** (np.arange(steps) / steps)
    return jnp.asarray(np.concatenate([np.outer(falling(*stage), free) for stage, free in stages]), jnp.float32)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _correlation(a: Float[Array, " n"], b: Float[Array, " n"], weight: Float[Array, " n"]) -> Float[Array, ""]:
    weight = weight / weight.sum()
    a, b = (x - (weight * x).sum() for x in (a, b))
    spread = jnp.sqrt((weight * a * a).sum() * (weight * b * b).sum())
    return (weight * a * b).sum() / jnp.where(spread == 0, 1.0, spread)
