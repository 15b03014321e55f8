"""OASIS as neurite, Learn2Reg and TransMorph distribute it."""

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from dilformer_jax.data import structures
from dilformer_jax.data.prepared import recognised
from dilformer_jax.data.subjects import Dataset, Pair, Subject, described, numbered, ordered_pairs
from dilformer_jax.io.volumes import BadInput

LICENCE = (
    "OASIS-1, oasis-brains.org: OASIS data use agreement (cite HyperMorph, Hoopes et al., IPMI 2021, for neurite's)."
)
REPORTED = range(438, 458)  # the subjects of Learn2Reg's validation pairs of 2021, by their numbers in OASIS-1
SEGMENTATIONS = {"seg35": structures.OASIS, "seg4": structures.OASIS_TISSUES}


def oasis(directory: Path | str, *, segmentation: str = "seg35", aligned: bool = True, validation: int = 20) -> Dataset:
    """OASIS, 414 brains, of which the 19 pairs of Learn2Reg's validation set are reported, in any of these forms:

      neurite's: OASIS_OAS1_0001_MR1/ ... with aligned_norm.nii.gz and aligned_seg35.nii.gz or, by `segmentation`,
        aligned_seg4.nii.gz; where not `aligned`, norm.nii.gz and seg35.nii.gz, as the brains lay in the scanner. The
        pairs are those of 0438 to 0457, of two that follow each other, the first fixed.
      Learn2Reg's: imagesTr/, labelsTr/ and OASIS_dataset.json, which names the pairs (registration_val).
      TransMorph's: a folder of (image, labels) pickles, All/ or Train/, and Test/ with p_0438_0439.pkl ..., each
        (moving, fixed, moving labels, fixed labels): named as Learn2Reg names a displacement, fixed before moving.
      What `prepare` made of one of them.

    These pairs are the test set, since they are what is published. All ordered pairs of the others train, less the last
    `validation` subjects, which are kept to choose by, paired as the reported ones are; none where too few are left.

    Raises BadInput when the folder has none of these.
    """
    directory = Path(directory)
    if segmentation not in SEGMENTATIONS:
        raise BadInput(f"segmentation is {segmentation!r}; choose one of {', '.join(SEGMENTATIONS)}.")
    if (dataset := recognised(directory, "oasis")) is not None:
        return dataset
    subjects, test = (
        _neurite(directory, segmentation, aligned) or _learn2reg(directory) or _transmorph(directory) or ([], ())
    )
    if not subjects and not test:
        raise BadInput(
            f"{directory} {described(directory)}, but none of OASIS_OAS1_0001_MR1/aligned_norm.nii.gz, "
            "OASIS_dataset.json with imagesTr/, and All/ or Train/ with Test/p_0438_0439.pkl; give the folder that "
            "holds OASIS as neurite, Learn2Reg or TransMorph distribute it."
        )
    reported = {subject.name for pair in test for subject in (pair.fixed, pair.moving)}
    others = [subject for subject in subjects if subject.name not in reported]
    kept = validation if len(others) >= validation + 2 else 0
    names = SEGMENTATIONS[segmentation]
    return Dataset(
        ordered_pairs(others[: len(others) - kept]),
        _consecutive(others[len(others) - kept :]),
        test,
        tuple(names),
        LICENCE,
        names=names,
    )


Found = tuple[list[Subject], tuple[Pair, ...]]


def _neurite(directory: Path, segmentation: str, aligned: bool) -> Found | None:
    """Subjects and reported pairs in neurite's form, None where there is nothing in it."""
    image, labels = ("aligned_" * aligned + f"{kind}.nii.gz" for kind in ("norm", segmentation))
    subjects = []
    for folder in sorted(directory.glob("OASIS_OAS1_????_MR1")):
        if (folder / image).is_file():
            name, its_labels = folder.name.split("_")[2], folder / labels
            subjects.append(Subject(name, folder / image, its_labels if its_labels.is_file() else None))
    reported = [subject for subject in subjects if subject.name.isdigit() and int(subject.name) in REPORTED]
    return (subjects, _consecutive(reported)) if subjects else None


def _learn2reg(directory: Path) -> Found | None:
    """Likewise in Learn2Reg's form."""
    path = directory / "OASIS_dataset.json"
    if not path.is_file():
        return None

    def subject(text: str) -> Subject:
        image = directory / text
        labels = directory / text.replace("images", "labels", 1)
        if not image.is_file():
            raise BadInput(f"{image}, which {path.name} names, does not exist; unpack all of the archive.")
        name = re.sub(r"^OASIS_|_0000$", "", image.name.removesuffix(".nii.gz"))
        return Subject(name, image, labels if labels.is_file() else None)

    try:
        content = json.loads(path.read_text("utf-8"))
        images = [entry["image"] for entry in content["training"]]
        pairs = [(pair["fixed"], pair["moving"]) for pair in content["registration_val"]]
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise BadInput(f"{path} is damaged ({type(fault).__name__}: {fault}); unpack it again.") from fault
    found = {
        text: subject(text) for text in dict.fromkeys([*sorted(images), *(text for pair in pairs for text in pair)])
    }
    return list(found.values()), tuple(Pair(found[fixed], found[moving]) for fixed, moving in pairs)


def _transmorph(directory: Path) -> Found | None:
    """Likewise in TransMorph's form."""
    folder = next((folder for folder in ("Train", "All") if any(directory.glob(f"{folder}/*.pkl"))), "Train")
    paths = sorted(directory.glob(f"{folder}/*.pkl"), key=numbered)
    test = []
    for path in sorted(directory.glob("Test/p_*_*.pkl")):
        match = re.fullmatch(r"p_(\d+)_(\d+)", path.stem)
        if match:
            fixed, moving = (
                Subject(name, path, path, part=part)
                for name, part in zip(match.groups(), ("fixed", "moving"), strict=True)
            )
            test.append(Pair(fixed, moving))
    subjects = [Subject(path.stem, path, path) for path in paths]
    return (subjects, tuple(test)) if subjects or test else None


def _consecutive(subjects: Sequence[Subject]) -> tuple[Pair, ...]:
    """Each subject but the last as fixed image of the one that follows it."""
    return tuple(Pair(fixed, moving) for fixed, moving in pairwise(subjects))
