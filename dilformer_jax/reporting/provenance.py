"""Where a result comes from: programs, command and files."""

import contextlib
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from dilformer_jax.io.folders import digest
from dilformer_jax.io.geometry import orientation, spacing
from dilformer_jax.io.volumes import Volume

PACKAGES = ("dilformer-jax", "jax", "jaxlib", "flax", "numpy", "scipy", "nibabel")


def versions() -> dict[str, str]:
    """The version of Python and of each package that computes; "not installed" for a package run from its source.

    Run from a clone, `commit` is the clone's, with "-dirty" where a file differs from it.
    """
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    clone = Path(__file__).resolve().parents[2]
    if (clone / ".git").exists():
        describe = ["git", "-C", str(clone), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or one that distrusts the folder
            told = subprocess.run(describe, capture_output=True, text=True, check=True)
            found["commit"] = told.stdout.strip()
    return found


def command(name: str, argv: Sequence[str] | None) -> str:
    """The command line that was given (sys.argv unless `argv`, which begins with the program's name), for a shell."""
    return shlex.join(["python", "-m", f"dilformer_jax.{name}", *(sys.argv if argv is None else argv)[1:]])


def inputs(paths: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of each file, by its absolute path."""
    return {str(path.absolute()): digest(path) for path in paths}


def header(volume: Volume) -> dict[str, Any]:
    """What a file's header says, and where programs may read it differently, as one column of a table."""
    shape, affine = volume.array.shape, volume.affine
    oblique = np.degrees(nib.affines.obliquity(affine).max())
    codes = {form: int(volume.header[f"{form}_code"]) for form in ("sform", "qform")}
    return {
        "file": str(volume.path),
        "shape": " x ".join(str(n) for n in shape),
        "spacing [mm]": " x ".join(f"{side:.4g}" for side in spacing(affine)),
        "orientation": orientation(affine) + (f", oblique by {oblique:.1f} degrees" if oblique > 0.1 else ""),
        "sform code, qform code": f"{codes['sform']}, {codes['qform']}",
        "first voxel at R, A, S [mm]": ", ".join(f"{x:.2f}" for x in affine[:3, 3]),
        "data type": str(volume.header.get_data_dtype()),
        "SHA-256": digest(volume.path) if volume.path.is_file() else "in memory",
    }
