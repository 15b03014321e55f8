"""Data sets as subjects, ordered pairs and splits. Nothing here decodes an image: `data/pipeline.py` does."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from dilformer_jax.data.phantoms import LABELS as PHANTOM_LABELS
from dilformer_jax.data.phantoms import phantom
from dilformer_jax.data.synthesis import STRUCTURES, options_of
from dilformer_jax.io.volumes import BadInput, Volume, read_labels, replacing, write_image, write_labels

SPLITS = ("train", "validation", "test")

# The 54 regions that are scored; 181 and 182 (cerebellum, brainstem) lie partly outside the image.
LPBA40_LABELS = (
    *range(21, 35), *range(41, 51), *range(61, 69), *range(81, 93), 101, 102, 121, 122, *range(161, 167),
)  # fmt: skip
# TransMorph's "VOI-30", as the FreeSurfer ids that its pickles hold.
IXI_LABELS = (
    2, 3, 4, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 28, 31, 41, 42, 43, 46, 47, 49, 50, 51, 52, 53, 54, 60, 63,
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One brain: the file of its image and that of its labels, if it has any; one and the same for a pickle of both.

    Where there is a `seed`, both are its label map, and its image is what `synthesis.t1_like` makes of that.
    """

    name: str
    image: Path
    labels: Path | None
    seed: int | None = None


@dataclass(frozen=True)
class Pair:
    """The moving subject is registered to the fixed one."""

    fixed: Subject
    moving: Subject

    @property
    def name(self) -> str:
        return f"{self.moving.name}_to_{self.fixed.name}"


@dataclass(frozen=True)
class Dataset:
    """Pairs to train on, to choose by and to report, the label ids that are scored, and what its licence allows.

    Where there are options of `synthesis`, training makes an image of the label maps anew at every step.
    """

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]
    labels: tuple[int, ...]
    licence: str
    synthesis: Mapping[str, Any] | None = None


def split(dataset: Dataset, name: str) -> tuple[Pair, ...]:
    """The pairs of a split; BadInput when there is no such split or nothing in it."""
    if name not in SPLITS:
        raise BadInput(f"'{name}' is not a split; choose one of {', '.join(SPLITS)}.")
    pairs = getattr(dataset, name)
    if not pairs:
        counts = ", ".join(f"{len(getattr(dataset, other))} in {other}" for other in SPLITS)
        raise BadInput(f"The {name} split has no pairs ({counts}); add its subjects' files or choose another split.")
    return pairs


def ordered_pairs(subjects: Sequence[Subject]) -> tuple[Pair, ...]:
    """All n (n - 1) pairs of two different subjects, by moving subject, then by fixed subject."""
    return tuple(Pair(fixed, moving) for moving in subjects for fixed in subjects if fixed is not moving)


def lpba40(directory: Path | str) -> Dataset:
    """LPBA40: S01_t1.nii.gz, S01_seg.nii.gz ... S40. Train on S11-S34, choose on S35-S40, report on S01-S10.

    Raises BadInput when the folder has none of these files.
    """
    directory = Path(directory)

    def subjects(first: int, last: int) -> list[Subject]:
        return _named(directory, [f"S{number:02d}" for number in range(first, last + 1)])

    train, validation, test = subjects(11, 34), subjects(35, 40), subjects(1, 10)
    if not train + validation + test:
        raise BadInput(
            f"{directory} {_found(directory)}, but none of S01_t1.nii.gz ... S40_t1.nii.gz (with S01_seg.nii.gz ...); "
            "give the folder that holds the LPBA40 volumes."
        )
    return Dataset(
        ordered_pairs(train),
        ordered_pairs(validation),
        ordered_pairs(test),
        LPBA40_LABELS,
        "LPBA40, LONI, UCLA: non-commercial research use only; not redistributable.",
    )


