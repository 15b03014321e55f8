"""A data set prepared: every subject written as NIfTI on one grid, kept ready for training, and described.

The output has NAME_t1.nii.gz and NAME_seg.nii.gz, `cache/`, which training maps into memory, and in the end
`dataset.json`, which `prepared` reads. Meanwhile `preparation.jsonl` tells, in a line for every subject, what is done,
so that a preparation that was stopped goes on where it stopped.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dilformer_jax.data import journal
from dilformer_jax.data.origins import ORIGINS, missing
from dilformer_jax.data.prepared import FILE, FORMAT, pairing
from dilformer_jax.data.preprocessing import load
from dilformer_jax.data.standardisation import (
    Aligner,
    Grid,
    Settings,
    Space,
    header_grid,
    standardised,
    template_space,
    told_by,
)
from dilformer_jax.data.subjects import SPLITS, Dataset, Subject, everyone
from dilformer_jax.data.volumes import files_of, image_of
from dilformer_jax.io.bare import is_bare
from dilformer_jax.io.folders import digest
from dilformer_jax.io.geometry import corner_distance
from dilformer_jax.io.headers import TOLERANCE_MM, BadInput, by
from dilformer_jax.io.volumes import replacing, write_image, write_labels

VERSION = 1  # raise it whenever the same files and settings come to give other voxels


@dataclass(frozen=True)
class Preparation:
    """What is to be prepared.

    name: of the data set, by which its reader knows what is prepared of it. align: a subject's name, or an image's
    file, that all are aligned to affinely. preprocessing: that of the training whose volumes are to be kept in
    `cache/`; None keeps none there. options: with which the data set was read, since they make its splits.
    """

    name: str
    dataset: Dataset
    source: Path
    output: Path
    settings: Settings = Settings()
    align: str | None = None
    preprocessing: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """A subject that is prepared, whether by an earlier start already, and sentences about it."""

    name: str
    kept: bool
    notes: tuple[str, ...]


def prepare(what: Preparation, aligner: Aligner | None = None, *, jobs: int = 1) -> Iterator[Done]:
    """Prepares the subjects, `jobs` at a time, yields each as it is done, and at last writes `dataset.json`.

    Raises BadInput for what cannot be read or brought to one grid, for names that two subjects share, and for an
    output folder that holds anything else, or the same with other settings: this one before anything is written.
    """
    brains = everyone(what.dataset)
    subjects = [same[0] for same in brains.values()]
    _check_names(what, subjects)
    space = _space(what, subjects, aligner)
    common = _common(what, subjects, space)
    order = _settings(what)
    done = journal.begun(what.output, order)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(_one, what, same, space, aligner, done.get(name)) for name, same in brains.items()]
        records: dict[str, dict[str, Any]] = {}
        try:
            for subject, future in zip(subjects, waiting, strict=True):
                record, kept = future.result()
                told = record["grid"]
                common = common or (subject, told)
                if told != common[1]:
                    raise BadInput(_differ(common[0], common[1], subject, told))
                if not kept:
                    journal.add(what.output, record)
                records[subject.name] = record
                yield Done(subject.name, kept, tuple(record["notes"]))
        finally:
            for future in waiting:
                future.cancel()
    _describe(what, order, records)


def _one(
    what: Preparation, same: Sequence[Subject], space: Space, aligner: Aligner | None, before: Mapping[str, Any] | None
) -> tuple[dict[str, Any], bool]:
    """The record of a subject, which several files may hold, and whether it was done before by an earlier start."""
    subject = same[0]
    sources = {str(path): digest(path) for other in same for path in files_of(other)}
    target = Subject(
        subject.name,
        what.output / f"{subject.name}_t1.nii.gz",
        None if subject.labels is None else what.output / f"{subject.name}_seg.nii.gz",
    )
    outputs = files_of(target)
    kept = (
        before is not None
        and sorted(before["sources"].values()) == sorted(sources.values())
        and all(path.is_file() and before["outputs"].get(path.name) == digest(path) for path in outputs)
    )
    if kept:
        record = dict(before or {})
    else:
        _check_same(same)
        found = standardised(subject, what.settings, space, aligner)
        write_image(target.image, found.image.array, found.image)
        if target.labels is not None and found.labels is not None:
            write_labels(target.labels, found.labels.array, found.labels)
        record = {
            "name": subject.name,
            "sources": sources,
            "outputs": {path.name: digest(path) for path in outputs},
            "affine": None if found.affine is None else np.asarray(found.affine).tolist(),
            "grid": _listed(Grid(_shape(found.image.array), found.image.affine).told()),
            "notes": list(found.notes),
        }
    if what.preprocessing is not None:
        load(target, what.preprocessing, cache=what.output / "cache")
    return record, kept


def _describe(what: Preparation, order: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes `dataset.json`."""
    dataset = what.dataset
    shape, sides, axes = next(iter(records.values()))["grid"]
    says_axes = what.settings.reading.assume_affine is not None or not any(
        is_bare(subject.image) and subject.axes is None for same in everyone(dataset).values() for subject in same
    )
    origin = ORIGINS.get(what.name)
    content = {
        "format": FORMAT,
        "dataset": what.name,
        "licence": dataset.licence,
        "source": str(what.source.absolute()),
        "origin": origin.where if origin else None,
        "missing": missing(what.name, dataset),
        # Bare arrays do not say how they lie: their files then have an affine in name only.
        "grid": {"shape": shape, "spacing_mm": sides, "orientation": axes if says_axes else None},
        "labels": {str(id): dataset.names.get(id) for id in dataset.labels},
        "splits": {part: pairing(getattr(dataset, part)) for part in SPLITS},
        "subjects": {
            name: {
                "image": f"{name}_t1.nii.gz",
                "labels": f"{name}_seg.nii.gz" if f"{name}_seg.nii.gz" in record["outputs"] else None,
                "affine": record["affine"],
                "sha256": record["outputs"],
                "sources": record["sources"],
            }
            for name, record in records.items()
        },
        "settings": dict(order),
        "preprocessing": None if what.preprocessing is None else dict(what.preprocessing),
    }
    with replacing(what.output / FILE) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _settings(what: Preparation) -> dict[str, Any]:
    """What has to be the same for two preparations to go into one folder, as JSON gives it back."""
    align = what.align
    if align is not None and align not in everyone(what.dataset):
        align = f"{Path(align).name}, SHA-256 {digest(Path(align))}"
    settings = asdict(what.settings)
    reading = settings.pop("reading")
    del reading["nan"]  # what has none is the same either way
    order = {"dataset": what.name, "version": VERSION, "options": dict(what.options), "align": align}
    return json.loads(json.dumps({**order, **settings, **reading}))


