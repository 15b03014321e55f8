"""The networks, by name. Each maps (fixed, moving) to a tuple of displacements, finest first."""

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
