"""From two volumes to their registration: preprocess, predict, bring to full resolution, warp, invert, measure."""

import functools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from dilformer_jax import models
from dilformer_jax.data.preprocessing import by, corner, prepared, resolved
from dilformer_jax.io.geometry import spacing
from dilformer_jax.io.volumes import BadInput, Volume, check_same_grid
from dilformer_jax.models import bundle
from dilformer_jax.ops import metrics, spatial
from dilformer_jax.registration import refine
from dilformer_jax.registration.refine import Refinement

Image = Float32[np.ndarray, "_ _ _"]
Labels = Int32[np.ndarray, "_ _ _"]
Displacement = Float32[np.ndarray, "_ _ _ 3"]
INVERSE_ITERATIONS = 30
INVERSE_TOLERANCE = 1e-3  # voxels
SMALLEST = 2  # voxels along each axis at the deepest level of a network


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained network and all that it needs to register volumes as they come out of their files.

    `module` is a network of `models/`, `params` its parameters. `preprocessing` is what it was trained with,
    `sha256` that of its parameters as a bundle has them, and `grid`, where known, the grid of its training images:
    {"shape", "spacing_mm", "orientation"}.
    """

    module: Any
    params: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    name: str
    sha256: str
    grid: Mapping[str, Any] | None = None
    executables: dict[tuple[int, ...], Any] = field(default_factory=dict, repr=False)

    def displacement(self, fixed: Image, moving: Image, names: tuple[Any, Any] = ("fixed", "moving")) -> Displacement:
        """The displacement, in voxels, on the whole grid that both images share; intensities are as in their files.

        Compiles once for each shape. Raises BadInput, saying which of `names` it is, for an image that is too small or
        whose intensities cannot be scaled, and ValueError for two shapes.
        """
        if fixed.shape != moving.shape:
            raise ValueError(f"fixed is {fixed.shape} and moving {moving.shape}; both lie on one grid")
        self.compile(fixed.shape, names[0])
        settings = resolved(self.preprocessing)
        images = [
            prepared(image, settings, name, multiple=self.module.downsampling)[None]
            for image, name in zip((fixed, moving), names, strict=True)
        ]
        u = np.asarray(self.executables[fixed.shape](self.params, *images))
        # From the box that was cut out of each image back to the files' grid, continued by its border value.
        box = settings["crop_to"] or fixed.shape
        start, moving_start = corner(fixed, settings["crop_to"]), corner(moving, settings["crop_to"])
        index = [
            np.clip(np.arange(size) - first, 0, wanted - 1)
            for size, first, wanted in zip(fixed.shape, start, box, strict=True)
        ]
        return u[np.ix_(*index)] + np.subtract(moving_start, start, dtype=np.float32)

    def compile(self, shape: tuple[int, ...], name: Any = "The volume") -> None:
        """Compiles for volumes of this shape, where that has not happened. Raises BadInput as `check_shape` does."""
        self.check_shape(shape, name)
        if shape in self.executables:
            return
        settings = resolved(self.preprocessing)
        step = self.module.downsampling * settings["downsample"]
        d, h, w = (-(-size // step) * step for size in settings["crop_to"] or shape)

        def predict(params, fixed, moving):
            finest = self.module.apply({"params": params}, fixed, moving)[0][0]
            return spatial.resize_displacement(finest.astype(jnp.float32), (d, h, w))

        factor = settings["downsample"]
        image = jax.ShapeDtypeStruct((1, d // factor, h // factor, w // factor, 1), jnp.float32)
        self.executables[shape] = jax.jit(predict).lower(self.params, image, image).compile()

    def check_shape(self, shape: tuple[int, ...], name: Any) -> None:
        """Raises BadInput, about `name`, where the network's deepest level would have an axis of a single voxel."""
        settings = resolved(self.preprocessing)
        step = self.module.downsampling * settings["downsample"]
        if min(settings["crop_to"] or shape) <= (SMALLEST - 1) * step:
            raise BadInput(
                f"{name} is {by(shape)}, too small for {self.name}, which needs {(SMALLEST - 1) * step + 1} voxels or "
                "more along each axis; resample it to smaller voxels or pad it."
            )