def ixi_2mm(directory: Path | str) -> Dataset:
    """Twelve IXI brains at 2 mm, NAME_t1.nii.gz and NAME_seg.nii.gz: by name, the first eight train, four choose."""
    directory = Path(directory)
    names = sorted(path.name.removesuffix("_t1.nii.gz") for path in directory.glob("*_t1.nii.gz"))
    subjects = _named(directory, names)
    if not subjects:
        raise BadInput(f"{directory} {_found(directory)}, but no NAME_t1.nii.gz; give the folder of 2 mm IXI brains.")
    licence = "IXI, brain-development.org: CC BY-SA 3.0."
    return Dataset(ordered_pairs(subjects[:8]), ordered_pairs(subjects[8:]), (), label_ids(subjects), licence)


def ixi(directory: Path | str) -> Dataset:
    """IXI as TransMorph distributes it: atlas.pkl and Train/, Val/, Test/ with subject_<id>.pkl, each (image, labels).

    The atlas is the moving image of every pair. The pickles hold FreeSurfer ids; the 30 structures that TransMorph
    scores are named by those ids here, so that nothing is renumbered. Raises BadInput without an atlas or any subject.
    """
    directory = Path(directory)
    wanted = "give the folder IXI_data of TransMorph's IXI archive (atlas.pkl, Train/, Val/, Test/)."
    if not (directory / "atlas.pkl").is_file():
        raise BadInput(f"{directory} {_found(directory)}, but no atlas.pkl; {wanted}")
    atlas = Subject("atlas", directory / "atlas.pkl", directory / "atlas.pkl")

    def pairs(folder: str) -> tuple[Pair, ...]:
        # Shorter names first: by number although the numbers are not padded.
        paths = sorted((directory / folder).glob("subject_*.pkl"), key=lambda path: (len(path.name), path.name))
        return tuple(Pair(Subject(path.stem, path, path), atlas) for path in paths)

    train, validation, test = pairs("Train"), pairs("Val"), pairs("Test")
    if not train + validation + test:
        raise BadInput(f"{directory} has an atlas.pkl, but no subject_<id>.pkl in Train/, Val/ or Test/; {wanted}")
    licence = "IXI, brain-development.org, preprocessed by the authors of TransMorph: CC BY-SA 3.0."
    return Dataset(train, validation, test, IXI_LABELS, licence)


def folder(directory: Path | str, *, validation: float | int = 0.2) -> Dataset:
    """The NIfTI files of a folder. NAME_seg or NAME_labels is the label map of NAME_t1, NAME_T1w or NAME.

    By name, the last share `validation` of the subjects (two at least) is kept to choose by and the others train; with
    fewer than four subjects, or with 0, all train. All ids in the label maps are scored: none without label maps.

    Raises BadInput for a folder with fewer than two images, a label map without an image, or two files for one NAME.
    """
    directory = Path(directory)
    images: dict[str, Path] = {}
    maps: dict[str, Path] = {}
    for path in sorted([*directory.glob("[!.]*.nii"), *directory.glob("[!.]*.nii.gz")]):
        name = stem(path)
        is_map = name.endswith(("_seg", "_labels"))
        suffixes = ("_seg", "_labels") if is_map else ("_t1", "_T1w")
        name = next((name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix)), name)
        kind = maps if is_map else images
        if name in kind:
            what = "label maps" if is_map else "images"
            raise BadInput(f"{kind[name]} and {path.name} are both {what} of {name}; keep one.")
        kind[name] = path
    for name in maps:
        if name not in images:
            raise BadInput(f"{maps[name]} is a label map without an image; add {name}_t1.nii.gz or move it elsewhere.")
    if len(images) < 2:
        raise BadInput(
            f"{directory} {_found(directory)}, {len(images)} of them NIfTI images; "
            "put two or more NAME_t1.nii.gz directly into it."
        )
    subjects = [Subject(name, path, maps.get(name)) for name, path in sorted(images.items())]
    kept = max(2, round(validation * len(subjects))) if validation > 0 and len(subjects) >= 4 else 0
    if len(subjects) - kept < 2:
        raise BadInput(f"{directory} has {len(subjects)} images, {kept} for validation; leave two for training.")
    train, held = subjects[: len(subjects) - kept], subjects[len(subjects) - kept :]
    licence = f"that of the files in {directory}"
    return Dataset(ordered_pairs(train), ordered_pairs(held), (), label_ids(subjects), licence)


