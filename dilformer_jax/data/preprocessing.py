"""From a subject's files to the arrays that a network sees, decoded once and kept."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from dilformer_jax.data import synthesis
from dilformer_jax.data.subjects import Subject
from dilformer_jax.data.volumes import files_of, image_of, labels_of
from dilformer_jax.io.volumes import BadInput, normalise, read_labels, replacing

PREPROCESSING: dict[str, Any] = {"normalise": "max", "downsample": 1, "crop_to": None}
CHOICES: dict[str, tuple] = {
    "normalise": ("max", "minmax", "percentile", "none"),
    "downsample": (1, 2, 4),
}
# Part of every cache key: raise it whenever the same settings come to give other voxels.
VERSION = 1
# Decoded volumes kept in memory, beyond which the one unused for longest goes. Memory-mapped ones do not count.
MEMORY_BYTES = 4 << 30

_memory: OrderedDict[str, tuple[np.ndarray, int]] = OrderedDict()  # the array and the bytes that it counts for
_guard = threading.Lock()
_decoding: dict[str, threading.Lock] = {}


def load(
    subject: Subject, preprocessing: Mapping[str, Any], *, cache: Path | str | None = None
) -> tuple[Float32[np.ndarray, "d h w 1"], Int32[np.ndarray, "x y z"] | None]:
    """The subject's image as a network sees it and its labels, None where it has no label map; both are read-only.

    `preprocessing` has, in the order in which they act:
      crop_to: None, or the shape of a box around the middle of the bounding box of the non-zero voxels, moved inside
        the volume; where the volume is smaller, the image is continued with its border value, the labels with 0.
      normalise: a method of `io.volumes.normalise`.
      downsample: 1, 2 or 4, the edge of the blocks of which the mean becomes a voxel; labels stay on the grid before.
    What is left out is as in PREPROCESSING. Decoded arrays are kept as memory-mapped .npy files in the folder `cache`,
    or else in memory; a file that changes on disk is decoded anew.

    Raises BadInput for unreadable files, labels on another grid than the image, an unknown setting, and a shape that
    the downsampling does not divide.
    """
    return load_image(subject, preprocessing, cache=cache), load_labels(subject, preprocessing, cache=cache)


def load_image(
    subject: Subject, preprocessing: Mapping[str, Any], *, cache: Path | str | None = None
) -> Float32[np.ndarray, "d h w 1"]:
    """The image that `load` gives, for those who need no labels."""
    settings = resolved(preprocessing)
    kind = "image" if subject.seed is None else f"T1-like image, {synthesis.VERSION}, {subject.seed}"
    files = files_of(replace(subject, labels=None))
    return _kept(kind + _which(subject), files, settings, cache, partial(_decoded_image, subject, settings))


def decode_image(subject: Subject, preprocessing: Mapping[str, Any]) -> Float32[np.ndarray, "d h w 1"]:
    """The image that `load` gives, decoded now and kept nowhere, for those who need it once."""
    return _decoded_image(subject, resolved(preprocessing))


def load_labels(
    subject: Subject, preprocessing: Mapping[str, Any], *, cache: Path | str | None = None
) -> Int32[np.ndarray, "x y z"] | None:
    """The labels that `load` gives."""
    settings = resolved(preprocessing)
    if subject.labels is None:
        return None
    kind, decoded = "labels" + _which(subject), partial(_decoded_labels, subject, settings)
    return _kept(kind, [subject.image, subject.labels], settings, cache, decoded)


def decode_classes(
    subject: Subject, preprocessing: Mapping[str, Any], ids: Sequence[int] | None = None
) -> UInt8[np.ndarray, "d h w"]:
    """The subject's label map as classes, k for ids[k - 1] and 0 for every other id, or without `ids` those of
    `synthesis.classes`; on the grid of the images: cropped, and of each block that downsampling averages its middle
    voxel. Raises BadInput as `load` does."""
    settings = resolved(preprocessing)
    assert subject.labels is not None
    labels = _decoded_labels(subject, settings)
    factor = settings["downsample"]
    downsampled_shape(labels.shape, factor, subject.labels)
    labels = labels[(slice(factor // 2, None, factor),) * 3]
    if ids is None:
        return synthesis.classes(labels, subject.labels)
    ordered = np.sort(ids)
    number = np.argsort(ids)[np.searchsorted(ordered, labels).clip(max=len(ids) - 1)] + 1
    return np.where(np.isin(labels, ordered), number, 0).astype(np.uint8)


def resolved(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing with nothing left out. Raises BadInput for settings that do not exist."""
    settings = PREPROCESSING | dict(preprocessing)
    for name, value in settings.items():
        if name not in PREPROCESSING:
            raise BadInput(f"preprocessing has no '{name}'; it has {', '.join(PREPROCESSING)}.")
        if name in CHOICES and value not in CHOICES[name]:
            raise BadInput(f"preprocessing.{name} is {value!r}; choose one of {', '.join(map(repr, CHOICES[name]))}.")
    box = settings["crop_to"]
    if box is not None:
        if not isinstance(box, Sequence) or len(box) != 3 or min(box) < 1:
            raise BadInput(f"preprocessing.crop_to is {box!r}; give three positive numbers of voxels, or None.")
        settings["crop_to"] = tuple(int(n) for n in box)
    return settings


