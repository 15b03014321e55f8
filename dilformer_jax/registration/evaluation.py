"""A method over pairs of subjects, on the grids and at the resolution of their files: registered one after the other,
each scored while the next one is registered, and what is scored kept until all are."""

import json
import os
import platform
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import nibabel as nib
import numpy as np

from dilformer_jax.data.preprocessing import load
from dilformer_jax.data.subjects import Pair, Subject
from dilformer_jax.data.volumes import opened
from dilformer_jax.io import points
from dilformer_jax.io.headers import by
from dilformer_jax.io.volumes import BadInput, Volume, check_same_grid, replacing
from dilformer_jax.registration.methods import Method
from dilformer_jax.registration.scoring import Case, Scoring, row

RAW = {"normalise": "none"}  # the files' own voxels: a predictor does its preprocessing itself
WAITING = 2  # pairs that are registered and not yet scored: each keeps its volumes
THINNEST = 3  # voxels
TIMED_RUNS, TIMED_SECONDS = 5, 20.0


def check(pairs: Sequence[Pair], method: Method) -> None:
    """Raises BadInput, from the headers alone, where a pair does not share a grid or is too small for the method."""
    grids = {}
    for subject in dict.fromkeys(subject for pair in pairs for subject in (pair.fixed, pair.moving)):
        image = opened(subject)
        if image is not None:  # a bare array says nothing but in its whole
            # An array that takes no memory: only its shape is looked at.
            grids[subject] = Volume(
                np.broadcast_to(np.float32(0), image.shape[:3]), _affine(subject), subject.image, image.header
            )
    for pair in pairs:
        if pair.fixed in grids and pair.moving in grids:
            check_same_grid(grids[pair.fixed], grids[pair.moving])
            method.check_shape(grids[pair.fixed].array.shape, pair.fixed.image)
            _check_thick(grids[pair.fixed].array.shape, pair.fixed.image)


def scores(
    pairs: Sequence[Pair], method: Method, scoring: Scoring, kept: "Kept", *, backward: bool = False
) -> Iterator[dict[str, Any]]:
    """The row of each pair that `kept` does not have yet, kept as soon as it is scored.

    While one pair is registered the one before is scored and the next one read. With `backward` each is registered the
    other way round too. Raises BadInput as `registered` does.
    """
    left = [pair for pair in pairs if kept.row(pair) is None]
    waiting: deque[tuple[Pair, Future]] = deque()

    def scored() -> dict[str, Any]:
        pair, future = waiting.popleft()
        found = future.result()
        kept.keep(pair, found)
        return found

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as scorer:
        ahead = reader.submit(_read_pair, left[0]) if left else None
        for number, pair in enumerate(left, 1):
            assert ahead is not None
            volumes = ahead.result()
            ahead = reader.submit(_read_pair, left[number]) if number < len(left) else None
            case = _registered(pair, volumes, method, backward)
            waiting.append((pair, scorer.submit(row, case, scoring)))
            if len(waiting) == WAITING:
                yield scored()
        while waiting:
            yield scored()


def registered(pair: Pair, method: Method) -> Case:
    """Reads and registers a pair. Raises BadInput as reading and the method do, and where the grids differ."""
    return _registered(pair, _read_pair(pair), method, False)


def timing(pair: Pair, method: Method) -> dict[str, Any]:
    """How long the method takes for this pair, with nothing beside it: {"device", "compile_seconds", "median_seconds",
    "runs", "parameters"}.

    The median of up to `TIMED_RUNS` runs, each over when its displacement is in memory, after one that warms up and in
    as many as `TIMED_SECONDS` hold, one at least. What the warming up takes beyond that median counts as compilation.
    """
    fixed, moving = (volume for volume, _ in _read_pair(pair))
    start = time.perf_counter()
    if method.warms_up:
        method.compile(fixed.array.shape, fixed.path)
        method.displacement(fixed, moving)
    warm = time.perf_counter()
    seconds: list[float] = []
    while not seconds or (len(seconds) < TIMED_RUNS and time.perf_counter() - warm < TIMED_SECONDS):
        begin = time.perf_counter()
        method.displacement(fixed, moving)
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds)
    return {
        "device": device_name(),
        "pair": pair.name,
        "compile_seconds": max(0.0, warm - start - median) if method.warms_up else 0.0,
        "median_seconds": median,
        "runs": len(seconds),
        "parameters": method.parameters,
    }


