"""Data sets of one's own: a folder, files by glob, pairs in a table."""

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path

from dilformer_jax.data.prepared import recognised
from dilformer_jax.data.subjects import SPLITS, Dataset, Pair, Subject, described, ordered_pairs, stem
from dilformer_jax.data.volumes import label_ids
from dilformer_jax.io.bare import has_labels, is_bare
from dilformer_jax.io.volumes import BadInput


def folder(directory: Path | str, *, validation: float | int = 0.2, test: float | int = 0.0) -> Dataset:
    """The files of a folder: NIfTI, or bare arrays with their labels in them, (image, labels) .pkl and VoxelMorph's
    .npz of `vol` and `seg`. NAME_seg or NAME_labels is the label map of NAME_t1, NAME_T1w or NAME.

    By name, the last share `test` of the subjects (two at least, none for 0) is kept to be reported, the share
    `validation` of all (likewise) before them to choose by, and the others train; with fewer than four subjects all
    train. All ids in the label maps are scored: none without label maps.

    Raises BadInput for a folder with fewer than two images, a label map without an image, or two files for one NAME.
    """
    directory = Path(directory)
    if (dataset := recognised(directory, "folder")) is not None:
        return dataset
    images: dict[str, Path] = {}
    maps: dict[str, Path] = {}
    for path in sorted(path for end in (".nii", ".nii.gz", ".pkl", ".npz") for path in directory.glob(f"[!.]*{end}")):
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
            f"{directory} {described(directory)}, {len(images)} of them NIfTI images; "
            "put two or more NAME_t1.nii.gz directly into it."
        )
    subjects = [Subject(name, path, maps.get(name) or _own_labels(path)) for name, path in sorted(images.items())]
    return _dataset(directory, subjects, validation, test)


def glob(
    directory: Path | str,
    *,
    images: str,
    labels: str | None = None,
    validation: float | int = 0.2,
    test: float | int = 0.0,
) -> Dataset:
    """The files below a folder that match a pattern such as images="sub-*/anat/*_T1w.nii.gz", with the label maps that
    match another, if there are any. `validation`, `test` and the rest as in `folder`.

    A subject's name is what the last wildcard stands for that tells the subjects apart, sub-01 in this pattern, or all
    such wildcards together where no single one does. A label map belongs to the image for which the wildcards stand for
    the same, or, where that is so for none, to the image that has its name.

    Raises BadInput for fewer than two images and for a label map without an image.
    """
    directory = Path(directory)
    if (dataset := recognised(directory, "glob")) is not None:
        return dataset
    found = _matching(directory, images)
    if len(found) < 2:
        raise BadInput(
            f"{directory} {described(directory)} and {len(found)} images that match {images!r}; give the folder that "
            "the pattern starts at, and a pattern of two images or more."
        )
    names = dict(zip(found, _telling(list(found)), strict=True))
    maps: dict[str, Path] = {}
    others = {} if labels is None else _matching(directory, labels)
    alike = any(parts in names for parts in others)
    for parts, name in zip(others, _telling(list(others)), strict=True):
        name = names.get(parts, "") if alike else name
        if name not in names.values():
            raise BadInput(f"{others[parts]} is a label map without an image that matches {images!r}; mend a pattern.")
        maps[name] = others[parts]
    if labels is not None and not maps:
        raise BadInput(f"{directory} has no label maps that match {labels!r}; mend the pattern or leave it out.")
    subjects = [
        Subject(name, found[parts], maps.get(name) or _own_labels(found[parts])) for parts, name in names.items()
    ]
    return _dataset(directory, sorted(subjects, key=lambda subject: subject.name), validation, test)


def _dataset(directory: Path, subjects: Sequence[Subject], validation: float | int, test: float | int) -> Dataset:
    """The last shares of the subjects are kept, as `folder` says."""
    count = len(subjects)
    for name, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            raise BadInput(f"{name} is {share}, of {directory}; give a share of the subjects, from 0 to less than 1.")
    chosen, reported = (max(2, round(share * count)) if share > 0 and count >= 4 else 0 for share in (validation, test))
    first, second = count - chosen - reported, count - reported
    if first < 2:
        raise BadInput(
            f"{directory} has {count} images, {chosen} for validation and {reported} for test; leave two for training."
        )
    return Dataset(
        ordered_pairs(subjects[:first]),
        ordered_pairs(subjects[first:second]),
        ordered_pairs(subjects[second:]),
        label_ids(subjects),
        f"that of the files in {directory}",
    )