@dataclass(frozen=True, eq=False)
class Registration:
    """What `register` found, on the fixed grid; displacements in voxels, with moved(x) = moving(x + displacement(x)).

    `inverse` maps the other way: fixed(x + inverse(x)) looks like moving(x). Metrics: `folding_percent` and `sdlogj` as
    in ops/metrics; `displacement_mean_mm` and `_p95_mm`; `inverse_mean_mm`, `_p99_mm` and `_max_mm`, how far
    u(x + v(x)) + v(x) is from 0 where x + v(x) lies in the volume; `correlation_before` and `correlation`, Pearson's of
    the two images; with both label maps `dice_before` and `dice`, means over the structures of both, and
    `dice_per_label`; `seconds` of each step.
    """

    displacement: Displacement
    inverse: Displacement
    moved: Image
    moved_labels: Labels | None
    metrics: dict[str, Any]


def load_predictor(weights: Path | str | None = None, workdir: Path | str | None = None) -> Predictor:
    """The network of a bundle, or that of a training run at its best checkpoint.

    Raises BadInput where there is none, or one that this version does not know; ValueError unless just one is given.
    """
    if (weights is None) == (workdir is None):
        raise ValueError("load_predictor takes either weights or a workdir")
    if weights is not None:
        params, description = bundle.load(weights)
        network, preprocessing, name = description["network"], description["preprocessing"], str(weights)
        sha256, grid = description["sha256"], description["grid"]
    else:
        assert workdir is not None
        config = read_config(workdir)
        from dilformer_jax.training import checkpoint  # Orbax is slow to import, and a bundle needs none of it

        params, _ = checkpoint.restore_params(Path(workdir), "best")
        network, preprocessing, name = config["model"], config["data"]["preprocessing"], str(workdir)
        sha256, grid = bundle.sha256(params), _grid(workdir)
    try:
        module, preprocessing = models.create(network["name"], **network["options"]), resolved(preprocessing)
    except (KeyError, TypeError, ValueError) as fault:
        raise BadInput(
            f"{name} has a network {network} with preprocessing {preprocessing} that this version cannot make "
            f"({fault}); update it, or export the network again."
        ) from fault
    return Predictor(module, jax.device_put(params), preprocessing, name, sha256, grid)


