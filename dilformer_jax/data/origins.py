"""Where public data sets are got from, and what of one is missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from dilformer_jax.data.subjects import SPLITS, Dataset, everyone, subjects_of


@dataclass(frozen=True)
class Origin:
    """Where a data set is to be had, and of how many subjects: by name where all have known ones, or by split."""

    where: str
    names: tuple[str, ...] = ()
    counts: tuple[int, int, int] | None = None  # in the order of SPLITS, of subjects that are no atlas


ORIGINS = {
    "lpba40": Origin(
        'https://resource.loni.usc.edu/resources/atlases-downloads/, "LPBA40 Subjects Delineation Space: MRI and label '
        'files in delineation space"',
        tuple(f"S{number:02d}" for number in range(1, 41)),
    ),
    "ixi": Origin(
        "TransMorph's IXI archive, https://drive.google.com/uc?export=download&id=1-VQewCVNj5eTtc3eQGhTM2yXBQmgm8Ol",
        counts=(403, 58, 115),
    ),
    "oasis": Origin(
        "https://github.com/adalca/medical-datasets/blob/master/neurite-oasis.md, https://learn2reg.grand-challenge.org"
        " or https://drive.google.com/uc?export=download&id=1BdEaylMDpeXtyuX5QH8l_Ut4OgenKss4",
        counts=(374, 20, 20),
    ),
    "mindboggle": Origin("https://osf.io/yhkde/ (volumes, by cohort)", counts=(42, 20, 19)),
}


def missing(name: str, dataset: Dataset) -> tuple[str, ...]:
    """A sentence on each thing that the data set of this name lacks and where to get it; none where it is whole."""
    said = []
    subjects = [same[0] for same in everyone(dataset).values()]
    origin = ORIGINS.get(name)
    if origin is not None:
        have = {subject.name for subject in subjects}
        if origin.names and have & set(origin.names):
            gone = [wanted for wanted in origin.names if wanted not in have]
            if gone:
                said.append(
                    f"{len(gone)} of the {len(origin.names)} subjects of {name} are missing ({spans(gone)}); get them "
                    f"from {origin.where}."
                )
        elif origin.names and len(have) < len(origin.names):
            said.append(f"{len(have)} of {len(origin.names)} subjects of {name} are there; get it from {origin.where}.")
        for part, wanted in zip(SPLITS, origin.counts or (), strict=False):
            count = _count(dataset, part)
            if count < wanted:
                said.append(f"{name} has {count} of {wanted} {part} subjects; get the others from {origin.where}.")
    bare = [subject.name for subject in subjects if subject.labels is None]
    if bare and (len(bare) < len(subjects) or origin is not None):
        where = f", which come from {origin.where}" if origin else ""
        said.append(f"{len(bare)} of {len(subjects)} subjects have no label map ({spans(bare)}); add theirs{where}.")
    return tuple(said)


def spans(names: Sequence[str]) -> str:
    """Names that end in consecutive numbers, as spans: S01-S10, S40."""

    def key(item: tuple[int, str]) -> tuple[str, int]:
        place, name = item
        head = name.rstrip("0123456789")
        return head, int(name[len(head) :] or 0) - place

    runs = []
    for _, group in groupby(enumerate(names), key):
        run = [name for _, name in group]
        runs.append(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(runs[:12]) + (f" and {len(runs) - 12} more" if len(runs) > 12 else "")


def _count(dataset: Dataset, part: str) -> int:
    pairs = getattr(dataset, part)
    atlas = {pair.moving.name for pair in pairs}
    names = {subject.name for subject in subjects_of(pairs)}
    return len(names - atlas) if len(atlas) == 1 and len(pairs) > 1 else len(names)
