"""Registers the pairs of a Learn2Reg data set and writes a submission, or checks one offline as the organisers will."""

import argparse
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dilformer_jax import cli
from dilformer_jax.io import learn2reg, submissions
from dilformer_jax.io.headers import by, open_nifti
from dilformer_jax.io.learn2reg import Task
from dilformer_jax.io.volumes import BadInput, read_image
from dilformer_jax.reporting import provenance, tables

if TYPE_CHECKING:
    from dilformer_jax.registration.methods import Method

RUN = "learn2reg.json"  # how the displacements of a folder were made


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` (sys.argv unless given) begins with the program's name."""
    cli.run_arguments(functools.partial(run, command=provenance.command("learn2reg", argv)), _parser(), argv)


def run(options: argparse.Namespace, command: str) -> None:
    """All of it, on the command line's options."""
    task = learn2reg.read_task(options.dataset, options.split, options.data)
    if options.check is not None:
        _check(task, options.check, options.form)
        return
    if options.output is None:
        raise BadInput("Nowhere to write to; give --output FOLDER, or --check SUBMISSION to check one.")
    method = _method(options)
    _look(task, method)
    folder = options.output
    suffix = learn2reg.FORMS[options.form]
    files = {pair: f"{pair.names[-1 if options.names == 'long' else 0]}{suffix}" for pair in task.pairs}
    settings = {
        "dataset": task.name,
        "split": task.split,
        "form": options.form,
        "names": options.names,
        "method": method.name,
        "parameters_sha256": method.sha256,
        "method_settings": json.loads(json.dumps(method.settings)),
    }
    _begin(folder, settings, command)

    todo = [pair for pair in task.pairs if not (folder / files[pair]).exists()]
    if len(todo) < len(task.pairs):
        _say(f"{len(task.pairs) - len(todo)} of {len(task.pairs)} pairs are there already; going on with the others.")
    if todo:
        method.compile(task.shape, options.dataset)
    start = time.perf_counter()
    for done, pair in enumerate(todo):
        paths = task.image(pair.fixed), task.image(pair.moving)
        fixed, moving = (read_image(path, submissions.READING) for path in paths)
        begin = time.perf_counter()
        u = method.displacement(fixed, moving)
        seconds = time.perf_counter() - begin
        learn2reg.write_displacement(folder / files[pair], u, fixed.affine, options.form)
        passed = time.perf_counter() - start
        left = passed / (done + 1) * (len(todo) - done - 1)
        _say(f"[{done + 1}/{len(todo)}] {files[pair]}: {seconds:.3g} s; {passed:.0f} s so far, about {left:.0f} s left")
    print(f"{len(task.pairs)} displacements of {task.name}, {task.split}, by {method.name}, are in {folder}")
    if options.zip:
        packed = folder.absolute().with_name(f"{folder.absolute().name}.zip")
        submissions.write_zip(packed, task, folder, options.form)
        print(f"Packed in {packed}")
    _check(task, packed if options.zip else folder, options.form)


def _parser() -> cli.Arguments:
    parser = cli.Arguments(prog="dilformer learn2reg", description=__doc__)
    parser.add_argument("--dataset", type=Path, required=True, metavar="JSON", help="the task's NAME_dataset.json")
    parser.add_argument("--data", type=Path, help="folder that its paths start from (its own)")
    parser.add_argument("--split", choices=tuple(learn2reg.SPLITS), default="val", help="whose pairs (val)")
    cli.add_method(parser)
    parser.add_argument("--output", type=Path, help="folder for the displacements; stopped, it goes on there")
    parser.add_argument(
        "--form", choices=tuple(learn2reg.FORMS), default="nifti", help="whole grid, or 2021's half grid in float16"
    )
    parser.add_argument(
        "--names",
        choices=("short", "long"),
        default="short",
        help="disp_FIXED_MOVING where that is allowed, or always with modalities, as evaluation.py of 2025 wants it",
    )
    parser.add_argument("--zip", action="store_true", help="pack them into OUTPUT.zip")
    parser.add_argument("--check", type=Path, metavar="SUBMISSION", help="check this folder or zip file, write nothing")
    return parser


def _method(options: argparse.Namespace) -> "Method":
    """What the command line names to register with."""
    from dilformer_jax.registration import methods

    given = [name for name in ("workdir", "weights", "method") if getattr(options, name) is not None]
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given) or "none"
        raise BadInput(f"Pairs are registered by one of --workdir, --weights and --method; {found} given.")
    return methods.chosen(
        options.method,
        options.weights,
        options.workdir,
        cli.refinement(options, network=options.method is None),
        options.syn_iterations,
        options.smoothness,
    )


def _look(task: Task, method: "Method") -> None:
    """Raises BadInput, from the headers alone, where an image is missing or not as dataset.json says."""
    for path in dict.fromkeys(task.image(path) for pair in task.pairs for path in (pair.fixed, pair.moving)):
        shape = open_nifti(path, submissions.READING).shape[:3]
        if shape != task.shape:
            raise BadInput(f"{path} has {by(shape)} voxels where tensorImageShape says {by(task.shape)}; look at both.")
        method.check_shape(shape, path)


def _begin(folder: Path, settings: dict[str, Any], command: str) -> None:
    """Notes how the folder's displacements are made. Raises BadInput where they were made otherwise, or nobody knows
    how: what belongs together must not be mixed."""
    path = folder / RUN
    if path.exists():
        try:
            before = json.loads(path.read_text("utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path} cannot be read ({error}); choose another --output.") from error
        if before != settings:
            changed = next(name for name in settings if settings[name] != before.get(name))
            raise BadInput(
                f"{folder} holds displacements whose {changed} is {before.get(changed)}, not {settings[changed]}; "
                "choose another --output."
            )
        return
    if folder.is_dir() and any(folder.glob("disp*")):
        raise BadInput(
            f"{folder} holds displacements but no {RUN} that says how they were made; choose another --output."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder} cannot be written ({error.strerror or error}); choose another --output.") from error
    tables.write_json(path, {"settings": settings, "command": command, "versions": provenance.versions()})


def _check(task: Task, submission: Path, form: str) -> None:
    """Says of each file whether it is as it should be. Raises BadInput in the end where one is not."""
    faults, doubts, count = 0, 0, len(task.pairs)
    for number, found in enumerate(submissions.findings(task, submission, form), 1):
        for sentence in found.faults:
            print(f"fault: {sentence}")
        for sentence in found.doubts:
            print(f"doubt: {sentence}")
        faults, doubts = faults + len(found.faults), doubts + len(found.doubts)
        if number <= count:
            _say(f"[{number}/{count}] checked, {faults} faults, {doubts} doubts")
    if faults:
        files = "1 file" if faults == 1 else f"{faults} files"
        raise BadInput(f"{submission} would be refused for {files} of {count} ({task.name}, {task.split}).")
    print(f"{submission} has all {count} displacements of {task.name}, {task.split}: {doubts} doubts.")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
