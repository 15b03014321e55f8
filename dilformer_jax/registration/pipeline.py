"""From two volumes, wherever they lie, to their registration: align, bring to one grid, predict or optimise, invert,
warp once, measure."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Float64, Int32, Real

from dilformer_jax.io.geometry import apply_affine, spacing
from dilformer_jax.io.transforms import Field, Step, carried
from dilformer_jax.io.volumes import Volume, check_same_grid
from dilformer_jax.ops import folding, spatial, surfaces
from dilformer_jax.ops.overlap import dice, mean_present
from dilformer_jax.registration import grids, refine
from dilformer_jax.registration.affine import Alignment, align
from dilformer_jax.registration.grids import Grid
from dilformer_jax.registration.predictor import Predictor
from dilformer_jax.registration.refine import Refinement
from dilformer_jax.registration.warps import background, masked, warped

Image = Float32[np.ndarray, "_ _ _"]
Labels = Int32[np.ndarray, "_ _ _"]
Mask = Bool[np.ndarray, "_ _ _"]
Displacement = Float32[np.ndarray, "_ _ _ 3"]
Matrix = Real[np.ndarray, "4 4"]
AFFINES = ("auto", "search", "none")
INVERSE_ITERATIONS = 30
INVERSE_TOLERANCE = 1e-3  # voxels
PROBED = 50_000  # points, to measure an inverse by
UNREFINED = "the images show two contrasts; the network's displacement is left as it is, and not refined."
UNCONVERGED = 0.1  # voxels: an inverse that is farther off is none


@dataclass(frozen=True, eq=False)
class Registration:
    """What `register` found, moved(x) = moving(T(x)), T being `affine` after the deformation.

    `displacement` and `inverse` (D, H, W, 3) are the deformation and its inverse, in voxels of `grid`; `affine` takes
    the fixed image's RAS mm to the moving image's, and `alignment` says how it was found; `refinement`,
    with the similarity that was taken, is None where nothing was refined. `images` are what was registered, on `grid`:
    fixed, moving (by the headers alone), aligned (by the affine) and moved. `moved` and `moved_labels` lie on the fixed
    image's own grid.

    Metrics: `folding_percent` and `sdlogj` of the deformation on its grid, as in ops/folding; `displacement_mean_mm`
    and `_p95_mm`; `inverse_mean_mm`, `_p99_mm` and `_max_mm`, how far from its start a point of what the fixed image
    shows comes back, at points between voxels, and `inverse_unconverged_percent` of the voxels, where u(x + v(x)) +
    v(x) is over a tenth of a voxel; `correlation_before`, `_affine` and `correlation`, Pearson's on the grid; with both
    label maps `dice_before` (by the headers alone), `dice_affine` and `dice`, means over the structures of both, and
    `dice_per_label`, `hd95_before` ... alike in mm where asked for; `outside_grid_percent` of what the fixed image
    shows; `affine_overlap`; `seconds` of each step.
    """

    fixed: Volume
    moving: Volume
    affine: Matrix
    alignment: Alignment | None
    refinement: Refinement | None
    grid: Grid
    images: Mapping[str, Image]
    displacement: Displacement
    inverse: Displacement
    moved: Image
    moved_labels: Labels | None
    metrics: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def transform(self) -> tuple[Step, ...]:
        """Points of the fixed image, RAS mm, to points of the moving image."""
        return (self._field(self.displacement), np.asarray(self.affine, float))

    @property
    def inverse_transform(self) -> tuple[Step, ...]:
        """Points of the moving image, RAS mm, to points of the fixed image."""
        return (np.linalg.inv(self.affine), self._field(self.inverse))

    def _field(self, u: np.ndarray) -> Field:
        return Field(u @ self.grid.affine[:3, :3].T.astype(np.float32), self.grid.affine)


def register(
    fixed: Volume,
    moving: Volume,
    predictor: Predictor | None,
    fixed_labels: Volume | None = None,
    moving_labels: Volume | None = None,
    refinement: Refinement | None = None,
    *,
    affine: str | Matrix = "auto",
    fixed_mask: Mask | None = None,
    moving_mask: Mask | None = None,
    distances: bool = False,
) -> Registration:
    """Registers two images by a network, by refinement, or by one after the other; see `Registration`.

    affine: 'auto', 'search' among the 24 turns of the moving image (where headers are not to be trusted), 'none', or a
    matrix, fixed RAS mm to moving RAS mm. Masks, on their images' grids, hide all else from the registration; what is
    warped is the whole image. With `distances` HD95 is measured too.

    Raises BadInput where an image is too small or cannot be what the network was trained on, and ValueError where there
    is neither network nor refinement.
    """
    if predictor is None and refinement is None:
        raise ValueError("register needs a predictor, a refinement, or both")
    check_labels(fixed, moving, fixed_labels, moving_labels)
    seconds: dict[str, float] = {}
    seen, seen_moving = masked(fixed, fixed_mask), masked(moving, moving_mask)
    declared = None if predictor is None else predictor.grid
    warnings = [] if declared is None else _checked(seen, seen_moving, declared)

    with _clock(seconds, "affine"):
        alignment = None
        if isinstance(affine, str):
            if affine not in AFFINES:
                raise ValueError(f"an affine is {', '.join(AFFINES)} or a matrix, not {affine!r}")
            alignment = None if affine == "none" else align(seen, seen_moving, search=affine == "search")
            matrix = np.eye(4) if alignment is None else alignment.matrix
            warnings += [] if alignment is None else list(alignment.warnings)
        else:
            matrix = np.asarray(affine, float)
    with _clock(seconds, "resampling"):
        if declared is not None:
            grid = grids.model_grid(seen, declared)
        elif predictor is not None:
            grid = Grid(fixed.array.shape, fixed.affine, np.eye(4))  # such weights say nothing of their grid
        else:
            grid = grids.content_grid(seen, seen_moving, matrix)
        still, other = grids.on_grid(seen, grid, np.eye(4)), grids.on_grid(seen_moving, grid, matrix)
    names = fixed.path, moving.path
    with _clock(seconds, "compilation"):
        if predictor is not None:
            predictor.compile(grid.shape, fixed.path, refinement is None and predictor.knows_inverse)
        if refinement is not None:
            refine.check_shape(grid.shape, fixed.path)
    with _clock(seconds, "displacement"):
        u, v = None, None
        if predictor is not None and refinement is None:
            u, v = predictor.both_ways(still, other, names)
        elif predictor is not None:
            u = predictor.displacement(still, other, names)
    if refinement is not None:
        with _clock(seconds, "refinement compilation"):
            refinement = refine.choose_similarity(refinement, still, other, names, u)
            if refinement is not None:
                refine.compiled(grid.shape, refinement, u is not None)
            else:
                warnings.append(UNREFINED)
        with _clock(seconds, "refinement"):
            if refinement is not None:
                u = refine.refine(still, other, refinement, u, names, spacing(grid.affine))
    assert u is not None
    with _clock(seconds, "inverse"):
        v = np.asarray(_inverse(u, v))
        residual, inside = (np.asarray(x) for x in _residual(u, v))
    images = {"fixed": still, "aligned": other, "moved": warp_image(other, u)}
    images["moving"] = grids.on_grid(seen_moving, grid, np.eye(4))
    found = Registration(fixed, moving, matrix, alignment, refinement, grid, images, u, v, still, None, {}, ())
    place = fixed.array.shape, fixed.affine
    with _clock(seconds, "warps"):
        moved = warped(moving, found.transform, *place, outside=background(moving))
        moved_labels = None if moving_labels is None else warped(moving_labels, found.transform, *place, "nearest")

    length = np.linalg.norm(found._field(u).displacement, axis=-1)
    error = _inverse_error(found)
    wrong = np.linalg.norm(residual[inside] if inside.any() else residual, axis=-1)
    figures: dict[str, Any] = {
        **deformation(u),
        "displacement_mean_mm": float(length.mean()),
        "displacement_p95_mm": float(np.percentile(length, 95)),
        "inverse_mean_mm": float(error.mean()),
        "inverse_p99_mm": float(np.percentile(error, 99)),
        "inverse_max_mm": float(error.max()),
        "inverse_unconverged_percent": 100 * float((wrong > UNCONVERGED).mean()),
        "correlation_before": _correlation(still, images["moving"]),
        "correlation_affine": _correlation(still, other),
        "correlation": _correlation(still, images["moved"]),
        "outside_grid_percent": grids.outside_percent(seen, grid),
    }
    if alignment is not None:
        figures["affine_overlap"] = float(alignment.overlap)
    if fixed_labels is not None and moving_labels is not None and moved_labels is not None:
        figures |= _overlaps(fixed_labels, moving_labels, moved_labels, matrix, distances)
    figures["seconds"] = seconds
    return replace(
        found, moved=moved, moved_labels=moved_labels, metrics=figures, warnings=tuple([*warnings, *_said(figures)])
    )


def check_labels(fixed: Volume, moving: Volume, fixed_labels: Volume | None, moving_labels: Volume | None) -> None:
    """Raises BadInput unless each label map lies on its image's grid."""
    for image, labels in ((fixed, fixed_labels), (moving, moving_labels)):
        if labels is not None:
            check_same_grid(image, labels)


