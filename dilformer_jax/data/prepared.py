"""Data sets that `prepare` wrote: NIfTI files and `dataset.json`, which says what they are and how they pair."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dilformer_jax.data.subjects import SPLITS, Dataset, Pair, Subject, ordered_pairs, subjects_of
from dilformer_jax.io.volumes import BadInput

FILE = "dataset.json"
FORMAT = "dilformer_jax data set 1"  # Learn2Reg's archives have files of this name too


def prepared(directory: Path | str) -> Dataset:
    """The data set in a folder that `prepare` wrote. Raises BadInput where there is none, or not all of it."""
    directory = Path(directory)
    content = description(directory)
    if content is None:
        raise BadInput(
            f"{directory} has no {FILE} of a prepared data set; give a folder that `dilformer prepare` wrote."
        )
    return _dataset(directory, content)


def recognised(directory: Path, name: str) -> Dataset | None:
    """What was prepared of the data set of this name; None in a folder of anything else than prepared data.

    Raises BadInput where another data set was prepared into it, and as `prepared`.
    """
    content = description(directory)
    if content is None:
        return None
    if content["dataset"] != name:
        raise BadInput(
            f"{directory} is prepared from {content['dataset']}, not from {name}; name it so, or 'prepared'."
        )
    return _dataset(directory, content)


def description(directory: Path) -> dict[str, Any] | None:
    """What a folder's `dataset.json` says, None where there is none of ours. Raises BadInput where it is damaged."""
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as fault:
        raise BadInput(f"{path} cannot be read ({fault}); prepare the data set again.") from fault
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def pairing(pairs: Sequence[Pair]) -> dict[str, Any]:
    """How subjects pair, as JSON has it: all ordered pairs, one atlas as moving or as fixed image, or a list."""
    subjects = subjects_of(pairs)
    names = [subject.name for subject in subjects]
    if tuple(pairs) == ordered_pairs(subjects):
        return {"pairs": "ordered", "subjects": names}
    for role, other in (("moving", "fixed"), ("fixed", "moving")):
        atlas = {getattr(pair, role).name for pair in pairs}
        if len(atlas) == 1:
            each = [getattr(pair, other).name for pair in pairs]
            return {"pairs": f"atlas {role}", "atlas": atlas.pop(), "subjects": each}
    return {"pairs": [{"fixed": pair.fixed.name, "moving": pair.moving.name} for pair in pairs], "subjects": names}


def paired(how: Mapping[str, Any], subjects: Mapping[str, Subject]) -> tuple[Pair, ...]:
    """The pairs that `pairing` described, of the subjects by name."""
    each = [subjects[name] for name in how["subjects"]]
    kind = how["pairs"]
    if kind == "ordered":
        return ordered_pairs(each)
    if kind == "atlas moving":
        return tuple(Pair(subject, subjects[how["atlas"]]) for subject in each)
    if kind == "atlas fixed":
        return tuple(Pair(subjects[how["atlas"]], subject) for subject in each)
    return tuple(Pair(subjects[pair["fixed"]], subjects[pair["moving"]]) for pair in kind)


def _dataset(directory: Path, content: Mapping[str, Any]) -> Dataset:
    path = directory / FILE
    try:
        subjects = {
            name: Subject(name, directory / files["image"], directory / files["labels"] if files["labels"] else None)
            for name, files in content["subjects"].items()
        }
        train, validation, test = (paired(content["splits"][part], subjects) for part in SPLITS)
        labels = tuple(int(id) for id in content["labels"])
        names = {int(id): name for id, name in content["labels"].items() if name}
        licence = content["licence"]
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise BadInput(f"{path} is damaged ({type(fault).__name__}: {fault}); prepare the data set again.") from fault
    for subject in subjects.values():
        for file in (subject.image, subject.labels):
            if file is not None and not file.is_file():
                raise BadInput(f"{file}, of which {path} tells, does not exist; prepare the data set again.")
    return Dataset(train, validation, test, labels, licence, names=names)
