"""Writes the parameters of a training run as a bundle that other programs read without JAX."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dilformer_jax import cli
from dilformer_jax.data.protocols import subjects
from dilformer_jax.data.sources import DATASETS
from dilformer_jax.data.subjects import Dataset
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.reporting import provenance
from dilformer_jax.training import logs


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` (sys.argv unless given) begins with the program's name."""
    cli.run_arguments(run, _parser(), argv)


def run(options: argparse.Namespace) -> None:
    """All of it, on the command line's options."""
    # Here, not above: JAX and what uses it take seconds to import, which --help need not wait for.
    from dilformer_jax.data.pipeline import common_grid
    from dilformer_jax.data.preprocessing import resolved
    from dilformer_jax.io import bundle
    from dilformer_jax.registration import selection
    from dilformer_jax.registration.predictor import read_config
    from dilformer_jax.training import checkpoint

    config = read_config(options.workdir)
    dataset, known = _dataset(config, options.data), selection.of_run(options.workdir)
    params, step = checkpoint.restore_params(options.workdir, options.checkpoint)
    description: dict[str, Any] = {
        "network": {"name": config["model"]["name"], "options": _options(config["model"])},
        "preprocessing": resolved(config["data"]["preprocessing"]),
        "grid": common_grid(dataset.train, config["data"]["preprocessing"]),
        "labels": list(dataset.labels),
        "training": {
            "dataset": config["data"]["name"],
            "options": config["data"]["options"],
            "licence": dataset.licence,
            # As the run recorded them, for the splits of a folder may be others by now; old runs did not.
            "subjects": sorted(known.trained or subjects(dataset.train)),
            "chosen_by": sorted(known.chosen or subjects(dataset.validation)),
            "pairs": len(dataset.train),
            "steps": step,
            "seed": config["seed"],
        },
        "validation": _validation(options.workdir, step),
        "versions": provenance.versions(),
    }
    bundle.save(options.output, params, description)

    print(f"{config['model']['name']} of {options.workdir} at step {step} ({options.checkpoint}):")
    for suffix in (".safetensors", ".npz", ".json"):
        path = options.output / f"{bundle.NAME}{suffix}"
        print(f"  {path}  {path.stat().st_size / 1e6:.3f} MB")
    figures = description["validation"]
    print("Validation: " + (", ".join(f"{name} {value}" for name, value in figures.items()) or "none at this step"))
    print(f"Trained on: {dataset.licence}")


def _parser() -> cli.Arguments:
    parser = cli.Arguments(prog="dilformer export", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="the training run")
    parser.add_argument("--output", type=Path, required=True, help="folder for model.safetensors, .json and .npz")
    parser.add_argument("--checkpoint", choices=("best", "latest"), default="best", help="by validation Dice, or last")
    parser.add_argument("--data", type=Path, help="the run's data, where it has moved since")
    return parser


def _options(model: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of the network, those left at their defaults included: a later version may have others."""
    from dilformer_jax import models

    module = models.create(model["name"], **model["options"])
    names = [field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name")]
    return {name: getattr(module, name) for name in names}


def _dataset(config: Mapping[str, Any], moved_to: Path | None) -> Dataset:
    """The data set that the run was trained on: grid, labels and licence are read from it."""
    directory = Path(config["data"]["directory"]) if moved_to is None else moved_to
    if not directory.exists():
        raise BadInput(
            f"{directory}, which holds the data of this run, does not exist; say by --data where it is, since a bundle "
            "names the labels and the licence of its data."
        )
    return DATASETS[config["data"]["name"]](directory, **config["data"]["options"])


def _validation(workdir: Path, step: int) -> dict[str, Any]:
    """What the run logged on its validation pairs at this step; Dice of the identity beside its own."""
    records = [record for record in logs.read(workdir / "metrics.jsonl") if record["step"] == step]
    found: dict[str, Any] = next((record for record in reversed(records) if "dice" in record), {})
    return {name: value for name, value in found.items() if name != "step"}


if __name__ == "__main__":
    main()
