"""The protocols by which the field scores registration, each with a paragraph that says what is scored and how.

A protocol is a data set, of that a split, the pairs, and the structures. What it says is printed into the results: two
numbers are comparable only where it, and the definitions beside it, are the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dilformer_jax.data import sources
from dilformer_jax.data.subjects import SPLITS, Dataset, Pair, split
from dilformer_jax.io.volumes import BadInput

# Structures of TransMorph's table: the left and the right one of each are one row, the mean of their Dice.
IXI_GROUPS = {
    "Brain-Stem": (16,),
    "Thalamus": (10, 49),
    "Cerebellum-Cortex": (8, 47),
    "Cerebral-White-Matter": (2, 41),
    "Cerebellum-White-Matter": (7, 46),
    "Putamen": (12, 51),
    "VentralDC": (28, 60),
    "Pallidum": (13, 52),
    "Caudate": (11, 50),
    "Lateral-Ventricle": (4, 43),
    "Hippocampus": (17, 53),
    "3rd-Ventricle": (14,),
    "4th-Ventricle": (15,),
    "Amygdala": (18, 54),
    "Cerebral-Cortex": (3, 42),
    "CSF": (24,),
    "choroid-plexus": (31, 63),
}


@dataclass(frozen=True)
class Protocol:
    """What a name stands for: the data set, of `sources.DATASETS` or None for any, and `text`, what is scored and how.

    Of `splits` the first that has pairs is scored. `atlas` names the subject that is fixed in every pair. In
    `aligned` data the subjects were brought together affinely by those who distribute them. `groups` are structures
    that a table shows as one.
    """

    dataset: str | None
    text: str
    splits: tuple[str, ...] = ("test", "validation")
    atlas: str | None = None
    aligned: bool = False
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Pairs to score and all that is to be said about them: `split` is None where they are of none, `dataset` the kind
    of data, `text` the protocol's paragraph; the rest as in `Protocol` and `Dataset`."""

    name: str
    text: str
    dataset: str
    split: str | None
    pairs: tuple[Pair, ...]
    labels: tuple[int, ...]
    names: Mapping[int, str] = field(default_factory=dict)
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    aligned: bool = False


PROTOCOLS = {
    "lpba40": Protocol(
        "lpba40",
        "LPBA40, scan to scan: every ordered pair of two subjects, skull-stripped, 160x192x160 voxels of 1 mm, "
        "not aligned beforehand. 54 manual regions (all but cerebellum and brainstem, 181 and 182) at full resolution. "
        "Test: the 90 pairs of S01-S10; validation: the 30 pairs of S35-S40; S11-S34 train. Published figures of RDP, "
        "ModeT and MsMorph are of 90 such pairs, on which their checkpoints were chosen as well.",
    ),
    "lpba40-atlas": Protocol(
        "lpba40",
        "LPBA40, atlas-based: S01 is the fixed image of every pair, each other subject of the split the moving one. "
        "54 manual regions at full resolution. Test: the 9 subjects S02-S10, as in TransMatch and VoxelMorph-torch.",
        splits=("test",),
        atlas="S01",
    ),
    "ixi": Protocol(
        "ixi",
        "IXI as TransMorph distributes it, atlas to subject: the atlas is the moving image of every pair, the 115 test "
        "subjects (58 for validation) are fixed; skull-stripped, affinely aligned, 160x192x224 voxels of 1 mm, labels "
        "by FreeSurfer. dice, dice_trilinear: mean over 30 structures (VOI-30). dice_groups, dice_trilinear_groups: "
        "mean over the 17 structures of TransMorph's table, of which each is the mean of left and right, absent as 0; "
        "that table warps labels trilinearly (dice_trilinear_groups), and its ± is the deviation over all structures "
        "of all subjects together, which is not the deviation over the subjects that stands here.",
        aligned=True,
        groups=IXI_GROUPS,
    ),
    "oasis": Protocol(
        "oasis",
        "OASIS, Learn2Reg 2021 task 3: the 19 validation pairs of consecutive subjects 0438-0457, affinely aligned, "
        "160x192x224 voxels of 1 mm, 35 structures by FreeSurfer. Learn2Reg reports dice (nearest neighbour), hd95_max "
        "(DeepMind's, over structures of both images) and sdlogj (with its offset of 3), each a mean over pairs.",
        aligned=True,
    ),
    "clean": Protocol(
        None,
        "Three splits without a subject in common: one trains, one chooses, and what is reported here, the test split, "
        "did neither; evaluating refuses a network that was trained or chosen on any of its subjects.",
        splits=("test",),
    ),
}


