"""Writes the parameters of a training run as a bundle that other programs read without JAX."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dilformer_jax import cli
from dilformer_jax.data.sources import DATASETS
from dilformer_jax.data.subjects import Dataset
from dilformer_jax.io.volumes import BadInput


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` (sys.argv unless given) begins with the program's name."""
    cli.run_arguments(run, _parser(), argv)


def run(options: argparse.Namespace) -> None:
    """All of it, on the command line's options."""
    # Here, not above: JAX and what uses it take seconds to import, which --help need not wait for.
    from dilformer_jax.io import bundle
    from dilformer_jax.registration.predictor import read_config
    from dilformer_jax.reporting import description

    config = read_config(options.workdir)
    dataset = _dataset(config, options.data)
    params, described = description.of_run(options.workdir, options.checkpoint, dataset)
    bundle.save(options.output, params, described)

    step = described["training"]["steps"]
    print(f"{config['model']['name']} of {options.workdir} at step {step} ({options.checkpoint}):")
    for suffix in (".safetensors", ".npz", ".json"):
        path = options.output / f"{bundle.NAME}{suffix}"
        print(f"  {path}  {path.stat().st_size / 1e6:.3f} MB")
    figures = described["validation"]
    print("Validation: " + (", ".join(f"{name} {value}" for name, value in figures.items()) or "none at this step"))
    print(f"Trained on: {dataset.licence}")


def _parser() -> cli.Arguments:
    parser = cli.Arguments(prog="dilformer export", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="the training run")
    parser.add_argument("--output", type=Path, required=True, help="folder for model.safetensors, .json and .npz")
    parser.add_argument("--checkpoint", choices=("best", "latest"), default="best", help="by validation Dice, or last")
    parser.add_argument("--data", type=Path, help="the run's data, where it has moved since")
    return parser


def _dataset(config: Mapping[str, Any], moved_to: Path | None) -> Dataset:
    """The data set that the run was trained on: grid, labels and licence are read from it."""
    directory = Path(config["data"]["directory"]) if moved_to is None else moved_to
    if not directory.exists():
        raise BadInput(
            f"{directory}, which holds the data of this run, does not exist; say by --data where it is, since a bundle "
            "names the labels and the licence of its data."
        )
    return DATASETS[config["data"]["name"]](directory, **config["data"]["options"])


if __name__ == "__main__":
    main()
