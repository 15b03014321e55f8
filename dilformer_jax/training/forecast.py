"""How much memory a training step will need: asked of its compiled program, for which no volume is read or made."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict  # type: ignore[import-untyped]

from dilformer_jax import models
from dilformer_jax.data import pipeline, subjects
from dilformer_jax.data.preprocessing import downsampled_shape, resolved
from dilformer_jax.data.sources import DATASETS
from dilformer_jax.data.subjects import Pair
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.training import feeding, parallel, state

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Need:
    """Bytes of one device: `held` from step to step (parameters, the optimiser's moments, two batches, of which one is
    on its way while the other is computed with), `volumes` of data.cache="device", and what a step makes in between."""

    held: int
    volumes: int
    temporary: int

    @property
    def total(self) -> int:
        return self.held + self.volumes + self.temporary


def images(config: ConfigDict, shape: Sequence[int] | None = None) -> tuple[Shape, int]:
    """The shape in which images reach the network, and how many of them `data.cache="device"` would upload.

    By `shape`, that of the images' files, where it is given; then by crop_to, by the phantoms' own option, and last by
    the headers of the files. Where these are not there the number is 0.

    Raises BadInput where nothing says the shape, and as the data set and `common_shape` do.
    """
    data = config.data
    settings = resolved(data.preprocessing.to_dict())
    box = settings["crop_to"] or shape or data.options.get("shape")
    there = Path(data.directory).exists()
    if data.name not in DATASETS:
        raise BadInput(f"config.data.name is {data.name!r}; give one of {', '.join(DATASETS)}.")
    if box is None and not there:
        raise BadInput(
            f"data.directory {data.directory} does not exist, so that nothing says how large the images are; give it "
            "by --config.data.directory=DIR, or their shape, as in --shape 160 192 160."
        )
    # Phantoms would be made.
    if not there or data.name == "phantoms":
        pairs: Sequence[Pair] = ()
    else:
        pairs = subjects.split(DATASETS[data.name](Path(data.directory), **data.options.to_dict()), "train")
    if box is None:
        grid = pipeline.common_shape(pairs, settings)
    else:
        grid = downsampled_shape(tuple(box), settings["downsample"], Path(data.directory))
    return grid, len({subject for pair in pairs for subject in (pair.fixed, pair.moving)})


def need(config: ConfigDict, shape: Shape, count: int = 0) -> Need:
    """What each device needs for the step of this configuration, on all devices there are, with images of this shape;
    `count` of them are on every device where data.cache is "device". Compiles, for a minute or more where it is large.

    Raises:
      BadInput: a configuration that no step can be made of.
      jax.errors.JaxRuntimeError: a step that this device's compiler gives up on.
    """
    mesh = parallel.mesh(config.space)
    pairs = config.batch_size or mesh.shape["data"] * max(config.accumulate, 1)
    try:
        module = models.create(config.model.name, **config.model.options.to_dict())
        transformation = state.optimiser(total_steps=config.total_steps, **config.optimiser.to_dict())
        split = parallel.slabs(mesh, shape[0], module.downsampling)
        step: Any = state.step_function(
            module,
            transformation,
            config.loss.to_dict(),
            bidirectional=config.bidirectional,
            mesh=mesh,
            split=split,
            remat=config.remat,
            accumulate=config.accumulate,
            average=config.average,
        )
        params = jax.eval_shape(lambda: state.fresh(module, jax.random.key(config.seed)))
        begun = lambda params: state.initial(module, transformation, config.seed, params=params, average=config.average)
        now = jax.eval_shape(begun, params)
        planes = split.count * split.planes if split else shape[0]
        image = jax.ShapeDtypeStruct((pairs, planes, *shape[1:], 1), jnp.float32, sharding=parallel.sharded(mesh))
        batch = feeding.shapes(image, made=config.data.name == "label_maps", labelled="label_weight" in config.loss)
        lowered = step.lower(now, batch)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"no step can be made of this config ({error}); mend it.") from error
    # How well the code is optimised says nothing of its memory and, for a CPU, takes most of the time.
    quick = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    memory = lowered.compile(quick).memory_analysis()
    ahead = sum(math.prod(x.shape) * x.dtype.itemsize for x in batch.values()) // mesh.size
    voxel = 1 if config.data.name == "label_maps" else 4
    volumes = voxel * count * math.prod(shape) if config.data.cache == "device" else 0
    made = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Need(memory.argument_size_in_bytes + ahead, volumes, made)


def savings(config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
    """The ways there are to make a step smaller: what to set, as on the command line, and the configuration with it."""
    devices, options = jax.device_count(), config.model.options
    pairs = config.batch_size // (devices // config.space)
    changes: dict[str, bool] = {
        "remat=True": not config.remat,
        "model.options.finest=1": options.get("finest") == 0,
        "model.options.dtype=bfloat16": options.get("dtype") == "float32" and jax.default_backend() != "cpu",
        f"accumulate={pairs}": pairs > config.accumulate,
        f"space={devices}": config.space < devices,
    }
    for change in (change for change, possible in changes.items() if possible):
        key, _, value = change.partition("=")
        other = ConfigDict(copy.deepcopy(config.to_dict()))
        other.update_from_flattened_dict({key: {"True": True, "bfloat16": "bfloat16"}.get(value) or int(value)})
        yield change, other
