"""Trained parameters in a folder that explains itself and that other programs read without JAX.

`model.safetensors` and `model.npz` hold the same arrays under flat names such as `encoder/enter/Conv_0/kernel`.
`model.json` says what they are: network and its options, preprocessing, grid, labels, training data and its licence,
validation figures, versions, the SHA-256 of `model.safetensors` and, where somebody has written it there, which
`smoothness` a network that can be told one is asked for unless another is given (1). One such folder is part of the
package, `SHIPPED`: wherever a path is asked for here, the text 'default' names it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from dilformer_jax.io.folders import digest, staged
from dilformer_jax.io.volumes import BadInput

NAME = "model"
SHIPPED = Path(__file__).parents[1] / "weights"
DEFAULT, NONE = "default", "none"  # how commands are told to take the weights that ship, and no network at all
KEYS = ("network", "preprocessing", "grid", "labels", "training", "validation", "versions")
DTYPES = ("float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool")


def save(directory: Path | str, params: Mapping[str, Any], description: Mapping[str, Any]) -> dict[str, Any]:
    """Writes model.safetensors, model.json and model.npz, all or none; returns the description as written.

    `params` is a nested dict of arrays, kept bit for bit. `description` has `KEYS`; `parameters`, their number, and
    `sha256` are added. Raises ValueError where a description lacks a key or an array's type is not of `DTYPES`, and
    BadInput where the folder cannot be written.
    """
    if missing := [key for key in KEYS if key not in description]:
        raise ValueError(f"a bundle's description needs {', '.join(KEYS)}; {', '.join(missing)} is missing")
    arrays = flatten(params)
    with staged(directory) as folder:
        weights = folder / f"{NAME}.safetensors"
        safetensors.numpy.save_file(arrays, weights)
        np.savez(folder / f"{NAME}.npz", **arrays)  # type: ignore[arg-type]
        count = sum(array.size for array in arrays.values())
        described = {**description, "parameters": count, "sha256": digest(weights)}
        text = json.dumps(described, indent=1, allow_nan=False, ensure_ascii=False)
        (folder / f"{NAME}.json").write_text(text + "\n", encoding="utf-8")
    return described


def load(path: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters, a nested dict of NumPy arrays, and the description of a bundle.

    `path` is its folder, its .json or its .safetensors file. Raises BadInput where a file is missing or no part of a
    bundle, and where the parameters are not those that the description was written for.
    """
    with _of_the_installation(path):
        description = _description(path)
        weights = parameters_file(path)
        if not weights.is_file():
            raise BadInput(f"{weights} does not exist; keep it beside {_file(path, '.json').name}, or export again.")
        if digest(weights) != description["sha256"]:
            raise BadInput(
                f"{weights} is not the file that {_file(path, '.json').name} describes (its sha256 differs): it is "
                "damaged or was replaced; copy the whole bundle again."
            )
        return unflatten(safetensors.numpy.load_file(weights)), description


def describe(path: Path | str) -> dict[str, Any]:
    """The description alone, of a `path` as for `load`. Raises BadInput where it is missing or is no description."""
    with _of_the_installation(path):
        return _description(path)


def parameters_file(path: Path | str) -> Path:
    """Where the parameters of a `path` as for `load` are, or should be."""
    return _file(path, ".safetensors")


@contextmanager
def _of_the_installation(path: Path | str) -> Iterator[None]:
    """Nobody can export again what ships: says how else to mend it."""
    try:
        yield
    except BadInput as fault:
        if path != DEFAULT:
            raise
        raise BadInput(
            f"The default weights cannot be used ({str(fault).partition(';')[0]}): install dilformer-jax again, or do "
            "without a network (--weights none, in Python weights=None)."
        ) from fault


def _description(path: Path | str) -> dict[str, Any]:
    file = _file(path, ".json")
    if not file.is_file():
        there = path != DEFAULT and Path(path).exists()
        found = f"{Path(path)} has no {file.name}" if there else f"{file if path == DEFAULT else path} does not exist"
        raise BadInput(f"{found}; give the folder that `export` wrote, or the .safetensors file in it.")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise BadInput(f"{file} is no JSON ({fault}); copy the bundle again.") from fault
    wanted = (*KEYS, "sha256")
    missing = [key for key in wanted if key not in description] if isinstance(description, dict) else list(wanted)
    if missing:
        raise BadInput(f"{file} is no description of a bundle (no {', '.join(missing)}); give one that `export` wrote.")
    return description


def sha256(params: Mapping[str, Any]) -> str:
    """The SHA-256 that model.safetensors would have, or has, of these parameters."""
    return hashlib.sha256(safetensors.numpy.save(flatten(params))).hexdigest()


def flatten(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a nested dict by their path, joined with '/', in alphabetical order."""
    arrays: dict[str, np.ndarray] = {}

    def visit(prefix: str, node: Any) -> None:
        if not isinstance(node, Mapping):
            array = np.array(node, order="C")
            if array.dtype.name not in DTYPES or not array.dtype.isnative:
                raise ValueError(f"{prefix} is {array.dtype}, which a bundle cannot hold; it holds {', '.join(DTYPES)}")
            arrays[prefix] = array
            return
        for name, child in sorted(node.items()):
            if "/" in name:
                raise ValueError(f"the name {name!r} of a parameter has a '/', which is kept for paths")
            visit(f"{prefix}/{name}" if prefix else name, child)

    visit("", params)
    return arrays


def unflatten(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The nested dict of arrays by their path: the inverse of `flatten`."""
    params: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return params


def _file(path: Path | str, suffix: str) -> Path:
    # A text: Path("default") is a folder of this name.
    path = SHIPPED if path == DEFAULT else Path(path)
    if path.is_dir() or path == SHIPPED:
        return path / f"{NAME}{suffix}"
    if path.suffix not in (".json", ".safetensors"):
        found = f"is a {path.suffix or 'file without ending'}" if path.exists() else "does not exist"
        raise BadInput(f"{path} {found}; give a bundle's folder, its .json or its .safetensors file.")
    return path.with_suffix(suffix)