def device_name() -> str:
    """What computes here, by name: the accelerator, or the processor with the number of its cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []  # not Linux
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or 'CPU'}, {os.cpu_count()} cores"


class Kept:
    """The rows of pairs that are scored, each in a file of its own in `folder`, until `clear` removes them.

    A row is found again only for the same pair of files, as they were then, and the same `settings`. Several processes
    that score shards of the same pairs may share the folder, which is made when the first row is kept.
    """

    def __init__(self, folder: Path, pairs: Sequence[Pair], settings: Mapping[str, Any]):
        self.folder = folder
        self._output_is_new = not folder.parent.exists()
        self.settings = json.loads(json.dumps(settings))
        self._paths = {pair: folder / f"{number:05d}.json" for number, pair in enumerate(pairs)}

    def row(self, pair: Pair) -> dict[str, Any] | None:
        """The row of this pair; None where there is none."""
        found = self._read(self._paths[pair], _state(pair))
        if found is not None:
            for name, values in found.items():
                if name.endswith("_per_label"):
                    found[name] = {int(label): value for label, value in values.items()}
        return found

    def keep(self, pair: Pair, found: Mapping[str, Any]) -> None:
        """Keeps the row of this pair. Raises BadInput where it cannot be written."""
        self._write(self._paths[pair], _state(pair), found)

    def timing(self, pair: Pair, method: Method) -> dict[str, Any]:
        """`timing` of this pair, measured once."""
        path = self.folder / "timing.json"
        found = self._read(path, _state(pair))
        if not found:
            self._write(path, _state(pair), {})  # before the work, where it cannot be written
            found = timing(pair, method)
            self._write(path, _state(pair), found)
        return found

    def clear(self) -> None:
        """Removes the files, and the folder if it has no others."""
        for path in [*self._paths.values(), self.folder / "timing.json"]:
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def give_up(self) -> None:
        """Leaves nothing behind where no pair was scored: nothing to go on from."""
        if self.folder.is_dir() and all(self.row(pair) is None for pair in self._paths):
            self.clear()
            if self._output_is_new and self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
                self.folder.parent.rmdir()

    def _read(self, path: Path, state: object) -> dict[str, Any] | None:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            same = record["settings"] == self.settings and record["state"] == state
            return record["found"] if same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, path: Path, state: object, found: Mapping[str, Any]) -> None:
        record = {"settings": self.settings, "state": state, "found": found}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                partial.write_text(json.dumps(record), encoding="utf-8")
        except OSError as error:
            raise BadInput(f"{self.folder} cannot be written ({error.strerror}); choose another place.") from error


def _state(pair: Pair) -> list[Any]:
    """What tells that the files of a pair are those that were scored."""
    files = [path for subject in (pair.fixed, pair.moving) for path in (subject.image, subject.labels) if path]
    files += pair.points or ()
    return [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _registered(pair: Pair, volumes: tuple, method: Method, backward: bool) -> Case:
    (fixed, fixed_labels), (moving, moving_labels) = volumes
    method.compile(fixed.array.shape, fixed.path)
    start = time.perf_counter()
    u = method.displacement(fixed, moving)
    seconds = time.perf_counter() - start
    other = method.displacement(moving, fixed) if backward else None
    return Case(pair, fixed, moving, fixed_labels, moving_labels, u, seconds, other, _points(pair, fixed, moving))


def _points(pair: Pair, fixed: Volume, moving: Volume) -> tuple[np.ndarray, np.ndarray] | None:
    """The landmarks of a pair, in voxels. Raises BadInput where they are not as many in both."""
    if pair.points is None:
        return None
    found = []
    for path, volume in zip(pair.points, (fixed, moving), strict=True):
        table, coordinates = points.read_table(path)
        found.append(points.from_ras(points.to_ras(coordinates, table.space, volume), "voxel", volume))
    if len(found[0]) != len(found[1]):
        raise BadInput(
            f"{pair.points[0]} has {len(found[0])} points and {pair.points[1]} {len(found[1])}; give landmarks that "
            "belong together, row by row."
        )
    return found[0], found[1]


def _read_pair(pair: Pair) -> tuple[tuple[Volume, np.ndarray | None], tuple[Volume, np.ndarray | None]]:
    (fixed, fixed_labels), (moving, moving_labels) = _read(pair.fixed), _read(pair.moving)
    check_same_grid(fixed, moving)
    _check_thick(fixed.array.shape, fixed.path)
    return (fixed, fixed_labels), (moving, moving_labels)


def _check_thick(shape: tuple[int, ...], path: Path) -> None:
    if min(shape) < THINNEST:
        raise BadInput(
            f"{path} is {by(shape)}, too thin to be scored: folding is looked for in {THINNEST} voxels or more along "
            "each axis."
        )


def _read(subject: Subject) -> tuple[Volume, np.ndarray | None]:
    image, labels = load(subject, RAW)  # kept in memory, so that each file is decoded once
    file = opened(subject)
    header = nib.nifti1.Nifti1Header() if file is None else file.header
    return Volume(image[..., 0], _affine(subject), subject.image, header), labels


def _affine(subject: Subject) -> np.ndarray:
    # Label maps of which images are made lie each in a frame of its own: voxels are compared, as those of bare arrays.
    file = opened(subject)
    return np.eye(4) if file is None or subject.seed is not None else file.affine
