"""Says what a weights file is: network, grid, data and their licence, figures, and whether it is whole."""

import argparse
import ast
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dilformer_jax import cli
from dilformer_jax.data import oasis, phantoms, structures
from dilformer_jax.io import bundle
from dilformer_jax.io.folders import digest
from dilformer_jax.io.headers import by
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.reporting.tables import text

SHOWN = 4  # of the names of subjects and of structures
# Their classes, in the module of models/ that has their name.
NETWORKS = {"dilformer": "DilformerNet", "voxelmorph": "VoxelMorph"}
# Of the data sets whose labels have names; of others they mean what their files say.
NAMES: dict[str, Mapping[int, str]] = {
    "lpba40": structures.LPBA40,
    "ixi": structures.FREESURFER,
    "label_maps": structures.FREESURFER,
    "mindboggle": structures.DKT31,
    "phantoms": phantoms.LABELS,
}


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` (sys.argv unless given) begins with the program's name."""
    cli.run_arguments(run, _parser(), argv)


def run(options: argparse.Namespace) -> None:
    """All of it, on the command line's options; exit code 1 where the parameters are not those described."""
    of_a_run = _is_run(options.weights)
    description = _of_run(Path(options.weights)) if of_a_run else bundle.describe(options.weights)
    if of_a_run:
        state, whole = f"{options.weights}, best checkpoint", True
    else:
        state, whole = _file(options.weights, str(description["sha256"]))
    if options.json:
        print(json.dumps(description, indent=1, ensure_ascii=False))
    else:
        try:
            told = [*lines(description), ("file", state)]
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise BadInput(
                f"{options.weights} has a description that cannot be read ({type(fault).__name__}: {fault}); give a "
                "bundle that `export` wrote."
            ) from fault
        for name, content in told:
            print(f"{name:<15}{content}")
    if not whole:
        print(f"{options.weights} is not whole ({state}); copy all of it again.", file=sys.stderr)
        sys.exit(1)


def _parser() -> cli.Arguments:
    parser = cli.Arguments(prog="dilformer info", description=__doc__)
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="a bundle that `export` wrote, default (those that ship), or a training run"
    )
    parser.add_argument("--json", action="store_true", help="print the whole description, as model.json has it")
    return parser


def lines(description: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a description as `io.bundle` has it says, as pairs of what is told of and what is told."""
    network, training = description["network"], description["training"]
    yield "network", f"{network['name']}, {_options(network['name'], network['options'])}"
    yield "parameters", f"{description['parameters']:,}"
    yield "preprocessing", ", ".join(f"{name} {_plain(value)}" for name, value in description["preprocessing"].items())
    grid = description["grid"]
    yield (
        "grid",
        "not recorded"
        if grid is None
        else f"{by(grid['shape'])} voxels of {by(text(float(side)) for side in grid['spacing_mm'])} mm, "
        + (grid["orientation"] or "of any orientation"),
    )
    yield "labels", _labels(description["labels"], training["dataset"], training["options"])
    yield (
        "trained on",
        f"{_subjects(training.get('subjects'))} of {training['dataset']}, {training.get('pairs', '?')} pairs, "
        f"{training['steps']:,} steps, seed {training['seed']}"
        + (f", beginning with {training['start_from']}" if training.get("start_from") else ""),
    )
    yield "chosen by", _subjects(training.get("chosen_by"))
    yield "licence", training["licence"] or "not recorded"
    figures = {name: value for name, value in description["validation"].items() if not isinstance(value, dict | list)}
    yield "validation", ", ".join(f"{name} {text(value)}" for name, value in figures.items()) or "none"
    yield "versions", ", ".join(f"{name} {version}" for name, version in description["versions"].items()) or "none"
    if "smoothness" in description:
        yield "smoothness", f"{text(float(description['smoothness']))} unless another is asked for"
    yield "SHA-256", description["sha256"]


def defaults(name: str) -> dict[str, Any]:
    """What `models.defaults` says, read from the network's source, for its import would be JAX's."""
    source = Path(__file__).parent / "models" / f"{name}.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    network = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == NETWORKS[name])
    found: dict[str, Any] = {}
    for field in network.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.value is not None:
            value = ast.literal_eval(field.value)
            found[field.target.id] = list(value) if isinstance(value, tuple) else value
    return found


def _options(name: str, options: Mapping[str, Any]) -> str:
    """The options that are not as they are unless given."""
    known = defaults(name) if name in NETWORKS else {}
    changed = {key: value for key, value in options.items() if key not in known or known[key] != value}
    told = ", ".join(f"{key} {_plain(value)}" for key, value in changed.items())
    if name not in NETWORKS:
        return f"which this version does not know: {told}"
    return f"with {told}, otherwise as by default" if told else "as by default"


def _labels(ids: Sequence[int] | None, dataset: str, options: Mapping[str, Any]) -> str:
    if ids is None:
        return "not recorded"
    if dataset == "oasis":
        names: Mapping[int, str] = oasis.SEGMENTATIONS[options.get("segmentation", "seg35")]
    else:
        names = NAMES.get(dataset, {})
    return f"{len(ids)} structures: {_some([names.get(id, str(id)) for id in ids])}" if ids else "none"


def _subjects(names: Sequence[str] | None) -> str:
    if names is None:
        return "subjects that are not recorded"
    return f"{len(names)} subject{'s' * (len(names) != 1)}" + (f" ({_some(names)})" if names else "")


def _some(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:SHOWN])} and {more} more"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return by(value) if all(isinstance(part, int) for part in value) else " to ".join(map(text, value))
    return "none" if value is None else text(value)


def _file(weights: str, sha256: str) -> tuple[str, bool]:
    """Whether the parameters on disk are the ones described, in words and as a truth."""
    path = bundle.parameters_file(weights)
    if not path.is_file():
        return f"{path} does not exist", False
    size = f"{path}, {path.stat().st_size / 1e6:.3g} MB"
    if digest(path) != sha256:
        return f"{size}, is NOT the one described: its SHA-256 differs", False
    return f"{size}, the one described", True


def _is_run(weights: str) -> bool:
    """Whether it is a training run's folder, not a bundle's."""
    folder = Path(weights)
    return weights != bundle.DEFAULT and (folder / "config.json").is_file() and not (folder / "model.json").is_file()


def _of_run(workdir: Path) -> dict[str, Any]:
    """The description that `export` would write of the run, as far as the run recorded it."""
    # Here, not above: JAX and what uses it take seconds to import.
    from dilformer_jax.reporting import description

    params, found = description.of_run(workdir)
    count = sum(array.size for array in bundle.flatten(params).values())
    return {**found, "parameters": count, "sha256": bundle.sha256(params)}


if __name__ == "__main__":
    main()
