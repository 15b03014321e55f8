"""The networks, by name. Each maps (fixed, moving) to a tuple of displacements, finest first."""

import dataclasses
from typing import Any

import flax.linen as nn

from dilformer_jax.models.dilformer import DilformerNet
from dilformer_jax.models.voxelmorph import VoxelMorph

MODELS: dict[str, type[nn.Module]] = {"dilformer": DilformerNet, "voxelmorph": VoxelMorph}


def create(name: str, **options: Any) -> nn.Module:
    """The network of this name with these options (lists, as JSON has them, become tuples).

    Raises:
      ValueError: an unknown name or option.
    """
    if name not in MODELS:
        raise ValueError(f"There is no network {name!r}; there are {', '.join(MODELS)}.")
    known = {field for field in MODELS[name].__dataclass_fields__ if field not in ("parent", "name")}
    for option in options:
        if option not in known:
            raise ValueError(f"The network {name} has no option {option!r}; it has {', '.join(sorted(known))}.")
    return MODELS[name](**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})


def defaults(name: str) -> dict[str, Any]:
    """The options of the network of this name that need not be given, as JSON has them (tuples are lists)."""
    fields = (field for field in dataclasses.fields(MODELS[name]) if field.name not in ("parent", "name"))
    given = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    return {option: list(value) if isinstance(value, tuple) else value for option, value in given.items()}