def read_config(workdir: Path | str) -> dict[str, Any]:
    """The configuration that `train` left in a workdir. Raises BadInput where there is none."""
    path = Path(workdir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise BadInput(f"{path} cannot be read ({fault}); give the workdir of a training run.") from fault
    if not isinstance(config, dict) or not {"model", "data"} <= set(config):
        raise BadInput(f"{path} is no configuration of a training run; give the workdir of one.")
    config["data"]["options"] = keywords(config["data"]["options"])
    return config


def _grid(workdir: Path | str) -> dict[str, Any] | None:
    """The grid of the training images as `train` left it; None where run.json is gone, for it only serves to warn."""
    try:
        return json.loads((Path(workdir) / "run.json").read_text(encoding="utf-8"))["grid"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keywords(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a function takes them, read from JSON, which has lists in place of tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def register(
    fixed: Volume,
    moving: Volume,
    predictor: Predictor | None,
    fixed_labels: Volume | None = None,
    moving_labels: Volume | None = None,
    refinement: Refinement | None = None,
) -> Registration:
    """Registers two images of one grid, by a network, by refinement, or by one after the other; see `Registration`.

    Raises BadInput where grids differ or are too small, and ValueError where there is neither.
    """
    if predictor is None and refinement is None:
        raise ValueError("register needs a predictor, a refinement, or both")
    check_pair(fixed, moving, fixed_labels, moving_labels)
    names = fixed.path, moving.path
    clock = [time.perf_counter()]
    u = None if predictor is None else predictor.displacement(fixed.array, moving.array, names)
    if refinement is not None:
        u = refine.refine(fixed.array, moving.array, refinement, u, names, spacing(fixed.affine))
    assert u is not None
    clock.append(time.perf_counter())
    moved = warp_image(moving.array, u)
    moved_labels = None if moving_labels is None else warp_labels(moving_labels.array, u)
    clock.append(time.perf_counter())
    inverse = np.asarray(_inverse(u))
    residual, inside = (np.asarray(x) for x in _residual(u, inverse))
    clock.append(time.perf_counter())

    length = _millimetres(u, fixed.affine)
    error = _millimetres(residual[inside] if inside.any() else residual.reshape(-1, 3), fixed.affine)
    found: dict[str, Any] = {
        **deformation(u),
        "displacement_mean_mm": float(length.mean()),
        "displacement_p95_mm": float(np.percentile(length, 95)),
        "inverse_mean_mm": float(error.mean()),
        "inverse_p99_mm": float(np.percentile(error, 99)),
        "inverse_max_mm": float(error.max()),
        "correlation_before": _correlation(fixed.array, moving.array),
        "correlation": _correlation(fixed.array, moved),
    }
    if fixed_labels is not None and moving_labels is not None and moved_labels is not None:
        ids = [int(i) for i in np.intersect1d(fixed_labels.array, moving_labels.array) if i != 0]
        before = metrics.dice(fixed_labels.array, moving_labels.array, ids)
        after = metrics.dice(fixed_labels.array, moved_labels, ids, moving_labels.array)
        found["dice_before"] = float(before.mean()) if ids else float("nan")
        found["dice"] = float(after.mean()) if ids else float("nan")
        found["dice_per_label"] = dict(zip(ids, after.tolist(), strict=True))
    steps = zip(("displacement", "warps", "inverse"), np.diff(clock).tolist(), strict=True)
    return Registration(u, inverse, moved, moved_labels, {**found, "seconds": dict(steps)})


def check_pair(
    fixed: Volume, moving: Volume, fixed_labels: Volume | None = None, moving_labels: Volume | None = None
) -> None:
    """Raises BadInput unless all of them lie on one grid."""
    check_same_grid(fixed, moving)
    for image, labels in ((fixed, fixed_labels), (moving, moving_labels)):
        if labels is not None:
            check_same_grid(image, labels)


def deformation(u: Displacement) -> dict[str, float]:
    """`folding_percent` and `sdlogj` of a displacement; sdlogj is NaN where its crop leaves nothing."""
    determinant = metrics.jacobian_determinant(u)
    return {
        "folding_percent": metrics.folding_percent(u, determinant=determinant),
        "sdlogj": metrics.sdlogj(u, determinant=determinant) if min(u.shape[:3]) > 4 else float("nan"),
    }


def identity(fixed: Image, moving: Image) -> Displacement:
    """The displacement of doing nothing: what every method is compared with."""
    return np.zeros((*fixed.shape, 3), np.float32)


def warp_image(image: Image, u: Displacement) -> Image:
    """The image at x + u(x), trilinear, continued by its border value."""
    return np.asarray(_warp(image[..., None], u, order=1, padding="border")[..., 0])


def warp_labels(labels: Labels, u: Displacement) -> Labels:
    """The label of the voxel nearest to x + u(x), 0 outside the volume."""
    return np.asarray(_warp(labels[..., None], u, order=0, padding="zeros")[..., 0])


_warp = jax.jit(spatial.warp, static_argnames=("order", "padding"))


@functools.partial(jax.jit, static_argnames="iterations")
def _inverse(u: Float[Array, "D H W 3"], iterations: int = INVERSE_ITERATIONS) -> Float[Array, "D H W 3"]:
    """v with u(x + v(x)) + v(x) = 0, by the fixed-point iteration v <- -u(x + v(x)) (Chen et al., Med Phys 2008)."""

    def going(state):
        step, _, change = state
        return (step < iterations) & (change > INVERSE_TOLERANCE)

    def better(state):
        step, v, _ = state
        new = -spatial.warp(u, v)
        return step + 1, new, jnp.abs(new - v).max()

    return lax.while_loop(going, better, (0, -u, jnp.float32(jnp.inf)))[1]


@jax.jit
def _residual(u, v):
    """u(x + v(x)) + v(x), and whether x + v(x) lies in the volume."""
    shape = u.shape[:3]
    points = spatial.grid(shape) + v
    return spatial.compose(u, v), ((points >= 0) & (points <= jnp.array(shape) - 1)).all(-1)


def _millimetres(u: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return np.linalg.norm(u @ affine[:3, :3].T.astype(np.float32), axis=-1)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = (x.astype(np.float64) - x.mean(dtype=np.float64) for x in (a, b))
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale > 0 else float("nan")
