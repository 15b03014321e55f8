"""Mindboggle-101, manually labelled brains of several cohorts."""

import re
from collections.abc import Sequence
from pathlib import Path

from dilformer_jax.data import structures
from dilformer_jax.data.prepared import recognised
from dilformer_jax.data.subjects import Dataset, Subject, described, ordered_pairs
from dilformer_jax.io.volumes import BadInput

SPACES = {
    "MNI152": ("t1weighted_brain.MNI152.nii.gz", "labels.DKT31.manual.MNI152.nii.gz"),
    "native": ("t1weighted_brain.nii.gz", "labels.DKT31.manual.nii.gz"),
}
COHORTS = {"train": ("NKI-RS-22", "NKI-TRT-20"), "validation": ("OASIS-TRT-20",), "test": ("MMRR-21",)}
TURNED = ("MMRR-21-1", "MMRR-21-21")  # which RDP leaves out, being oriented otherwise than the rest: 19 are reported


def mindboggle(directory: Path | str, *, space: str = "MNI152", without: Sequence[str] = TURNED) -> Dataset:
    """Mindboggle-101 as distributed: folders NKI-RS-22-1/ ... in the folder or up to two folders below, each with
    t1weighted_brain.MNI152.nii.gz and labels.DKT31.manual.MNI152.nii.gz, or in `space` 'native' those without MNI152;
    or what `prepare` made of it.

    As in RDP, NKI-RS and NKI-TRT train and MMRR is reported, `without` two of its subjects. OASIS-TRT, which RDP does
    not use, is there to choose by; HLN and the other few are in no split. All ordered pairs; 62 cortical regions, 31 a
    side. Raises BadInput when the folder has none of these.
    """
    directory = Path(directory)
    if space not in SPACES:
        raise BadInput(f"space is {space!r}; choose one of {', '.join(SPACES)}.")
    if (dataset := recognised(directory, "mindboggle")) is not None:
        return dataset
    image, labels = SPACES[space]
    found: dict[str, Subject] = {}
    for below in ("*/", "*/*/", "*/*/*/"):
        for path in sorted(directory.glob(below + image)):
            name, its_labels = path.parent.name, path.with_name(labels)
            found.setdefault(name, Subject(name, path, its_labels if its_labels.is_file() else None))

    def subjects(part: str) -> list[Subject]:
        members = [name for name in found if name.rpartition("-")[0] in COHORTS[part] and name not in without]
        return [
            found[name] for name in sorted(members, key=lambda name: (name[:4], int(re.sub(r".*\D", "", name) or 0)))
        ]

    train, validation, test = (ordered_pairs(subjects(part)) for part in ("train", "validation", "test"))
    if not train + validation + test:
        raise BadInput(
            f"{directory} {described(directory)}, but no NKI-RS-22-1/{image}, NKI-TRT-20-1/, MMRR-21-1/ ... below it; "
            "give the folder that holds Mindboggle-101's volumes."
        )
    licence = "Mindboggle-101, mindboggle.info: CC BY-NC-SA 3.0 (labels), that of each cohort for its images."
    return Dataset(train, validation, test, tuple(structures.DKT31), licence, names=structures.DKT31)
