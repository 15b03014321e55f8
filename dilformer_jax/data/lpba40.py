"""LPBA40 in the forms in which it goes round: NIfTI by subject number, LONI's archive, TransMatch's, RDP's pickles."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Integer
from nibabel.nifti1 import Nifti1Header

from dilformer_jax.data import structures
from dilformer_jax.data.prepared import recognised
from dilformer_jax.data.subjects import Dataset, Subject, described, named, numbered, ordered_pairs
from dilformer_jax.io.geometry import is_orientation
from dilformer_jax.io.headers import ASKING, BadInput, Reading, load
from dilformer_jax.io.volumes import read_labels

# The 54 regions that are scored; 181 and 182 (cerebellum, brainstem) lie partly outside the usual crop.
LPBA40_LABELS = tuple(id for id in structures.LPBA40 if id < 181)
LICENCE = "LPBA40, LONI, UCLA: non-commercial research use only; not redistributable."
# Of the archive "LPBA40 Subjects Delineation Space: MRI and label files in delineation space".
IMAGE, REGIONS = "delineation.skullstripped", "delineation.structure.label"
ENDS = (".nii.gz", ".nii", ".img.gz", ".img")
HELD_OUT = 6  # of RDP's training subjects, to choose by: S35-S40, if they are numbered as its script numbers them


def lpba40(directory: Path | str, *, axes: str | None = None) -> Dataset:
    """LPBA40, of which S11-S34 train, S35-S40 choose, S01-S10 are reported, all ordered pairs, in any of these forms:

      S01_t1.nii.gz, S01_seg.nii.gz ... S40_seg.nii.gz, or what `prepare` made.
      LONI's archive in delineation space, S01/S01.delineation.skullstripped.img.gz (or .img, .nii, .nii.gz; headers
        packed or not) with S01.delineation.structure.label.*, in the folder or up to two folders below. Analyze headers
        do not say where the axes point to: `axes` does, such as 'RAS', or else the regions of the first brain show it.
      TransMatch's: fixed.nii.gz, which is S01, train/S11.*.nii.gz, test/S02.*.nii.gz, and label/.
      RDP's: Train/ and Val/ with subject_<number>.pkl. Its script numbers the archive's subjects in order, so that
        subject_07 is S07 where it was run on all forty; which are in which folder it does not say. Its Val is what its
        figures are reported on, and is the test set here; the last six of Train are kept to choose by.

    Raises BadInput when the folder has none of these.
    """
    directory = Path(directory)
    if axes is not None and not is_orientation(axes):
        raise BadInput(f"axes is {axes!r}; name three such as 'RAS', one each of R or L, A or P, S or I.")
    if (dataset := recognised(directory, "lpba40")) is not None:
        return dataset
    if pickles := sorted(directory.glob("Train/subject_*.pkl"), key=numbered):
        test = sorted(directory.glob("Val/subject_*.pkl"), key=numbered)
        kept = HELD_OUT if len(pickles) >= HELD_OUT + 2 else 0
        return _dataset(*([Subject(path.stem, path, path) for path in paths] for paths in _parted(pickles, kept, test)))
    found = (
        {subject.name: subject for subject in named(directory, [f"S{number:02d}" for number in range(1, 41)])}
        or _archive(directory, axes)
        or _atlas_set(directory)
    )
    if not found:
        raise BadInput(
            f"{directory} {described(directory)}, but none of S01_t1.nii.gz ... S40_t1.nii.gz (with S01_seg.nii.gz "
            f"...), S01/S01.{IMAGE}.*, fixed.nii.gz with train/ and test/, and Train/subject_*.pkl; give the folder "
            "that holds the LPBA40 volumes."
        )
    parts = (range(11, 35), range(35, 41), range(1, 11))
    return _dataset(*([found[name] for n in part if (name := f"S{n:02d}") in found] for part in parts))


def axes_of(regions: Integer[np.ndarray, "d h w"]) -> str | None:
    """Where the array axes of a map of LPBA40's regions point to, such as 'RAS'; None where it has too few of them."""
    ends = {
        "RL": ([id for id in LPBA40_LABELS if id % 2 == 0], [id for id in LPBA40_LABELS if id % 2]),
        "AP": (list(range(21, 35)), list(range(61, 69))),  # frontal, occipital
        "SI": ([43, 44], [85, 86]),  # superior parietal, inferior temporal
    }
    letters: dict[int, str] = {}
    for names, (one, other) in ends.items():
        places = [np.argwhere(np.isin(regions, ids)) for ids in (one, other)]
        if not all(len(points) for points in places):
            return None
        way = places[0].mean(0) - places[1].mean(0)
        axis = int(np.abs(way).argmax())
        letters[axis] = names[0] if way[axis] > 0 else names[1]
    return "".join(letters[axis] for axis in range(3)) if len(letters) == 3 else None