def task(
    name: str | None,
    directory: Path,
    part: str | None,
    kind: str | None,
    options: Mapping[str, Any],
    labels: Sequence[int] = (),
) -> Task:
    """The pairs of a protocol in this folder; `part` is the split, `kind` the data set of a protocol for any. Without a
    name they are those of a split of the data set, under no protocol.

    `options` are the data set's, `labels` instead of its own. Raises BadInput for a name that is none, a split without
    pairs, and for `clean` where a subject is in two splits.
    """
    if name is not None and name not in PROTOCOLS:
        stem, _, end = name.rpartition("-")
        hint = f"; for its {end} split give --protocol {stem} --split {end}" if end in SPLITS else ""
        raise BadInput(f"--protocol {name} is not known; it is one of {', '.join(PROTOCOLS)}{hint}.")
    protocol = Protocol(kind, f"the pairs of the data set {kind} in {directory}") if name is None else PROTOCOLS[name]
    if protocol.dataset is not None and kind not in (None, protocol.dataset):
        raise BadInput(f"--protocol {name} is of the data set {protocol.dataset}; leave out --dataset {kind}.")
    if name == "clean" and part not in (None, "test"):
        raise BadInput(f"--protocol clean reports the test split; leave out --split {part}.")
    kind = protocol.dataset or kind or "prepared"
    if kind not in sources.DATASETS:
        raise BadInput(f"--dataset {kind} is not known; it is one of {', '.join(sources.DATASETS)}.")
    dataset = sources.DATASETS[kind](directory, **options)
    if name == "clean":
        _check_disjoint(dataset, directory)
    if part is None:
        part = next((part for part in protocol.splits if getattr(dataset, part)), protocol.splits[0])
    pairs = split(dataset, part)
    if protocol.atlas is not None:
        pairs = tuple(pair for pair in pairs if pair.fixed.name == protocol.atlas)
        if not pairs:
            raise BadInput(
                f"{directory} has no pair of the {part} split with {protocol.atlas} as fixed image, which --protocol "
                f"{name} scores; add that subject, or take another protocol."
            )
    return Task(
        name or kind,
        protocol.text,
        kind,
        part,
        pairs,
        tuple(labels) or dataset.labels,
        dataset.names,
        {} if labels else protocol.groups,
        protocol.aligned,
    )


def _check_disjoint(dataset: Dataset, directory: Path) -> None:
    everywhere = atlas([*dataset.train, *dataset.validation, *dataset.test])
    members = {part: subjects(getattr(dataset, part)) - everywhere for part in SPLITS}
    for first, second in (("train", "test"), ("validation", "test"), ("train", "validation")):
        shared = sorted(members[first] & members[second])
        if shared:
            raise BadInput(
                f"{directory} has {', '.join(shared[:3])} in both {first} and {second}; --protocol clean takes splits "
                "without a subject in common."
            )


def subjects(pairs: Iterable[Pair]) -> frozenset[str]:
    """The names of all subjects in the pairs."""
    return frozenset(subject.name for pair in pairs for subject in (pair.fixed, pair.moving))


def atlas(pairs: Sequence[Pair]) -> frozenset[str]:
    """The name of the subject that is the moving one, or the fixed one, of all pairs, if there are several: all splits
    share an atlas, which tells nothing of another subject."""
    roles = ({pair.fixed.name for pair in pairs}, {pair.moving.name for pair in pairs})
    return frozenset().union(*(names for names in roles if len(names) == 1 and len(pairs) > 1))
