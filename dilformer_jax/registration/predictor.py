"""A trained network with all that it needs to register volumes as they come out of their files."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from dilformer_jax import models
from dilformer_jax.data.preprocessing import by, corner, prepared, resolved
from dilformer_jax.io import bundle
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.ops import spatial

Image = Float32[np.ndarray, "_ _ _"]
Displacement = Float32[np.ndarray, "_ _ _ 3"]
SMALLEST = 2  # voxels along each axis at the deepest level of a network
AFTER_DEFAULT = "default"  # the preset of refinement that follows the network that ships


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained network and all that it needs to register volumes as they come out of their files.

    `module` is a network of `models/`, `params` its parameters. `preprocessing` is what it was trained with,
    `sha256` that of its parameters as a bundle has them, and `grid`, where known, the grid of its training images:
    {"shape", "spacing_mm", "orientation"}. A network that can be told one is asked for this `smoothness`, 1 being the
    weight of the regulariser in its training.
    """

    module: Any
    params: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    name: str
    sha256: str
    grid: Mapping[str, Any] | None = None
    smoothness: float = 1.0
    executables: dict[tuple[tuple[int, ...], bool], Any] = field(default_factory=dict, repr=False)

    def displacement(self, fixed: Image, moving: Image, names: tuple[Any, Any] = ("fixed", "moving")) -> Displacement:
        """The displacement, in voxels, on the whole grid that both images share; intensities are as in their files.

        Compiles once for each shape. Raises BadInput, saying which of `names` it is, for an image that is too small or
        whose intensities cannot be scaled, and ValueError for two shapes.
        """
        return self._predicted(fixed, moving, names, False)[0]

    def both_ways(
        self, fixed: Image, moving: Image, names: tuple[Any, Any] = ("fixed", "moving")
    ) -> tuple[Displacement, Displacement | None]:
        """The displacement, and its inverse where the network is diffeomorphic and knows it; as `displacement`."""
        found = self._predicted(fixed, moving, names, self.knows_inverse)
        return found[0], (found[1] if self.knows_inverse else None)

    @property
    def knows_inverse(self) -> bool:
        """Whether the network is a chain of exponentials, each of which is undone by that of minus its velocity."""
        return bool(getattr(self.module, "diffeomorphic", False))

    def _predicted(self, fixed: Image, moving: Image, names: tuple[Any, Any], inverse: bool) -> list[Displacement]:
        if fixed.shape != moving.shape:
            raise ValueError(f"fixed is {fixed.shape} and moving {moving.shape}; both lie on one grid")
        self.compile(fixed.shape, names[0], inverse)
        settings = resolved(self.preprocessing)
        images = [
            prepared(image, settings, name, multiple=self.module.downsampling)[None]
            for image, name in zip((fixed, moving), names, strict=True)
        ]
        fields = self.executables[fixed.shape, inverse](self.params, *images, np.float32(self.smoothness))
        # From the box that was cut out of each image back to the files' grid, continued by its border value.
        box = settings["crop_to"] or fixed.shape
        starts = corner(fixed, settings["crop_to"]), corner(moving, settings["crop_to"])
        found = []
        for field_, (here, there) in zip(fields, (starts, starts[::-1]), strict=False):
            index = [
                np.clip(np.arange(size) - first, 0, wanted - 1)
                for size, first, wanted in zip(fixed.shape, here, box, strict=True)
            ]
            found.append(np.asarray(field_)[np.ix_(*index)] + np.subtract(there, here, dtype=np.float32))
        return found

    def compile(self, shape: tuple[int, ...], name: Any = "The volume", inverse: bool = False) -> None:
        """Compiles for volumes of this shape, where that has not happened; for `inverse` both ways. Raises BadInput as
        `check_shape` does."""
        self.check_shape(shape, name)
        if (shape, inverse) in self.executables:
            return
        settings = resolved(self.preprocessing)
        step = self.module.downsampling * settings["downsample"]
        d, h, w = (-(-size // step) * step for size in settings["crop_to"] or shape)

        told = bool(getattr(self.module, "smoothness", ()))

        def predict(params, fixed, moving, smoothness):
            asked = ({"inverse": True} if inverse else {}) | ({"smoothness": smoothness} if told else {})
            found = self.module.apply({"params": params}, fixed, moving, **asked)
            fields = (found[0][0], found[1]) if inverse else (found[0],)
            return [spatial.resize_displacement(u[0].astype(jnp.float32), (d, h, w)) for u in fields]

        factor = settings["downsample"]
        image = jax.ShapeDtypeStruct((1, d // factor, h // factor, w // factor, 1), jnp.float32)
        number = jax.ShapeDtypeStruct((), jnp.float32)
        self.executables[shape, inverse] = jax.jit(predict).lower(self.params, image, image, number).compile()

    def with_smoothness(self, smoothness: float | None) -> "Predictor":
        """The same network asked for this smoothness (None: as it is). Raises BadInput where it cannot be asked, or was
        not trained for as much or as little."""
        if smoothness is None:
            return self
        low, high = getattr(self.module, "smoothness", ()) or (1.0, 1.0)
        if not low <= smoothness <= high:
            known = f"from {low:g} to {high:g}" if low < high else "no smoothness but its own, 1"
            raise BadInput(f"smoothness is {smoothness:g} and {self.name} was trained for {known}; give such a one.")
        return dataclasses.replace(self, smoothness=float(smoothness))

    @property
    def asked(self) -> dict[str, float]:
        """{"smoothness"} of a network that can be told one."""
        return {"smoothness": self.smoothness} if getattr(self.module, "smoothness", ()) else {}

    def check_shape(self, shape: tuple[int, ...], name: Any) -> None:
        """Raises BadInput, about `name`, where the network's deepest level would have an axis of a single voxel."""
        settings = resolved(self.preprocessing)
        step = self.module.downsampling * settings["downsample"]
        if min(settings["crop_to"] or shape) <= (SMALLEST - 1) * step:
            raise BadInput(
                f"{name} is {by(shape)}, too small for {self.name}, which needs {(SMALLEST - 1) * step + 1} voxels or "
                "more along each axis; resample it to smaller voxels, pad it, or do without a network."
            )


def load_predictor(weights: Path | str | None = None, workdir: Path | str | None = None) -> Predictor:
    """The network of a bundle ('default': of the one that ships), or of a training run at its best checkpoint.

    A bundle may say for which smoothness its network is asked unless another is given.

    Raises BadInput where there is none, or one that this version does not know; ValueError unless just one is given.
    """
    usual = None
    if (weights is None) == (workdir is None):
        raise ValueError("load_predictor takes either weights or a workdir")
    if weights is not None:
        params, description = bundle.load(weights)
        network, preprocessing, name = description["network"], description["preprocessing"], str(weights)
        sha256, grid, usual = description["sha256"], description["grid"], description.get("smoothness")
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
    return Predictor(module, jax.device_put(params), preprocessing, name, sha256, grid).with_smoothness(usual)


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