def deformation(u: Displacement) -> dict[str, float]:
    """`folding_percent` and `sdlogj` of a displacement; sdlogj is NaN where its crop leaves nothing."""
    determinant = folding.jacobian_determinant(u)
    return {
        "folding_percent": folding.folding_percent(u, determinant=determinant),
        "sdlogj": folding.sdlogj(u, determinant=determinant) if min(u.shape[:3]) > 4 else float("nan"),
    }


def warp_image(image: Image, u: Displacement) -> Image:
    """The image at x + u(x), trilinear, continued by its border value."""
    return np.asarray(_warp(image[..., None], u, order=1, padding="border")[..., 0])


def warp_labels(labels: Labels, u: Displacement, kind: str = "nearest") -> Labels:
    """The label of the voxel nearest to x + u(x), or by kind 'one-hot' as in `spatial.warp_one_hot`; 0 outside."""
    if kind == "one-hot":
        return np.asarray(_warp_one_hot(labels, u))
    return np.asarray(_warp(labels[..., None], u, order=0, padding="zeros")[..., 0])


_warp_one_hot = jax.jit(spatial.warp_one_hot)
_warp = jax.jit(spatial.warp, static_argnames=("order", "padding"))


def _checked(fixed: Volume, moving: Volume, declared: Mapping[str, Any]) -> list[str]:
    """Warnings of images unlike those that a network was trained on; BadInput where they cannot be."""
    warnings = []
    for volume in (fixed, moving):
        grids.check_size(volume, declared)
        if grids.is_head(volume):
            warnings.append(
                f"{volume.path} seems to show a whole head, and the weights know stripped brains; give a brain mask "
                "(--fixed-mask, --moving-mask) or do without a network (--weights none), or the result may be poor."
            )
    return warnings