def pairs_csv(path: Path | str) -> Dataset:
    """Pairs as a table: columns fixed, moving and, optional, fixed_labels, moving_labels and split.

    `split` is train, validation or test; without this column every row is in all three, so that a network trained on
    the table is validated on what it was trained on. Relative paths start at the folder of the table. BadInput names
    the row, counted with the heading as row 1.
    """
    path = Path(path)
    if not path.is_file():
        fault = "is a folder" if path.is_dir() else "does not exist"
        raise BadInput(f"{path} {fault}; give a CSV file with columns fixed,moving,fixed_labels,moving_labels.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            columns = [column.strip() for column in table.fieldnames or []]
            rows = [(table.line_num, row) for row in table]
    except (UnicodeDecodeError, csv.Error) as fault:
        raise BadInput(f"{path} is not a text table ({fault}); save it as CSV in UTF-8.") from fault
    if not {"fixed", "moving"} <= set(columns):
        raise BadInput(f"{path} has the columns {', '.join(columns) or '(none)'}; it needs fixed and moving.")
    if not rows:
        raise BadInput(f"{path} has no rows below its heading; add a pair: fixed,moving.")

    found: list[dict[str, Path]] = []
    parts: list[str] = []
    for number, row in rows:
        texts = {(column or "").strip(): value.strip() for column, value in row.items() if isinstance(value, str)}
        part = texts.pop("split", "")
        if "split" in columns and part not in SPLITS:
            raise BadInput(f"{path} row {number}: split is '{part}'; write one of {', '.join(SPLITS)}.")
        parts.append(part)
        files = {column: path.parent / Path(text).expanduser() for column, text in texts.items() if text}
        for column in ("fixed", "moving", "fixed_labels", "moving_labels"):
            if column in files and not files[column].is_file():
                raise BadInput(f"{path} row {number}: {column} {files[column]} does not exist; correct the path.")
            if column not in files and not column.endswith("_labels"):
                raise BadInput(f"{path} row {number}: {column} is empty; every row names a fixed and a moving image.")
        if ("fixed_labels" in files) != ("moving_labels" in files):
            raise BadInput(f"{path} row {number} has only one of the two label maps; give both or neither.")
        found.append(files)
    names = _distinct_names({files[role] for files in found for role in ("fixed", "moving")})

    def subject(files: dict[str, Path], role: str) -> Subject:
        return Subject(names[files[role]], files[role], files.get(f"{role}_labels"))

    pairs = tuple(Pair(subject(files, "fixed"), subject(files, "moving")) for files in found)
    ids = label_ids(subject for pair in pairs for subject in (pair.fixed, pair.moving))
    train, validation, test = (
        tuple(pair for pair, its in zip(pairs, parts, strict=True) if its in (part, "")) for part in SPLITS
    )
    return Dataset(train, validation, test, ids, f"that of the files named in {path}")


def phantoms(
    directory: Path | str,
    *,
    train: int = 24,
    validation: int = 6,
    shape: tuple[int, int, int] = (64, 80, 64),
    seed: int = 0,
) -> Dataset:
    """Brain-like volumes at 1 mm, written as NIfTI into the directory once; calling again adds only what is missing.

    Raises BadInput when the directory holds phantoms of another shape or seed, and for a shape too small for a brain.
    """
    if len(shape) != 3 or min(shape) < 32 or seed < 0:
        raise BadInput(
            f"Phantoms take 32 voxels or more along three axes and a seed of 0 or more, not {shape} and {seed}."
        )
    directory, (d, h, w) = Path(directory), shape
    record, settings = directory / "phantoms.json", {"shape": list(shape), "seed": seed}
    if record.is_file() or any(directory.glob("phantom_*.nii.gz")):
        try:
            found = json.loads(record.read_text())
        except (OSError, ValueError):
            found = "settings that are not recorded"
        if found != settings:
            raise BadInput(f"{directory} holds phantoms made with {found}, not {settings}; give another directory.")
    else:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{directory} cannot be made ({error.strerror}); choose another place.") from error
        with replacing(record) as unfinished:
            unfinished.write_text(json.dumps(settings))
    subjects = []
    for number in range(train + validation):
        name = f"phantom_{number:03d}"
        subject = Subject(name, directory / f"{name}_t1.nii.gz", directory / f"{name}_seg.nii.gz")
        assert subject.labels is not None
        if not (subject.image.is_file() and subject.labels.is_file()):
            # Far apart, so that the phantoms of two seeds are never the same ones.
            image, labels = phantom(1_000_000 * seed + number, (d, h, w))
            header = nib.nifti1.Nifti1Image(image, np.eye(4)).header
            header.set_xyzt_units("mm")
            like = Volume(image, np.eye(4), subject.image, header)
            write_labels(subject.labels, labels, like)
            write_image(subject.image, image, like)
        subjects.append(subject)
    ids = tuple(sorted(set(PHANTOM_LABELS) - {0}))
    return Dataset(
        ordered_pairs(subjects[:train]), ordered_pairs(subjects[train:]), (), ids, "made by dilformer_jax: Apache-2.0."
    )


def label_maps(directory: Path | str, *, validation: int = 4, synthesis: Mapping[str, Any] | None = None) -> Dataset:
    """Label maps alone, seg_*.nii.gz, of which images are made with these options of `data.synthesis`. By name, the
    last `validation` of them are kept to choose by, as T1-like images that are the same ones every time.

    Raises BadInput for a folder with too few of them and for options that there are not.
    """
    directory = Path(directory)
    paths = sorted(directory.glob("seg_*.nii.gz"))
    if validation < 2 or len(paths) < validation + 2:
        raise BadInput(
            f"{directory} {_found(directory)}, {len(paths)} of them seg_*.nii.gz, and {validation} are for validation; "
            "give two or more for that and two to train on."
        )
    subjects = [Subject(stem(path), path, path, seed) for seed, path in enumerate(paths)]
    return Dataset(
        ordered_pairs(subjects[:-validation]),
        ordered_pairs(subjects[-validation:]),
        (),
        STRUCTURES,
        f"that of the label maps in {directory}",
        options_of(synthesis or {}),
    )


DATASETS: dict[str, Callable[..., Dataset]] = {
    "lpba40": lpba40,
    "ixi_2mm": ixi_2mm,
    "ixi": ixi,
    "folder": folder,
    "pairs_csv": pairs_csv,
    "phantoms": phantoms,
    "label_maps": label_maps,
}


def label_ids(subjects: Iterable[Subject]) -> tuple[int, ...]:
    """The ids, without 0, in the NIfTI label maps of the subjects together."""
    paths = {subject.labels for subject in subjects if subject.labels is not None}
    ids = {int(value) for path in sorted(paths) for value in np.unique(read_labels(path).array)}
    return tuple(sorted(ids - {0}))


def stem(path: Path) -> str:
    """The file name without .nii, .nii.gz or .pkl."""
    return path.name.removesuffix(".gz").removesuffix(".nii").removesuffix(".pkl")


def _named(directory: Path, names: Sequence[str]) -> list[Subject]:
    """Those of the subjects NAME_t1.nii.gz that are there, with their NAME_seg.nii.gz."""
    subjects = []
    for name in names:
        image, labels = directory / f"{name}_t1.nii.gz", directory / f"{name}_seg.nii.gz"
        if image.is_file():
            subjects.append(Subject(name, image, labels if labels.is_file() else None))
    return subjects


def _found(directory: Path) -> str:
    """What a directory is, for the middle of a sentence."""
    if not directory.is_dir():
        return "is a file" if directory.exists() else "does not exist"
    count = sum(1 for path in directory.iterdir() if path.is_file())
    return f"has {count} file{'s' * (count != 1)}"


def _distinct_names(paths: set[Path]) -> dict[Path, str]:
    """File stems, or where two files have the same one, all that the paths do not have in common."""
    names = {path: stem(path) for path in paths}
    if len(set(names.values())) == len(paths):
        return names
    shared = os.path.commonpath([path.absolute().parent for path in paths])
    return {path: "-".join(path.absolute().relative_to(shared).parts) for path in paths}
