"""The files of a subject as volumes, whatever their format."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np

from dilformer_jax.data.subjects import Subject
from dilformer_jax.io.bare import is_bare, read_bare_image, read_bare_labels
from dilformer_jax.io.geometry import centred_affine
from dilformer_jax.io.headers import ASKING, BadInput, Reading, by, open_nifti, parts_of
from dilformer_jax.io.volumes import Volume, on_grid, read_image, read_labels


def image_of(subject: Subject, reading: Reading = ASKING) -> Volume:
    """The subject's image as its file has it. Raises BadInput.

    A pickle or an archive of arrays does not say where it lies: its voxels are 1 mm, and its affine is the identity,
    or that of a grid in the middle of the world where `subject.axes` or `reading.assume_affine` name its axes.
    """
    if not is_bare(subject.image):
        return read_image(subject.image, _reading(subject, reading))
    array = read_bare_image(subject.image, subject.part)
    axes = _reading(subject, reading).assume_affine
    affine = np.eye(4) if axes is None else centred_affine(array.shape, (1.0, 1.0, 1.0), axes)
    return Volume(array, affine, subject.image, _header(affine))


def labels_of(
    subject: Subject, image: Volume, reading: Reading = ASKING, *, assume_same_grid: bool = False
) -> Volume | None:
    """The subject's label map, None where it has none, on the grid of its image, which is given. Raises BadInput.

    Where either file does not say where it lies, or with `assume_same_grid`, they match voxel for voxel.
    """
    if subject.labels is None:
        return None
    if is_bare(subject.labels):
        volume = replace(image, array=read_bare_labels(subject.labels, subject.part), path=subject.labels, notes=())
    else:
        volume = read_labels(subject.labels, _reading(subject, reading))
        if not is_bare(subject.image):
            return on_grid(volume, image, assume_same_grid)
        volume = replace(volume, affine=image.affine, header=image.header)
    if volume.array.shape != image.array.shape:
        raise BadInput(
            f"{volume.path} is {by(volume.array.shape)}, {image.path} {by(image.array.shape)}; "
            "give labels of that image."
        )
    return volume


def opened(subject: Subject, reading: Reading = ASKING) -> nib.nifti1.Nifti1Pair | None:
    """The subject's image with its header checked and its voxels not yet read; None where its file has no header."""
    return None if is_bare(subject.image) else open_nifti(subject.image, _reading(subject, reading))


def files_of(subject: Subject) -> tuple[Path, ...]:
    """All files that the subject consists of, each once. Raises BadInput where one of a pair is missing."""
    paths = (subject.image,) if subject.labels is None else (subject.image, subject.labels)
    return tuple(dict.fromkeys(part for path in paths for part in parts_of(path)))


def label_ids(subjects: Iterable[Subject]) -> tuple[int, ...]:
    """The ids, without 0, in the label maps of the subjects together."""
    maps = {(subject.labels, subject.part): subject for subject in subjects if subject.labels is not None}
    ids: set[int] = set()
    for path, part in sorted(maps, key=str):
        array = read_bare_labels(path, part) if is_bare(path) else read_labels(path, _reading(maps[path, part])).array
        ids.update(np.unique(array).tolist())
    return tuple(sorted(ids - {0}))


def _reading(subject: Subject, reading: Reading = ASKING) -> Reading:
    return reading if subject.axes is None else replace(reading, assume_affine=subject.axes)


def _header(affine: np.ndarray) -> nib.nifti1.Nifti1Header:
    header = nib.nifti1.Nifti1Header()
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    header.set_xyzt_units("mm")
    return header
