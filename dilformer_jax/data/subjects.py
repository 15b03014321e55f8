"""Data sets as subjects, ordered pairs and splits. Nothing here decodes an image: `data/volumes.py` does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dilformer_jax.io.volumes import BadInput

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Subject:
    """One brain: the file of its image and that of its labels, if it has any; one and the same where a file has both.

    Where there is a `seed`, both are its label map, and its image is what `synthesis.t1_like` makes of that. Of a file
    that holds the two brains of a pair, `part` says which this is, 'fixed' or 'moving'. `axes` says where the array
    axes point to, such as 'LPS', for files that do not.
    """

    name: str
    image: Path
    labels: Path | None
    seed: int | None = None
    part: str | None = None
    axes: str | None = None


@dataclass(frozen=True)
class Pair:
    """The moving subject is registered to the fixed one. `points` are tables of the landmarks that they have in common,
    of the fixed and of the moving image."""

    fixed: Subject
    moving: Subject
    points: tuple[Path, Path] | None = None

    @property
    def name(self) -> str:
        return f"{self.moving.name}_to_{self.fixed.name}"


@dataclass(frozen=True)
class Dataset:
    """Pairs to train on, to choose by and to report, the label ids that are scored, and what its licence allows.

    `names` has what is known of the structures' names, by id. Where there are options of `synthesis`, training makes
    an image of the label maps anew at every step.
    """

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]
    labels: tuple[int, ...]
    licence: str
    synthesis: Mapping[str, Any] | None = None
    names: Mapping[int, str] = field(default_factory=dict)


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


def subjects_of(pairs: Sequence[Pair]) -> tuple[Subject, ...]:
    """The subjects of the pairs, each once: moving before fixed, so that those of `ordered_pairs` keep their order."""
    return tuple(dict.fromkeys(subject for pair in pairs for subject in (pair.moving, pair.fixed)))


def everyone(dataset: Dataset) -> dict[str, tuple[Subject, ...]]:
    """The subjects of all splits by name; several of one name where several files hold one brain, as those of pairs."""
    found: dict[str, set[Subject]] = {}
    for pair in (*dataset.train, *dataset.validation, *dataset.test):
        for subject in (pair.fixed, pair.moving):
            found.setdefault(subject.name, set()).add(subject)
    order = lambda subject: (str(subject.image), str(subject.labels), subject.part or "")
    return {name: tuple(sorted(found[name], key=order)) for name in sorted(found)}


def named(directory: Path, names: Sequence[str]) -> list[Subject]:
    """Those of the subjects NAME_t1.nii.gz that are there, with their NAME_seg.nii.gz."""
    subjects = []
    for name in names:
        image, labels = directory / f"{name}_t1.nii.gz", directory / f"{name}_seg.nii.gz"
        if image.is_file():
            subjects.append(Subject(name, image, labels if labels.is_file() else None))
    return subjects


def stem(path: Path) -> str:
    """The file name without .nii, .nii.gz, .pkl or .npz."""
    name = path.name.removesuffix(".gz")
    return next((name.removesuffix(end) for end in (".nii", ".pkl", ".npz") if name.endswith(end)), name)


def numbered(path: Path) -> tuple[int, str]:
    """To sort files by the number in their names although the numbers are not padded: shorter names first."""
    return len(path.name), path.name


def described(directory: Path) -> str:
    """What a directory is, for the middle of a sentence."""
    if not directory.is_dir():
        return "is a file" if directory.exists() else "does not exist"
    count = sum(1 for path in directory.iterdir() if path.is_file())
    return f"has {count} file{'s' * (count != 1)}"
