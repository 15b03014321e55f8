"""Submissions to Learn2Reg, looked at as the organisers' script will, and for what it would score without a word."""

import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Float32
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax.io.headers import Reading
from dilformer_jax.io.learn2reg import FORMS, Pair, Task, read_displacement
from dilformer_jax.io.volumes import BadInput, read_image, replacing

SUFFIXES = (".npz", ".nii.gz")  # in the order in which the organisers look for them
STRIDE = 3  # of the voxels at which moved images are compared
WORSE = 0.02  # in correlation, which a registration that is one does not lose
READING = Reading(prefer="sform", assume_affine="RAS", nan="zero")  # only voxels count


@dataclass(frozen=True)
class Finding:
    """What is said of a pair's file: `faults`, for which the organisers refuse the submission or score nonsense, and
    `doubts`, for which they score it as it is."""

    faults: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    largest: float = 0.0  # component of the displacement, in voxels


@dataclass(frozen=True)
class _Files:
    """The files of a submission by their names: where they lie, in a folder or in a zip file."""

    places: Mapping[str, str]
    archive: zipfile.ZipFile | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.places

    @contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """The file on disk."""
        if self.archive is None:
            yield Path(self.places[name])
            return
        with tempfile.TemporaryDirectory(prefix="dilformer-learn2reg-") as folder:
            path = Path(folder) / name
            try:
                path.write_bytes(self.archive.read(self.places[name]))
            except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError) as error:  # the last where it is encrypted
                raise BadInput(f"{name} cannot be unpacked ({error}); pack it again.") from error
            yield path


def findings(task: Task, submission: Path, form: str = "nifti") -> Iterator[Finding]:
    """For each pair of the task what there is to say of its file in a folder or a zip file, where they may lie in one
    folder, and in the end of the whole. Raises BadInput where the submission is neither."""
    with _files(submission) as files:
        largest = []
        for pair in task.pairs:
            found = _of_pair(task, pair, files, submission, form)
            if not found.faults:
                largest.append(found.largest)
            yield found
        doubts = []
        expected = {f"{name}{suffix}" for pair in task.pairs for name in pair.names for suffix in SUFFIXES}
        extra = sorted(name for name in files.places if name.startswith("disp") and name not in expected)
        if extra:
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            doubts.append(f"{', '.join(extra[:3])}{more} in {submission} belong to no pair of {task.split}.")
        if largest and 0 < max(largest) <= 1:
            doubts.append(
                f"no displacement in {submission} exceeds {max(largest):.3g} voxels; they seem to be in normalised "
                "coordinates from -1 to 1, of which half the axis's length makes voxels."
            )
        yield Finding(doubts=tuple(doubts))


def write_zip(path: Path, task: Task, folder: Path, form: str = "nifti") -> None:
    """Packs the pairs' files, in a folder as LUMIR asks, of the zip file's own name. Raises BadInput where a file is
    missing or the zip file cannot be written."""
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:  # packed already
        for pair in task.pairs:
            names = [f"{name}{FORMS[form]}" for name in pair.names if (folder / f"{name}{FORMS[form]}").is_file()]
            if not names:
                raise BadInput(f"{folder / pair.names[0]}{FORMS[form]} is missing; register that pair first.")
            archive.write(folder / names[0], f"{path.stem}/{names[0]}")


def _of_pair(task: Task, pair: Pair, files: _Files, submission: Path, form: str) -> Finding:
    suffixes = (FORMS[form],) if form == "2021" else SUFFIXES
    there = [f"{name}{suffix}" for name in pair.names for suffix in suffixes if f"{name}{suffix}" in files]
    title = f"{PurePosixPath(pair.fixed).name} <- {PurePosixPath(pair.moving).name}"
    if not there:
        return Finding((f"{submission} has no {pair.names[0]}{FORMS[form]} for {title}{_instead(pair, files)}.",))
    if len(there) > 1:
        return Finding((f"{submission} has {' and '.join(there)} for {title}; leave one of them.",))
    try:
        with files.opened(there[0]) as path:
            u = read_displacement(path, task.shape, form)
    except BadInput as fault:
        return Finding((str(fault),))
    return Finding((), tuple(_doubts(task, pair, there[0], u)), float(np.abs(u).max()))


