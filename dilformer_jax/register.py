"""Registers a moving image to a fixed image: two NIfTI files in, a folder of results out.

The command; for Python this module is at the same time the function `dilformer_jax.register`, see `api.registered`.
"""

import argparse
import functools
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dilformer_jax import cli
from dilformer_jax.api import How, carry_out, network, read, registered
from dilformer_jax.data.folders import pairs_csv
from dilformer_jax.data.subjects import Pair, Subject, split
from dilformer_jax.io import bundle
from dilformer_jax.io.folders import staged
from dilformer_jax.io.headers import BadInput
from dilformer_jax.reporting import provenance

FOLDED = 3  # the exit code where more is folded than --max-folding allows


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` (sys.argv unless given) begins with the program's name."""
    cli.run_arguments(functools.partial(run, command=provenance.command("register", argv)), _parser(), argv)


def run(options: argparse.Namespace, command: str) -> None:
    """All of it, on the command line's options."""
    one = options.fixed is not None and options.moving is not None
    if one == (options.pairs is not None) or (options.pairs and (options.fixed or options.moving)):
        raise BadInput("Nothing to register, or too much; give --fixed and --moving, or --pairs.")
    alone = [name for name in ("fixed_labels", "moving_labels", "fixed_mask", "moving_mask") if getattr(options, name)]
    if options.pairs and alone:
        raise BadInput(f"--{alone[0].replace('_', '-')} belongs to one pair; --pairs has a column for labels.")
    if options.shard != (1, 1) and not options.pairs:
        raise BadInput("--shard divides the pairs of --pairs; leave it out for one pair.")
    if options.report and importlib.util.find_spec("matplotlib") is None:
        raise BadInput("--report draws with matplotlib, which is not installed: pip install 'dilformer-jax[plot]'.")
    how = _how(options, command)
    if options.pairs:
        _register_all(options, how)
        return
    pair = Pair(
        Subject(options.fixed.name, options.fixed, options.fixed_labels),
        Subject(options.moving.name, options.moving, options.moving_labels),
    )
    told = _register_one(pair, options.output, how, (options.fixed_mask, options.moving_mask))
    from dilformer_jax.reporting import outputs

    for warning in told["warnings"]:
        print(f"Warning: {warning}")
    print(outputs.method(told))
    print(outputs.summary(told["metrics"]), end="")
    print(f"\n{outputs.CONVENTION}\nWritten to {options.output}: {', '.join(told['outputs'])}")
    if told["metrics"]["folding_percent"] > options.max_folding:
        print(f"More than --max-folding {options.max_folding:g} % is folded.", file=sys.stderr)
        sys.exit(FOLDED)


def _parser() -> cli.Arguments:
    parser = cli.Arguments(prog="dilformer register", description=__doc__)
    parser.add_argument("--fixed", type=Path, help="the image that stays, of any shape, spacing and orientation")
    parser.add_argument("--moving", type=Path, help="the image to warp, likewise")
    parser.add_argument(
        "--pairs",
        type=Path,
        metavar="CSV",
        help="many pairs: fixed,moving,fixed_labels,moving_labels; goes on where it was stopped",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the results; with --pairs one in it for each"
    )
    parser.add_argument(
        "--shard",
        type=cli.shard,
        default=(1, 1),
        metavar="K/N",
        help="of --pairs the Kth of N parts, for as many processes",
    )
    network = parser.add_mutually_exclusive_group()
    network.add_argument(
        "--weights",
        metavar="default|none|BUNDLE",
        help="those that ship (default); no network, refinement alone; or a bundle that `export` wrote",
    )
    network.add_argument("--workdir", type=Path, help="a training run, taken at its best checkpoint")
    parser.add_argument(
        "--affine",
        default="auto",
        metavar="auto|search|none|FILE",
        help="alignment beforehand: found; found from all 24 turns; none, as the headers say; read from a file",
    )
    cli.add_smoothness(parser)
    cli.add_refinement(parser, "default with the weights that ship or with none, fast with others")
    parser.add_argument("--fixed-labels", type=Path, help="label map of the fixed image, to measure Dice by")
    parser.add_argument("--moving-labels", type=Path, help="label map of the moving image, warped too")
    parser.add_argument("--fixed-mask", type=Path, help="where the fixed image's brain is; nothing else is looked at")
    parser.add_argument("--moving-mask", type=Path, help="the same of the moving image")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=("fsl", "freesurfer", "voxel"),
        default=(),
        help="further files of the transform",
    )
    parser.add_argument("--report", action="store_true", help="write report.html with pictures")
    parser.add_argument(
        "--max-folding",
        type=float,
        default=np.inf,
        metavar="PERCENT",
        help=f"end with exit code {FOLDED} where more is folded",
    )
    cli.add_reading(parser)
    return parser


def _how(options: argparse.Namespace, command: str) -> How:
    predictor, default_preset = network(bundle.DEFAULT if options.weights is None else options.weights, options.workdir)
    if predictor is not None:
        predictor = predictor.with_smoothness(options.smoothness)
    elif options.smoothness is not None:
        raise BadInput("--smoothness is asked of a network; leave it out with --weights none.")
    refinement = cli.refinement(options, network=predictor is not None, default_preset=default_preset)
    known = options.affine in ("auto", "search", "none")
    if not known and not Path(options.affine).is_file():
        raise BadInput(f"--affine {options.affine} is no file; give auto, search, none or a file with an affine.")
    reading, same = cli.reading(options), options.assume_same_grid
    return How(predictor, refinement, options.affine, tuple(options.formats), options.report, reading, same, command)


def _register_one(
    pair: Pair, output: Path, how: How, masks: tuple[Path | None, Path | None] = (None, None)
) -> dict[str, Any]:
    """Reads a pair, registers it and writes its folder; returns its record."""
    # Everything that can be wrong with the input is found here, before any work and any output.
    images, labels = (pair.fixed.image, pair.moving.image), (pair.fixed.labels, pair.moving.labels)
    inputs = read(how, images, labels, masks)
    from dilformer_jax.reporting import outputs

    with staged(output, outputs.OPTIONAL) as folder:
        result = carry_out(how, inputs, distances=how.report)
        files = provenance.inputs(path for path in (*images, *labels, *masks) if path is not None)
        record = {"command": how.command, "settings": how.settings, "inputs_sha256": files}
        return outputs.write(
            folder, result, formats=how.formats, labels=inputs.labels, report=how.report, record=record
        )


def _register_all(options: argparse.Namespace, how: How) -> None:
    """The pairs of a table, each into its folder, and the page that indexes them."""
    from dilformer_jax.registration import batch
    from dilformer_jax.reporting import outputs

    dataset = pairs_csv(options.pairs)
    pairs = split(dataset, "test")
    options.output.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    job = lambda pair, folder: _register_one(pair, folder, how)
    mine = len(pairs[options.shard[0] - 1 :: options.shard[1]])
    for number, outcome in enumerate(batch.run(pairs, options.output, job, how.settings, options.shard), 1):
        counts[outcome.kind] = counts.get(outcome.kind, 0) + 1
        print(
            f"[{number}/{mine}] {outcome.pair.name}: {outcome.kind}. {outcome.sentence}".rstrip(),
            file=sys.stderr,
            flush=True,
        )
    outputs.write_index(options.output, pairs)
    print(f"{', '.join(f'{count} {kind}' for kind, count in counts.items())}. See {options.output / 'index.html'}.")
    if "failed" in counts:
        sys.exit(1)
    if "refused" in counts:
        sys.exit(2)


class _Function(types.ModuleType):
    """A module that is called: `dilformer_jax.register` is the command's module and the function of that name alike."""

    __call__ = staticmethod(registered)


sys.modules[__name__].__class__ = _Function

if __name__ == "__main__":
    main()