def _own_labels(path: Path) -> Path | None:
    """The file itself where it has labels beside its image."""
    return path if is_bare(path) and has_labels(path) else None


def _matching(directory: Path, pattern: str) -> dict[tuple[str, ...], Path]:
    """The files that match a pattern, by what its wildcards stand for, in order."""
    parts = re.split(r"(\*\*/|\[[^]]*\]|[*?])", pattern)
    forms = {"**/": "((?:[^/]+/)*)", "*": "([^/]*)", "?": "([^/])"}
    regex = "".join(
        re.escape(part) if index % 2 == 0 else forms.get(part, f"({part})".replace("[!", "[^"))
        for index, part in enumerate(parts)
    )
    found = {}
    try:
        paths = sorted(path for path in directory.glob(pattern) if path.is_file() and not path.name.startswith("."))
    except (ValueError, NotImplementedError) as fault:
        raise BadInput(f"{pattern!r} is no pattern of files below a folder ({fault}); mend it.") from fault
    for path in paths:
        match = re.fullmatch(regex, path.relative_to(directory).as_posix())
        if match:
            found[match.groups()] = path
    return found


def _telling(matches: Sequence[tuple[str, ...]]) -> list[str]:
    """A name for each match: the last of its parts that tells all apart, else those that are not the same in all."""
    columns = [[part.strip("/").replace("/", "-") for part in column] for column in zip(*matches, strict=True)]
    for column in reversed(columns):
        if len(set(column)) == len(matches):
            return column
    varying = [column for column in columns if len(set(column)) > 1]
    return ["-".join(part for part in parts if part) for parts in zip(*varying, strict=True)]


def pairs_csv(path: Path | str) -> Dataset:
    """Pairs as a table: columns fixed, moving and, optional, fixed_labels, moving_labels, split, and fixed_points,
    moving_points, which name tables of landmarks (`io.points`), one for one.

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
        for column in ("fixed", "moving", "fixed_labels", "moving_labels", "fixed_points", "moving_points"):
            if column in files and not files[column].is_file():
                raise BadInput(f"{path} row {number}: {column} {files[column]} does not exist; correct the path.")
            if column not in files and column in ("fixed", "moving"):
                raise BadInput(f"{path} row {number}: {column} is empty; every row names a fixed and a moving image.")
        for kind, what in (("labels", "label maps"), ("points", "tables of points")):
            if (f"fixed_{kind}" in files) != (f"moving_{kind}" in files):
                raise BadInput(f"{path} row {number} has only one of the two {what}; give both or neither.")
        found.append(files)
    names = _distinct_names({files[role] for files in found for role in ("fixed", "moving")})

    def subject(files: dict[str, Path], role: str) -> Subject:
        return Subject(names[files[role]], files[role], files.get(f"{role}_labels"))

    def points(files: dict[str, Path]) -> tuple[Path, Path] | None:
        return (files["fixed_points"], files["moving_points"]) if "fixed_points" in files else None

    pairs = tuple(Pair(subject(files, "fixed"), subject(files, "moving"), points(files)) for files in found)
    ids = label_ids(subject for pair in pairs for subject in (pair.fixed, pair.moving))
    train, validation, test = (
        tuple(pair for pair, its in zip(pairs, parts, strict=True) if its in (part, "")) for part in SPLITS
    )
    return Dataset(train, validation, test, ids, f"that of the files named in {path}")


def _distinct_names(paths: set[Path]) -> dict[Path, str]:
    """File stems, or where two files have the same one, all that the paths do not have in common."""
    names = {path: stem(path) for path in paths}
    if len(set(names.values())) == len(paths):
        return names
    shared = os.path.commonpath([path.absolute().parent for path in paths])
    return {path: "-".join(path.absolute().relative_to(shared).parts) for path in paths}
