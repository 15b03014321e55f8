"""Registers a moving image to a fixed image: two NIfTI files in, a folder of results out."""

import argparse
import dataclasses
import functools
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dilformer_jax import cli
from dilformer_jax.io.folders import staged
from dilformer_jax.io.geometry import orientation, spacing
from dilformer_jax.io.itk import write_displacement
from dilformer_jax.io.volumes import BadInput, Volume, normalise, read_image, read_labels, write_image, write_labels
from dilformer_jax.reporting import html, provenance, tables

if TYPE_CHECKING:
    from dilformer_jax.registration.pipeline import Predictor, Registration

CONVENTION = """\
field.nii.gz takes a point p of the fixed image, in mm, to p + field(p) of the moving image: ANTs and ITK resample the
moving image onto the fixed grid with it as it is (LPS mm, both headers included). inverse_field.nii.gz goes back."""

OPTIONAL = ("moved_labels.nii.gz", "report.html")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` (sys.argv unless given) begins with the program's name."""
    cli.run_arguments(functools.partial(run, command=provenance.command("register", argv)), _parser(), argv)


def run(options: argparse.Namespace, command: str) -> None:
    """All of it, on the command line's options."""
    # Here, not above: JAX and what uses it take seconds to import, which --help need not wait for.
    import jax

    from dilformer_jax.registration import refine
    from dilformer_jax.registration.pipeline import check_pair, load_predictor, register

    # Everything that can be wrong with the input is found here, before any work and any output.
    if options.report and importlib.util.find_spec("matplotlib") is None:
        raise BadInput("--report draws with matplotlib, which is not installed: pip install 'dilformer-jax[plot]'.")
    fixed, moving = read_image(options.fixed), read_image(options.moving)
    fixed_labels = None if options.fixed_labels is None else read_labels(options.fixed_labels)
    moving_labels = None if options.moving_labels is None else read_labels(options.moving_labels)
    check_pair(fixed, moving, fixed_labels, moving_labels)
    alone = options.weights is None and options.workdir is None
    predictor = None if alone else load_predictor(options.weights, options.workdir)
    refinement = cli.refinement(options, alone=alone)
    if predictor is not None:
        predictor.check_shape(fixed.array.shape, fixed.path)
    if refinement is not None:
        refine.check_shape(fixed.array.shape, fixed.path)
    warnings = [] if predictor is None else _unlike_training(predictor, fixed)

    with staged(options.output, OPTIONAL) as folder:
        start = time.perf_counter()
        if predictor is not None:
            predictor.compile(fixed.array.shape, fixed.path)
        if refinement is not None:
            refine.compiled(fixed.array.shape, refinement, predictor is not None)
        compiling = time.perf_counter() - start
        result = register(fixed, moving, predictor, fixed_labels, moving_labels, refinement)
        seconds = result.metrics["seconds"]
        seconds |= {"cold": compiling + seconds["displacement"], "warm": seconds["displacement"]}

        write_image(folder / "moved.nii.gz", result.moved, fixed)
        if result.moved_labels is not None:
            write_labels(folder / "moved_labels.nii.gz", result.moved_labels, fixed)
        write_displacement(folder / "field.nii.gz", result.displacement, fixed, moving)
        write_displacement(folder / "inverse_field.nii.gz", result.inverse, moving, fixed)
        if options.report:
            _write_report(folder / "report.html", fixed, moving, result, fixed_labels)
        volumes = (fixed, moving, fixed_labels, moving_labels)
        run = {
            "command": command,
            "versions": provenance.versions(),
            "backend": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
            "network": None if predictor is None else predictor.name,
            "parameters_sha256": None if predictor is None else predictor.sha256,
            "refinement": None if refinement is None else dataclasses.asdict(refinement),
            "inputs_sha256": provenance.inputs(volume.path for volume in volumes if volume is not None),
            "convention": CONVENTION.replace("\n", " "),
            "warnings": warnings,
            "metrics": result.metrics,
            "outputs": sorted([path.name for path in folder.iterdir()] + ["run.json"]),
        }
        tables.write_json(folder / "run.json", run)

    for warning in warnings:
        print(f"Warning: {warning}")
    print(tables.plain(_summary(result), ["measure", "before", "after"]), end="")
    print(f"\n{CONVENTION}\nWritten to {options.output}: {', '.join(run['outputs'])}")


def _parser() -> cli.Arguments:
    parser = cli.Arguments(prog="dilformer register", description=__doc__)
    parser.add_argument("--fixed", type=Path, required=True, help="the image that stays, .nii or .nii.gz")
    parser.add_argument("--moving", type=Path, required=True, help="the image to warp, on the same grid")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--weights", type=Path, help="a bundle that `export` wrote")
    network.add_argument("--workdir", type=Path, help="a training run, taken at its best checkpoint")
    cli.add_refinement(parser, "without a network 50")
    parser.add_argument("--fixed-labels", type=Path, help="label map of the fixed image, to measure Dice by")
    parser.add_argument("--moving-labels", type=Path, help="label map of the moving image, warped too")
    parser.add_argument("--report", action="store_true", help="write report.html with pictures")
    return parser


def _unlike_training(predictor: "Predictor", fixed: Volume) -> list[str]:
    """What this pair's grid has that the training images had not: the network may do badly there."""
    if predictor.grid is None:
        return []
    found = {
        # Pickles, which have no orientation, say nothing to compare with.
        "orientation": (orientation(fixed.affine), predictor.grid["orientation"] or orientation(fixed.affine)),
        "spacing in mm": (
            [round(x, 2) for x in spacing(fixed.affine)],
            [round(float(x), 2) for x in predictor.grid["spacing_mm"]],
        ),
    }
    return [
        f"{fixed.path} has {what} {its} where the network was trained with {known}; the result may be poor."
        for what, (its, known) in found.items()
        if its != known
    ]


def _summary(result: "Registration") -> list[dict[str, Any]]:
    found = result.metrics
    rows: list[dict[str, Any]] = []
    if "dice" in found:
        structures = len(found["dice_per_label"])
        rows.append(
            {"measure": f"Dice, {structures} structures", "before": found["dice_before"], "after": found["dice"]}
        )
    rows.append({"measure": "correlation", "before": found["correlation_before"], "after": found["correlation"]})
    for measure, key in (
        ("folded voxels [%]", "folding_percent"),
        ("displacement, mean [mm]", "displacement_mean_mm"),
        ("displacement, 95th percentile [mm]", "displacement_p95_mm"),
        ("inverse error, mean [mm]", "inverse_mean_mm"),
        ("inverse error, 99th percentile [mm]", "inverse_p99_mm"),
        ("inverse error, largest [mm]", "inverse_max_mm"),
    ):
        rows.append({"measure": measure, "after": found[key]})
    for measure, key in (("first prediction [s]", "cold"), ("next prediction [s]", "warm")):
        rows.append({"measure": measure, "after": found["seconds"][key]})
    return rows


def _write_report(path: Path, fixed: Volume, moving: Volume, result: "Registration", labels: Volume | None) -> None:
    from dilformer_jax.registration.pipeline import warp_image
    from dilformer_jax.reporting import figures

    # Differences show the anatomy only where both images have one range.
    still, other = (normalise(volume.array, "minmax") for volume in (fixed, moving))
    figure = figures.registration(
        still,
        other,
        warp_image(other, result.displacement),
        result.displacement,
        fixed_labels=None if labels is None else labels.array,
        moved_labels=result.moved_labels,
        spacing=spacing(fixed.affine),
        orientation=orientation(fixed.affine),
    )
    sections = [
        html.Section("Pictures", f"Fixed: {fixed.path}\nMoving: {moving.path}", figure=figures.png(figure)),
        html.Section("Figures", CONVENTION.replace("\n", " "), _summary(result)),
    ]
    html.report(path, f"{moving.path.name} to {fixed.path.name}", sections)


if __name__ == "__main__":
    main()
