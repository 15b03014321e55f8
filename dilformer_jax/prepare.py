"""Prepares a public data set as it is downloaded, or files of one's own, for training and evaluation: checks what is
missing, turns, resamples, aligns, crops, scales, writes NIfTI, a cache and the splits. Stopped, it goes on.
"""

import argparse
import inspect
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dilformer_jax import cli
from dilformer_jax.data import sources
from dilformer_jax.data.origins import ORIGINS, missing
from dilformer_jax.data.preparation import Done, Preparation, prepare
from dilformer_jax.data.preprocessing import PREPROCESSING, resolved
from dilformer_jax.data.standardisation import INTERPOLATIONS, NORMALISATIONS, Aligner, Settings
from dilformer_jax.data.subjects import SPLITS, Dataset, everyone
from dilformer_jax.io.volumes import BadInput

NAMES = tuple(name for name in sources.DATASETS if name not in ("phantoms", "label_maps", "prepared"))


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` (sys.argv unless given) begins with the program's name."""
    cli.run_arguments(run, _parser(), argv)


def run(options: argparse.Namespace) -> None:
    """All of it, on the command line's options."""
    if options.jobs < 1:
        raise BadInput(f"--jobs is {options.jobs}; give 1 or more.")
    sides = options.grid_spacing
    if sides is not None and len(sides) not in (1, 3):
        raise BadInput(f"--grid-spacing has {len(sides)} numbers; give one, or three.")
    settings = Settings(
        options.orientation,
        None if sides is None else tuple(sides * 3)[:3],
        None if options.grid is None else tuple(options.grid),
        options.label_interpolation,
        None if options.crop is None else tuple(options.crop),
        options.normalise,
        cli.reading(options),
        options.assume_same_grid,
    )
    preprocessing = None if options.no_cache else resolved(PREPROCESSING | _pairs(options.preprocessing))
    given = _pairs(options.options)
    dataset = _read(options, given)
    if any(pair.points for part in SPLITS for pair in getattr(dataset, part)):
        print(f"The landmarks of {options.source} are left out: they are of images on other grids.", file=sys.stderr)
    for sentence in missing(options.name, dataset):
        print(sentence, file=sys.stderr)
    what = Preparation(
        options.name, dataset, options.source, options.output, settings, options.align, preprocessing, given
    )
    aligner = None if options.align is None else _aligner()
    count, kept = 0, 0
    with _progress(len(everyone(dataset))) as report:
        for done in prepare(what, aligner, jobs=options.jobs):
            count, kept = count + 1, kept + done.kept
            report(done)

    print(f"{options.name}: {count} subjects prepared{f', {kept} of them before' if kept else ''}, in {options.output}")
    print(", ".join(f"{len(getattr(dataset, part))} {part} pairs" for part in SPLITS))
    cache = "" if preprocessing is None else f" --config.data.cache={options.output / 'cache'}"
    known = options.name if options.name in ORIGINS else "prepared"
    print(f"For training: data.name '{known}', --config.data.directory={options.output}{cache}")


def _parser() -> cli.Arguments:
    parser = cli.Arguments(
        prog="dilformer prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=NAMES, metavar="NAME", help=f"the data set: {', '.join(NAMES)}")
    parser.add_argument("--source", type=Path, required=True, help="folder of the data set as it is (a table's file)")
    parser.add_argument("--output", type=Path, required=True, help="folder for what is made of it")
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="KEY=VALUE", help="of the data set: images='*_T1w.nii.gz' for glob"
    )
    parser.add_argument("--orientation", type=str.upper, metavar="LPS", help="where the array axes shall point to")
    parser.add_argument("--grid", type=int, nargs=3, metavar=("D", "H", "W"), help="how many voxels")
    parser.add_argument("--grid-spacing", type=float, nargs="+", metavar="MM", help="edges of a voxel, one or three")
    parser.add_argument("--align", metavar="SUBJECT|FILE", help="a subject, or an image, to align all affinely to")
    parser.add_argument(
        "--label-interpolation", choices=INTERPOLATIONS, default="nearest", help="of label maps (nearest)"
    )
    parser.add_argument(
        "--crop", type=int, nargs=3, metavar=("D", "H", "W"), help="a box around the non-zero voxels, after the grid"
    )
    parser.add_argument("--normalise", choices=NORMALISATIONS, default="none", help="intensities (none)")
    parser.add_argument(
        "--preprocessing",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="of the configuration that the cache is for (normalise=max downsample=1)",
    )
    parser.add_argument("--no-cache", action="store_true", help="leaves out the cache")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="subjects at a time (2)")
    cli.add_reading(parser)
    return parser


def _read(options: argparse.Namespace, given: Mapping[str, Any]) -> Dataset:
    """The data set, read with its own options. Raises BadInput for one that it does not have or cannot take."""
    function = sources.DATASETS[options.name]
    known = list(inspect.signature(function).parameters)[1:]
    for key in given:
        if key not in known:
            raise BadInput(f"{options.name} has no option {key!r}; it has {', '.join(known) or 'none'}.")
    if options.name == "glob" and "images" not in given:
        raise BadInput("glob needs a pattern of images; give --options images='sub-*/anat/*_T1w.nii.gz'.")
    try:
        return function(options.source, **given)
    except TypeError as error:
        if not given:
            raise
        told = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise BadInput(f"{options.name} cannot take --options {told} ({error}); mend them.") from error


def _pairs(texts: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE, of which a value that is JSON is what JSON says."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"\w+", key):
            raise BadInput(f"{text!r} is no KEY=VALUE; give, for example, validation=0.1.")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _aligner() -> Aligner:
    from dilformer_jax.registration.affine import align  # with JAX, for which --help need not wait

    def aligned(template: Any, image: Any) -> Any:
        found = align(template, image)
        return found.matrix, found.warnings

    return aligned


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Yields what reports a subject: a bar on stderr with the time that is left, or lines where that is no terminal."""
    console = Console(stderr=True)
    start = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, made, count = bar.add_task("preparing", total=total), 0, 0

        def report(done: Done) -> None:
            nonlocal made, count
            count, made = count + 1, made + (not done.kept)
            for note in done.notes:
                console.print(note, markup=False, highlight=False, soft_wrap=True)
            if bar.disable:
                # By those that took time: what was done before took none.
                left = (time.monotonic() - start) / made * (total - count) if made else 0.0
                what = "done before" if done.kept else "prepared"
                line = f"[{count}/{total}] {done.name} {what}, ETA {timedelta(seconds=round(left))}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                bar.update(task, completed=count, description=done.name)

        yield report


if __name__ == "__main__":
    main()
