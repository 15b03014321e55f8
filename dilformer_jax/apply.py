"""Applies transforms to images, label maps, 4-D series and points: files in, files out.

A transform belongs to a fixed and a moving image, as a registration was given them, and takes points of the fixed image
to points of the moving image. It resamples images of the moving subject onto the fixed grid; --inverse resamples images
of the fixed subject onto the moving grid. Points are named by the image they are points of (--from), and the direction
follows from that. Several transforms are a chain: a point of the fixed image goes through the first one first, so they
are listed from the fixed image to the moving image, as for antsApplyTransforms; images are interpolated once.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dilformer_jax import cli
from dilformer_jax.io import points, transform_files
from dilformer_jax.io.folders import staged
from dilformer_jax.io.headers import BadInput, Reading
from dilformer_jax.io.series import read_place, read_series, write_series
from dilformer_jax.io.transforms import grid_of
from dilformer_jax.io.volumes import Volume, read_label_ids, write_label_ids
from dilformer_jax.registration.chains import MISSED, Chain, Link, backwards, followed, places, seen

NIFTI = (".nii", ".nii.gz")
VOLUMES = (*NIFTI, ".mgz", ".mgh")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` (sys.argv unless given) begins with the program's name."""
    cli.run_arguments(run, _parser(), argv)


def run(options: argparse.Namespace) -> None:
    """All of it, on the command line's options."""
    volumes = [*options.image, *options.labels]
    _check(options, volumes)
    reading = cli.reading(options)
    chain, ends = _chain(options, volumes, reading)
    names = _names(options, [*volumes, *options.points])
    folder = options.output.parent if _is_file(options.output, names) else options.output
    reference = _reference(options) if volumes else None
    like = None if reference is None else read_place(reference, reading)
    with staged(folder) as staging:
        if like is not None:
            _apply_to_volumes(options, chain, like, reading, staging, names)
        for path in options.points:
            _apply_to_points(options, chain, ends, path, staging / names[path])
    for name in names.values():
        print(f"Written to {folder / name}")


def _check(options: argparse.Namespace, volumes: Sequence[Path]) -> None:
    """Raises BadInput where the options do not go together."""
    if not volumes and not options.points:
        raise BadInput("Nothing to apply the transform to; give --image, --labels or --points.")
    if options.points and options.origin is None:
        raise BadInput(
            f"{options.points[0]} may have points of either image; say which with --from fixed or --from moving."
        )
    if options.points and options.inverse:
        raise BadInput("--inverse is for images; points go by --from, so leave it out.")
    if not options.points and (options.origin or options.space):
        raise BadInput(f"--{'from' if options.origin else 'space'} is for points; give --points, or leave it out.")
    if options.interpolation == "argmax" and not options.labels:
        raise BadInput("--interpolation argmax is for label maps; give --labels, or choose another for images.")
    if options.interpolation in ("linear", "cubic") and not options.image:
        raise BadInput(f"--interpolation {options.interpolation} is for images; choose nearest or argmax for labels.")


def _chain(
    options: argparse.Namespace, volumes: Sequence[Path], reading: Reading
) -> tuple[Chain, tuple[Volume | None, Volume | None]]:
    """The transforms from the fixed to the moving image, and both images' places where they are known."""
    first = volumes[0] if volumes else None
    here, there = (first, options.reference) if options.inverse else (options.reference, first)
    known = {path: read_place(path, reading) for path in {options.fixed, options.moving, here, there} if path}
    fixed, moving = known.get(options.fixed), known.get(options.moving)
    # Of a single transform, the images at its ends are those at hand; of several only its user knows.
    alone = len(options.transform) == 1
    ends = (fixed or (known.get(here) if alone else None), moving or (known.get(there) if alone else None))
    chain = []
    for text in options.transform:
        match = re.fullmatch(r"\[(.+),([01])\]", text)
        name, inverse = (match[1], match[2] == "1") if match else (text, False)
        a, b = reversed(ends) if inverse else ends
        chain.append(Link(transform_files.read_transform(Path(name), a, b), inverse))
    return chain, ends


def _names(options: argparse.Namespace, inputs: Sequence[Path]) -> dict[Path, str]:
    """What the outputs are called. Raises BadInput where two would have one name, or one that of its input."""
    found: dict[Path, str] = {}
    alone = _is_file(options.output, inputs)
    if len(inputs) > 1 and options.output.name.endswith((*VOLUMES, ".csv")):
        raise BadInput(f"--output {options.output} is one file for {len(inputs)} inputs; give a folder.")
    if options.points and alone and options.output.name.endswith(VOLUMES):
        raise BadInput(f"--output {options.output} is no name for a table of points; let it end in .csv.")
    for path in inputs:
        name = options.output.name if alone else re.sub(r"\.mg[zh]$", ".nii.gz", path.name)
        target = (options.output.parent if alone else options.output) / name
        if path in found or name in found.values():
            raise BadInput(f"{path} would be written to {target} beside another of its name; apply to one at a time.")
        if target.exists() and path.exists() and target.samefile(path):
            raise BadInput(f"{path} would be replaced by its output; choose another --output.")
        found[path] = name
    return found


def _is_file(output: Path, inputs: Sequence[Path] | dict[Path, str]) -> bool:
    """Whether the output of a single input is a file of this name, not a folder: it is none yet, and has a suffix."""
    return len(inputs) == 1 and not output.is_dir() and re.search(r"\.[A-Za-z]\w*$", output.name) is not None