def _said(figures: dict[str, Any]) -> Iterator[str]:
    if figures["outside_grid_percent"] > 1:
        yield (
            f"{figures['outside_grid_percent']:.0f} % of what the fixed image shows is outside the grid of the weights "
            "and takes the displacement of the grid's border."
        )
    if figures["inverse_unconverged_percent"] > 0.1:
        yield (
            f"no inverse of the deformation was found at {figures['inverse_unconverged_percent']:.2g} % of the voxels, "
            "where it folds or stretches too much."
        )


def _overlaps(fixed: Volume, moving: Volume, moved: Labels, affine: Matrix, distances: bool) -> dict[str, Any]:
    """Dice, and HD95 where asked for, before, after the affine map, and after all."""
    ids = [int(i) for i in np.intersect1d(fixed.array, moving.array) if i != 0]
    found: dict[str, Any] = {}
    if not ids:
        return {"dice_before": float("nan"), "dice_affine": float("nan"), "dice": float("nan"), "dice_per_label": {}}
    maps = {
        "_before": warped(moving, (), fixed.array.shape, fixed.affine, "nearest"),
        "_affine": warped(moving, (affine,), fixed.array.shape, fixed.affine, "nearest"),
        "": moved,
    }
    for stage, labels in maps.items():
        scores = {"dice": dice(fixed.array, labels, ids, moving.array)}
        if distances:
            scores |= surfaces.surface_scores(
                fixed.array, labels, ids, spacing(fixed.affine), moving.array, only=("hd95",)
            )
        for name, values in scores.items():
            found[f"{name}{stage}"] = mean_present(values)
            found[f"{name}{stage}_per_label"] = dict(zip(ids, values.tolist(), strict=True))
    return found


@jax.jit
def _inverse(u: Float[Array, "D H W 3"], start: Float[Array, "D H W 3"] | None = None) -> Float[Array, "D H W 3"]:
    """v with u(x + v(x)) + v(x) = 0, by the fixed-point iteration v <- -u(x + v(x)) (Chen et al., Med Phys 2008), and
    in the end by half its steps, which converge wherever the deformation neither folds nor stretches fourfold.

    From a `start`, such as what integrating a velocity backwards gives, by half steps alone, which take away what
    interpolation has added to it; where they do not come nearer, the start remains.
    """
    whole = INVERSE_ITERATIONS // 3 if start is None else 0
    first = -u if start is None else start

    def going(state):
        step, _, change = state
        return (step < INVERSE_ITERATIONS) & (change > INVERSE_TOLERANCE)

    def better(state):
        step, v, _ = state
        change = -spatial.warp(u, v) - v
        return step + 1, v + jnp.where(step < whole, 1.0, 0.5) * change, jnp.abs(change).max()

    v = lax.while_loop(going, better, (0, first, jnp.float32(jnp.inf)))[1]
    if start is None:
        return v
    off = lambda v: jnp.square(spatial.compose(u, v)).sum(-1, keepdims=True)
    return jnp.where(off(v) < off(start), v, start)


@jax.jit
def _residual(u, v):
    """u(x + v(x)) + v(x), and whether x + v(x) lies in the volume."""
    shape = u.shape[:3]
    points = spatial.grid(shape) + v
    return spatial.compose(u, v), ((points >= 0) & (points <= jnp.array(shape) - 1)).all(-1)


def _inverse_error(found: Registration) -> Float64[np.ndarray, " n"]:
    """How far in mm from its start each of up to `PROBED` points of what the fixed image shows comes back."""
    rng = np.random.default_rng(0)
    shown = np.argwhere(grids.content(found.images["fixed"]))
    shown = shown[rng.choice(len(shown), min(PROBED, len(shown)), replace=False)]
    start = apply_affine(found.grid.affine, shown + rng.uniform(-0.5, 0.5, shown.shape))
    back = carried(carried(start, found.transform), found.inverse_transform)
    return np.linalg.norm(back - start, axis=1)


@contextmanager
def _clock(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = (x.astype(np.float64) - x.mean(dtype=np.float64) for x in (a, b))
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale > 0 else float("nan")