def _archive(directory: Path, axes: str | None) -> dict[str, Subject]:
    """The subjects of LONI's archive by name."""
    found: dict[str, tuple[Path, Path | None]] = {}
    for below in ("", "*/", "*/*/"):
        for folder in sorted(directory.glob(f"{below}S[0-9][0-9]")):
            image, labels = (_first(folder, f"{folder.name}.{kind}") for kind in (IMAGE, REGIONS))
            if image is not None and folder.name not in found:
                found[folder.name] = image, labels
    if not found:
        return {}
    if axes is None and not _says_where(next(iter(found.values()))[0]):
        axes = _shown_axes(found)
    return {name: Subject(name, image, labels, axes=axes) for name, (image, labels) in found.items()}


def _says_where(image: Path) -> bool:
    header = load(image).header
    return isinstance(header, Nifti1Header) and bool(header["sform_code"] or header["qform_code"])


def _shown_axes(found: Mapping[str, tuple[Path, Path | None]]) -> str:
    """The axes of the archive's files by the regions of the first that has some."""
    for image, labels in found.values():
        if labels is None:
            continue
        reading = ASKING if _says_where(labels) else Reading(assume_affine="RAS")  # only the voxels matter here
        shown = axes_of(read_labels(labels, reading).array)
        if shown is not None:
            return shown
        raise BadInput(
            f"{labels} has too few regions to show how {image.name} lies; give data.options.axes, such as 'RAS'."
        )
    image = next(iter(found.values()))[0]
    raise BadInput(
        f"{image} does not say how it lies and has no {REGIONS} beside it; add it, or give axes such as 'RAS'."
    )


def _atlas_set(directory: Path) -> dict[str, Subject]:
    """The subjects of TransMatch's form by name."""
    base = next((f for f in (directory, *sorted(directory.glob("*/"))) if (f / "fixed.nii.gz").is_file()), None)
    if base is None:
        return {}
    paths = sorted([*base.glob("train/S??.*nii.gz"), *base.glob("test/S??.*nii.gz")])
    if not paths:
        return {}
    images = {"S01": base / "fixed.nii.gz"} | {path.name[:3]: path for path in paths}
    maps = {
        path.name[:3]: path
        for folder in (base.parent / "label", base / "label")
        for path in sorted(folder.glob(f"S??.{REGIONS}.nii.gz"))
    }
    return {name: Subject(name, path, maps.get(name)) for name, path in images.items()}


def _first(folder: Path, name: str) -> Path | None:
    return next((path for end in ENDS if (path := folder / f"{name}{end}").is_file()), None)


def _parted(paths: list[Path], kept: int, test: list[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    return paths[: len(paths) - kept], paths[len(paths) - kept :], test


def _dataset(train: list[Subject], validation: list[Subject], test: list[Subject]) -> Dataset:
    splits = ordered_pairs(train), ordered_pairs(validation), ordered_pairs(test)
    return Dataset(*splits, LPBA40_LABELS, LICENCE, names=structures.LPBA40)