def _reference(options: argparse.Namespace) -> Path:
    own = options.moving if options.inverse else options.fixed
    found = options.reference or own
    if found is None:
        role = "moving" if options.inverse else "fixed"
        raise BadInput(f"The grid to write on is missing; give an image that has it with --reference, or --{role}.")
    return found


def _apply_to_volumes(
    options: argparse.Namespace, chain: Chain, like: Volume, reading: Reading, folder: Path, names: dict[Path, str]
) -> None:
    shape = like.array.shape
    where, errors = places(grid_of(like), backwards(chain) if options.inverse else chain)
    _tell_missed(errors, "voxels")
    kind = options.interpolation if options.interpolation in ("cubic", "nearest") else "linear"
    for path in options.image:
        series = read_series(path, reading)
        source = series.place
        _tell_notes(source, where)
        outside = min(0.0, float(series.frames.min()))
        frames = np.empty((*shape, series.frames.shape[3]), np.float32)
        for number in range(frames.shape[3]):
            frames[..., number] = seen(series.frames[..., number], source.affine, where, shape, kind, outside)
        write_series(folder / names[path], frames, like, source)
    kind = "argmax" if options.interpolation == "argmax" else "nearest"
    for path in options.labels:
        labels, ids = read_label_ids(path, reading)
        _tell_notes(labels, where)
        write_label_ids(folder / names[path], seen(labels.array, labels.affine, where, shape, kind), ids, like)


def _apply_to_points(
    options: argparse.Namespace, chain: Chain, ends: tuple[Volume | None, Volume | None], path: Path, output: Path
) -> None:
    table, coordinates = points.read_table(path, options.space)
    start, end = ends if options.origin == "fixed" else (ends[1], ends[0])
    if table.space == "voxel" and (start is None or end is None):
        missing = [f"--{name}" for name, image in zip(("fixed", "moving"), ends, strict=True) if image is None]
        raise BadInput(f"{path} is in voxels of its image, to become those of the other; give {' and '.join(missing)}.")
    way = chain if options.origin == "fixed" else backwards(chain)
    found, errors = followed(points.to_ras(coordinates, table.space, start), way)
    _tell_missed(errors, f"points of {path}")
    points.write_table(output, table, points.from_ras(found, table.space, end))
    other = "moving" if options.origin == "fixed" else "fixed"
    print(f"{path}: {len(found)} points of the {options.origin} image, now of the {other} image, in {table.space}.")


def _tell_missed(errors: np.ndarray, what: str) -> None:
    missed = np.count_nonzero(errors > MISSED)
    if missed:
        print(
            f"Warning: {missed} of {len(errors)} {what} ({100 * missed / len(errors):.2g} %) have no inverse that was "
            f"found to {MISSED:g} voxels, up to {errors.max():.3g} voxels off, as where a field folds or tears."
        )


def _tell_notes(volume: Volume, where: np.ndarray) -> None:
    """What had to be settled in reading an image, and whether any of it is seen."""
    for note in volume.notes:
        print(f"Warning: {note}")
    back = np.linalg.inv(volume.affine)
    voxels = where @ back[:3, :3].T + back[:3, 3]
    if not ((voxels >= -0.5) & (voxels < np.array(volume.array.shape) - 0.5)).all(axis=1).any():
        print(f"Warning: {volume.path} lies nowhere on the output's grid; are these its transform and direction?")


def _parser() -> cli.Arguments:
    parser = cli.Arguments(
        prog="dilformer apply", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--transform",
        nargs="+",
        required=True,
        metavar="FILE",
        help="fields and affines of ITK and ANTs, FSL, FreeSurfer, or voxel arrays, from fixed to moving image; "
        "'[FILE,1]' is the inverse of one",
    )
    parser.add_argument("--image", nargs="+", type=Path, default=[], metavar="FILE", help="images, also 4-D series")
    parser.add_argument("--labels", nargs="+", type=Path, default=[], metavar="FILE", help="label maps; ids are kept")
    parser.add_argument(
        "--points",
        nargs="+",
        type=Path,
        default=[],
        metavar="CSV",
        help="points: columns x_ras,y_ras,z_ras (or lps, voxel), or x,y,z with --space; other columns are kept",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="file of the result, or folder for results by their inputs' names"
    )
    parser.add_argument("--inverse", action="store_true", help="from the fixed image's grid onto the moving image's")
    parser.add_argument("--reference", type=Path, metavar="IMAGE", help="image whose grid the result gets")
    parser.add_argument(
        "--interpolation",
        choices=("linear", "cubic", "nearest", "argmax"),
        help="images: linear (by default), cubic, nearest; labels: nearest (by default), argmax, the largest share",
    )
    parser.add_argument(
        "--from", dest="origin", choices=("fixed", "moving"), help="which image the points are points of"
    )
    parser.add_argument("--space", choices=points.SPACES, help="of points in a table that does not say it")
    parser.add_argument(
        "--fixed", type=Path, metavar="IMAGE", help="fixed image of the transform, for points in voxels and FLIRT"
    )
    parser.add_argument(
        "--moving", type=Path, metavar="IMAGE", help="its moving image, for points in voxels and files of FSL"
    )
    cli.add_reading(parser, pairs=False)
    return parser


if __name__ == "__main__":
    main()