def _instead(pair: Pair, files: _Files) -> str:
    """What may be meant to be the file that is missing."""
    for name in pair.names:
        if f"{name}.nii" in files:
            return f"; {name}.nii is not compressed"
    (fixed, here), (moving, there) = pair.fixed_numbers, pair.moving_numbers
    first = "names the moving image first"
    for name, said in (
        (f"disp_{fixed}_{moving}", "does not name the modalities"),
        (f"disp_{moving}_{fixed}", first),
        (f"disp_{moving}_{there}_{fixed}_{here}", first),
    ):
        for suffix in SUFFIXES:
            if name not in pair.names and f"{name}{suffix}" in files:
                return f"; {name}{suffix} {said}"
    return ""


def _doubts(task: Task, pair: Pair, name: str, u: Float32[np.ndarray, "_ _ _ 3"]) -> Iterator[str]:
    for axis, size in enumerate(task.shape):
        component = np.moveaxis(u[..., axis], axis, 0)
        means = component.reshape(size, -1).mean(axis=1, dtype=np.float64)
        # Slope of the displacement along its own axis: 1 for positions, far less for displacements.
        slope = np.polyfit(np.arange(size), means, 1)[0] if size > 1 else 0.0
        if slope > 0.8:
            yield f"{name} seems to hold places, not displacements: it grows by {slope:.2g} a voxel along axis {axis}."
            return
    largest = np.abs(u).max(axis=(0, 1, 2))
    if (largest > task.shape).any():
        yield f"{name} displaces by up to {largest.max():.4g} voxels, farther than the images are large."
        return
    if task.one_modality and u.any():
        images = [task.image(path) for path in (pair.fixed, pair.moving)]
        if all(path.is_file() for path in images):
            before, after = _alike(images[0], images[1], u)
            if after < before - WORSE:
                yield (
                    f"{name} makes the images less alike (correlation {before:.3f} -> {after:.3f}); its axes, its "
                    "direction or its unit may be wrong."
                )


def _alike(fixed: Path, moving: Path, u: Float32[np.ndarray, "_ _ _ 3"]) -> tuple[float, float]:
    """The correlation of the fixed with the moving image, and with the moved one, at every third voxel."""
    still, other = (read_image(path, READING).array for path in (fixed, moving))
    if not still.shape == other.shape == u.shape[:3]:
        raise BadInput(
            f"{fixed} and {moving} are {still.shape} and {other.shape}, not {u.shape[:3]} as dataset.json says."
        )
    some = (slice(None, None, STRIDE),) * 3
    places = np.moveaxis(np.indices(u.shape[:3], np.float32)[(slice(None), *some)], 0, -1) + u[some]
    moved = ndimage.map_coordinates(other, np.moveaxis(places, -1, 0), order=1, mode="nearest")
    correlation = lambda image: float(np.corrcoef(still[some].ravel(), image.ravel())[0, 1])
    return correlation(other[some]), correlation(moved)


@contextmanager
def _files(submission: Path) -> Iterator[_Files]:
    if submission.is_dir():
        yield _Files({path.name: str(path) for path in sorted(submission.iterdir()) if path.is_file()})
        return
    try:
        archive = zipfile.ZipFile(submission)
    except (OSError, zipfile.BadZipFile) as error:
        raise BadInput(f"{submission} is neither a folder nor a zip file ({error}); give a submission.") from error
    with archive:
        members = [PurePosixPath(name) for name in archive.namelist() if not name.endswith("/")]
        # What a Mac's Finder packs beside them is left out by the challenge's platform too.
        members = [member for member in members if "__MACOSX" not in member.parts and not member.name.startswith(".")]
        folders = sorted({str(member.parent) for member in members})
        if len(folders) > 1:
            raise BadInput(
                f"{submission} has files in {len(folders)} folders ({', '.join(folders[:3])}); pack the displacements "
                "into one."
            )
        yield _Files({member.name: str(member) for member in members}, archive)