def prepared(
    image: Float32[np.ndarray, "x y z"], settings: Mapping[str, Any], name: Path | str, *, multiple: int | None = None
) -> Float32[np.ndarray, "d h w 1"]:
    """The voxels of an image file as a network sees them, by settings as `resolved` gives them.

    Where downsampling does not divide the shape, BadInput says so of `name`; given a `multiple`, the end of each axis
    is continued with the border value instead, until what comes out is a multiple of it.
    """
    image = _boxed(image, corner(image, settings["crop_to"]), settings["crop_to"], mode="edge")
    try:
        image = normalise(image, settings["normalise"])
    except BadInput as fault:
        raise BadInput(f"{name}: {fault}") from fault
    if multiple is not None:
        step = multiple * settings["downsample"]
        image = np.pad(image, [(0, -size % step) for size in image.shape], mode="edge")
    return _blocks(image, settings["downsample"], Path(name)).mean(-1)[..., None]


def corner(image: np.ndarray, box: tuple[int, int, int] | None) -> list[int]:
    """Where `crop_to` begins, in voxels of the image; below 0 where it is larger than the image."""
    starts = []
    for axis, (size, wanted) in enumerate(zip(image.shape, box or image.shape, strict=True)):
        others = tuple(other for other in range(3) if other != axis)
        inside = np.flatnonzero(image.any(axis=others))
        low, high = (int(inside[0]), int(inside[-1])) if inside.size else (0, size - 1)
        room = size - wanted
        starts.append(min(max((low + high + 1 - wanted) // 2, min(0, room)), max(0, room)))
    return starts


def downsampled_shape(shape: tuple[int, ...], factor: int, path: Path) -> tuple[int, int, int]:
    """The shape in blocks of factor^3 voxels; BadInput naming the file where there are no whole ones."""
    if any(n % factor for n in shape):
        raise BadInput(
            f"{path} is {by(shape)} after cropping, which downsample={factor} does not divide; "
            f"set preprocessing.crop_to to multiples of {factor}."
        )
    d, h, w = (n // factor for n in shape)
    return d, h, w


def by(shape: tuple[int, ...]) -> str:
    """A shape as it is said: 160x192x160."""
    return "x".join(map(str, shape))


def _decoded_image(subject: Subject, settings: dict[str, Any]) -> np.ndarray:
    if subject.seed is None:
        image = image_of(subject).array
    else:
        image = synthesis.t1_like(synthesis.classes(read_labels(subject.image).array, subject.image), subject.seed)
    return prepared(image, settings, subject.image)


def _decoded_labels(subject: Subject, settings: dict[str, Any]) -> np.ndarray:
    image = image_of(subject)
    labels = labels_of(subject, image)
    assert labels is not None
    box = settings["crop_to"]
    return _boxed(labels.array, corner(image.array, box), box, mode="constant")


def _which(subject: Subject) -> str:
    """What of its files the subject is, beyond their names."""
    return "".join(f", {text}" for text in (subject.part, subject.axes) if text)


def _boxed(array: np.ndarray, corner: list[int], box: tuple[int, int, int] | None, mode: Any) -> np.ndarray:
    if box is None:
        return array
    ends = [start + size for start, size in zip(corner, box, strict=True)]
    inside = tuple(slice(max(0, start), end) for start, end in zip(corner, ends, strict=True))
    margins = [(max(0, -a), max(0, b - size)) for a, b, size in zip(corner, ends, array.shape, strict=True)]
    return np.pad(array[inside], margins, mode=mode)


def _blocks(array: np.ndarray, factor: int, path: Path) -> np.ndarray:
    """(D, H, W) as (D/f, H/f, W/f, f^3)."""
    d, h, w = downsampled_shape(array.shape, factor, path)
    return array.reshape(d, factor, h, factor, w, factor).transpose(0, 2, 4, 1, 3, 5).reshape(d, h, w, factor**3)


def _kept(
    kind: str,
    files: Sequence[Path],
    settings: dict[str, Any],
    cache: Path | str | None,
    decoded: Callable[[], np.ndarray],
) -> np.ndarray:
    """The decoded array, read-only; from memory or from `cache` where it is there already."""
    key = _key(kind, files, settings)
    name = key if cache is None else str(Path(cache).absolute() / f"{key}.npy")
    with _guard:
        lock = _decoding.setdefault(name, threading.Lock())
    with lock:
        with _guard:
            if name in _memory:
                _memory.move_to_end(name)
                return _memory[name][0]
        array = decoded() if cache is None else _mapped(Path(name), decoded)
        array.flags.writeable = False
        with _guard:
            _memory[name] = (array, array.nbytes if cache is None else 0)
            while sum(size for _, size in _memory.values()) > MEMORY_BYTES and len(_memory) > 1:
                _memory.popitem(last=False)
        return array


def _key(kind: str, files: Sequence[Path], settings: dict[str, Any]) -> str:
    states = []
    for path in files:
        try:
            state = path.stat()
        except OSError as error:
            raise BadInput(f"{path} cannot be read ({error.strerror}); check the path.") from error
        states.append((str(path.absolute()), state.st_size, state.st_mtime_ns))
    return hashlib.sha256(json.dumps([VERSION, kind, states, settings], sort_keys=True).encode()).hexdigest()[:32]


def _mapped(path: Path, decoded: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of a .npy file, memory-mapped; the file is written first unless it is there and whole."""
    try:
        return np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, ValueError, EOFError):
        array = decoded()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{path.parent} cannot be made ({error.strerror}); choose another cache folder.") from error
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.save(file, array)
    return np.asarray(np.load(path, mmap_mode="r"))
