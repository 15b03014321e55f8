"""Data sets that are made: phantom brains from a seed, and label maps of which images are made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from dilformer_jax.data import structures
from dilformer_jax.data.phantoms import LABELS as PHANTOM_LABELS
from dilformer_jax.data.phantoms import phantom
from dilformer_jax.data.subjects import Dataset, Subject, described, ordered_pairs, stem
from dilformer_jax.data.synthesis import STRUCTURES, options_of
from dilformer_jax.io.volumes import BadInput, Volume, replacing, write_image, write_labels


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
        ordered_pairs(subjects[:train]),
        ordered_pairs(subjects[train:]),
        (),
        ids,
        "made by dilformer_jax: Apache-2.0.",
        names=structures.of(PHANTOM_LABELS, ids),
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
            f"{directory} {described(directory)}, {len(paths)} of them seg_*.nii.gz, and {validation} are for "
            "validation; give two or more for that and two to train on."
        )
    subjects = [Subject(stem(path), path, path, seed) for seed, path in enumerate(paths)]
    return Dataset(
        ordered_pairs(subjects[:-validation]),
        ordered_pairs(subjects[-validation:]),
        (),
        STRUCTURES,
        f"that of the label maps in {directory}",
        options_of(synthesis or {}),
        structures.of(structures.FREESURFER, STRUCTURES),
    )
