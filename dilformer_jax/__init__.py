"""Deformable registration of 3-D medical images: `dilformer_jax.register(fixed, moving)`, and the commands."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # Late, for it imports much of the package, which those who want a part of it need not wait for.
    if name == "register":
        return importlib.import_module("dilformer_jax.register")
    raise AttributeError(f"module 'dilformer_jax' has no attribute {name!r}")
