"""The commands in this process, and what they are given of the phantoms."""

import sys
from pathlib import Path

import pytest

from dilformer_jax import __main__


def dilformer(*arguments: object) -> None:
    """The `dilformer` command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dilformer", *map(str, arguments)])
        __main__.main()


def pair(phantoms: Path, *, labels: bool = True) -> list[object]:
    """The arguments of `register` for two phantoms that the network has not seen."""
    arguments: list[object] = []
    for role, name in (("fixed", "phantom_002"), ("moving", "phantom_003")):
        arguments += [f"--{role}", phantoms / f"{name}_t1.nii.gz"]
        arguments += [f"--{role}-labels", phantoms / f"{name}_seg.nii.gz"] if labels else []
    return arguments