def _check_names(what: Preparation, subjects: Sequence[Subject]) -> None:
    if not subjects:
        raise BadInput(f"{what.source} has no pairs to prepare; add the files of two subjects.")
    for subject in subjects:
        if subject.seed is not None:
            raise BadInput(
                f"{what.source} has label maps alone, of which training makes images; they need no preparation."
            )
        if "/" in subject.name or subject.name.startswith("."):
            raise BadInput(f"{subject.image} would be called {subject.name!r}; rename it.")
    inside = [
        path for subject in subjects for path in files_of(subject) if what.output.absolute() in path.absolute().parents
    ]
    if inside:
        raise BadInput(f"{inside[0]} lies in the output folder {what.output}; give another --output.")


def _space(what: Preparation, subjects: Sequence[Subject], aligner: Aligner | None) -> Space:
    """What the subjects have in common: the template's grid, or that of all of their files."""
    if what.align is not None:
        if aligner is None:
            raise ValueError(f"nothing to align to {what.align} with")
        chosen = next((subject for subject in subjects if subject.name == what.align), None)
        if chosen is None and not Path(what.align).is_file():
            raise BadInput(f"{what.align} is neither a subject of {what.source} nor a file; align to one of them.")
        template = chosen or Subject("template", Path(what.align), None)
        return template_space(image_of(template, what.settings.reading), what.settings, chosen.name if chosen else None)
    grids = [header_grid(subject, what.settings) for subject in subjects]
    known = [grid for grid in grids if grid is not None]
    first = known[0] if known else None
    shared = first is None or (len(known) == len(grids) and all(_alike(first, grid) for grid in known))
    return Space(shared)


def _alike(a: Grid, b: Grid) -> bool:
    return a.shape == b.shape and corner_distance(a.shape, a.affine, b.shape, b.affine) <= TOLERANCE_MM


def _common(what: Preparation, subjects: Sequence[Subject], space: Space) -> tuple[Subject, list] | None:
    """The first subject and the shape, voxel size and axes that all will have; None where only their files will show.

    Raises BadInput where the files' headers say that they will differ.
    """
    if space.template is not None:
        return None
    first: tuple[Subject, list] | None = None
    for subject in subjects:
        grid = header_grid(subject, what.settings)
        if grid is None:
            continue
        told = _listed(told_by(grid, what.settings))
        first = first or (subject, told)
        if told != first[1]:
            raise BadInput(_differ(first[0], first[1], subject, told))
    return first


def _differ(one: Subject, its: list, other: Subject, others: list) -> str:
    def said(told: list) -> str:
        return f"{by(told[0])} voxels of {by(told[1])} mm, {told[2]}"

    return (
        f"{other.image} would be {said(others)}, where {one.image} is {said(its)}; give --grid, --grid-spacing and "
        "--orientation to bring all to one."
    )


def _check_same(same: Sequence[Subject]) -> None:
    """Raises BadInput where files that hold one subject, by its name, do not hold the same image."""
    first, *others = same
    for other in others:
        if not np.array_equal(image_of(first).array, image_of(other).array):
            raise BadInput(f"{first.image} and {other.image} hold different images of {first.name}; rename one.")


def _listed(told: tuple) -> list:
    """As JSON gives it back."""
    return json.loads(json.dumps(told))


def _shape(array: np.ndarray) -> tuple[int, int, int]:
    d, h, w = array.shape
    return d, h, w
