"""Pairs of volumes as an endless stream of batches that is a pure function of (seed, step).

Neither the number of worker processes, nor that of the processes of a training run, nor the step at which a run was
resumed changes an example of the stream. Grain imports jax, so it is imported only where it is used, and its worker
processes are kept off the accelerator.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags as absl_flags

from dilformer_jax.data.preprocessing import by, downsampled_shape, load, load_image, load_labels, resolved
from dilformer_jax.data.subjects import Pair, Subject
from dilformer_jax.data.synthesis import drawn
from dilformer_jax.data.volumes import image_of, opened
from dilformer_jax.io import geometry
from dilformer_jax.io.bare import is_bare
from dilformer_jax.io.volumes import BadInput

__all__ = [
    "Batches",
    "batches",
    "check_extent",
    "common_grid",
    "common_shape",
    "load",
    "load_image",
    "load_labels",
    "spacing",
]


def spacing(subject: Subject) -> tuple[float, float, float]:
    """Edges in mm of a voxel of the subject's file, before any downsampling; 1 for bare arrays, which do not say."""
    image = opened(subject)
    return (1.0, 1.0, 1.0) if image is None else geometry.spacing(image.affine)


def common_shape(
    pairs: Sequence[Pair], preprocessing: Mapping[str, Any], *, cache: Path | str | None = None
) -> tuple[int, int, int]:
    """The one shape (D, H, W) in which all images of the pairs reach the network, found from the headers of the files.

    Bare arrays, in pickles and .npz, have no header: the first stands for all until `batches` comes to the others.

    Raises BadInput that names the odd one out where shapes (unless all are cropped to one) or orientations differ.
    """
    settings = resolved(preprocessing)
    subjects = list(dict.fromkeys(subject for pair in pairs for subject in (pair.fixed, pair.moving)))
    if not subjects:
        raise BadInput("There are no pairs to make batches of; choose a split that has some.")
    grids = {subject: _grid(subject) for subject in subjects if not is_bare(subject.image)}
    if not grids:
        return _extent(load_image(subjects[0], settings, cache=cache))
    box = settings["crop_to"]
    (shape, axes), count = Counter((box or shape, axes) for shape, axes in grids.values()).most_common(1)[0]
    for subject, (its_shape, its_axes) in grids.items():
        if (box or its_shape, its_axes) != (shape, axes):
            raise BadInput(
                f"{subject.image} is {by(its_shape)} {its_axes} while {count} of these {len(grids)} images are "
                f"{'' if box else by(shape) + ' '}{axes}; bring all to one grid or leave it out."
            )
    return downsampled_shape(shape, settings["downsample"], subjects[0].image)


def common_grid(
    pairs: Sequence[Pair], preprocessing: Mapping[str, Any], *, cache: Path | str | None = None
) -> dict[str, Any]:
    """What a network trained on the pairs is to be told of their grid, as JSON has it.

    `shape` is that of the images, after cropping, and `network_shape` that in which they reach the network;
    `spacing_mm` and `orientation` are the files', as "RAS" or None for bare arrays, which do not say. Raises BadInput
    as `common_shape` does.
    """
    settings = resolved(preprocessing)
    shape = common_shape(pairs, settings, cache=cache)
    subject = pairs[0].fixed
    return {
        "shape": [size * settings["downsample"] for size in shape],
        "spacing_mm": [round(size, 6) for size in spacing(subject)],
        "orientation": None if is_bare(subject.image) else _grid(subject)[1],
        "network_shape": list(shape),
    }


class Batches:
    """An endless iterator over batches, to be closed (or used by `with`) so that threads and processes end."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        # Copied, for what worker processes send is shared memory, which leaks if it is held until the interpreter ends.
        if self._source is None:
            raise StopIteration
        batch = next(self._source)
        return {name: array if type(array) is np.ndarray else np.array(array) for name, array in batch.items()}

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
        # Let go of at once: a grain iterator that is still there when the interpreter ends complains on stderr.
        self._source = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def batches(
    pairs: Sequence[Pair],
    preprocessing: Mapping[str, Any],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    flips: Sequence[int] = (),
    affine: Sequence[float] = (0.0, 0.0),
    gamma: float = 0.0,
    synthesis: Mapping[str, Any] | None = None,
    images: bool = True,
    cache: Path | str | None = None,
) -> Batches:
    """Batches of {'index': (B,) int32, into `pairs`, 'fixed', 'moving': (B, D, H, W, 1) float32} from start_step on.

    The stream goes through all pairs in an order that the seed and the epoch give, without an end. The images are as
    their files have them; how they are to be varied is told by numbers, by which `training.feeding` varies them on the
    device. Given `flips`, 'flips' (B, 3) bool names the axes to reverse in both images of a pair: each of the axes in
    `flips` (0, 1, 2) with probability 1/2. Given an `affine` that is not 0, each image is then to be read at
    x + A (x - centre) + t, 0 outside, with 'affine' (B, 2, 3, 4) float32 the A and t of the fixed and of the moving
    image: `affine` holds the standard deviations of the entries of a map's matrix, less the identity, first of a map
    common to both images, then of one that each has of its own and that comes first. Each map also shifts, along each
    axis, by a random part of the volume's edge, whose standard deviation is a quarter of that.
    Given a `gamma`, each image's intensities are to be raised to the power in 'power' (B, 2) float32, of the fixed and
    of the moving image, whose logarithms have this standard deviation.
    Given the options of a `synthesis`, each example has all that `synthesis.drawn` draws by them as well.
    With `images` False the stream is the same without 'fixed' and 'moving': for volumes that are on the device.
    `batch_size` is that of all processes together and B = batch_size / process_count. At any step, process p of n has
    the examples p, p + n, p + 2n ... of what a single process would have: the concatenation of the n parts is the same
    examples, ordered by p; `np.stack(parts, 1)`, its first two axes merged, is the single process's batch as it was.
    `workers` = 0 reads in two threads; otherwise in that many processes, which share decoded volumes only by way of
    `cache`, and for which the calling script needs an `if __name__ == "__main__"`.

    Raises BadInput as `common_shape` does, and for arguments that do not fit together.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not one of {process_count} processes")
    if batch_size < 1 or batch_size % process_count:
        raise BadInput(f"batch_size {batch_size} does not divide among {process_count} processes; make it a multiple.")
    if len(set(flips)) < len(flips) or not set(flips) <= {0, 1, 2}:
        raise BadInput(f"flips is {tuple(flips)}; give axes out of 0, 1 and 2, each once.")
    if len(affine) != 2 or not all(0 <= deviation <= 0.2 for deviation in affine):
        raise BadInput(f"affine is {tuple(affine)}; give two standard deviations from 0 to 0.2.")
    if not 0 <= gamma <= 1:
        raise BadInput(f"gamma is {gamma}; give a standard deviation from 0 to 1.")
    if not 0 <= seed < 2**32:
        raise BadInput(f"seed is {seed}; give one from 0 to 2**32 - 1.")
    if workers < 0:
        raise BadInput(f"workers is {workers}; give a number of processes, or 0 for threads.")
    settings = resolved(preprocessing)
    shape = common_shape(pairs, settings, cache=cache)

    import grain  # type: ignore[import-untyped]

    stream = grain.MapDataset.source(Indices(len(pairs))).seed(seed).shuffle().repeat()
    # Before the slice: an example's random numbers come from its place in the stream of all processes.
    stream = stream.random_map(partial(_with_flips, axes=tuple(flips)))
    if any(affine):
        stream = stream.random_map(partial(_with_affine, common=affine[0], own=affine[1], edges=shape))
    if gamma:
        stream = stream.random_map(partial(_with_gamma, deviation=gamma))
    if synthesis is not None:
        voxel = tuple(size * settings["downsample"] for size in spacing(pairs[0].fixed))
        stream = stream.random_map(partial(_with_synthesis, options=dict(synthesis), voxel=voxel))
    stream = stream[process_index::process_count]
    if images:
        folder = None if cache is None else Path(cache)
        stream = stream.map(partial(_with_images, pairs=tuple(pairs), settings=settings, shape=shape, cache=folder))
    # Before the iterator is made, lest the batches depend on the number of workers.
    stream = stream.batch(batch_size // process_count, drop_remainder=True, batch_fn=_stacked)
    reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    dataset = stream[start_step:].to_iter_dataset(reading)
    if workers:
        # Grain reads absl's flags, which nobody has parsed where this is used as a library.
        if not absl_flags.FLAGS.is_parsed():
            absl_flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_stay_off_the_accelerator)
    return Batches(iter(dataset))


def check_extent(image: np.ndarray, shape: tuple[int, int, int], subject: Subject) -> None:
    """Raises BadInput, which names the subject, unless its image (d, h, w, 1) has this shape: of a pickle only the
    voxels say."""
    if _extent(image) != shape:
        raise BadInput(
            f"{subject.image} is {by(_extent(image))} after preprocessing while the other images are {by(shape)}; "
            "bring all to one grid or leave it out."
        )


@dataclass(frozen=True)
class Indices:
    """The examples of `batches` before anything else: their indices into the pairs."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"index": np.array(index, np.int32)}


def _with_flips(example: dict[str, np.ndarray], generator: np.random.Generator, axes: tuple[int, ...]) -> dict:
    if not axes:
        return example
    flips = np.zeros(3, bool)
    for axis in axes:
        flips[axis] = generator.random() < 0.5
    return example | {"flips": flips}


def _with_affine(
    example: dict[str, np.ndarray],
    generator: np.random.Generator,
    common: float,
    own: float,
    edges: tuple[int, int, int],
) -> dict[str, np.ndarray]:
    maps = [_random_affine(generator, own, edges) for _ in ("fixed", "moving")]
    shared = _random_affine(generator, common, edges)
    # Less the identity before it is rounded: what is left is small, and float32 has its digits.
    return example | {"affine": np.stack([(shared @ its_own - np.eye(4))[:3] for its_own in maps]).astype(np.float32)}


def _random_affine(generator: np.random.Generator, deviation: float, edges: tuple[int, int, int]) -> np.ndarray:
    """4 x 4, in voxels from the centre."""
    affine = np.eye(4)
    affine[:3, :3] += deviation * generator.standard_normal((3, 3))
    affine[:3, 3] = deviation / 4 * generator.standard_normal(3) * edges
    return affine


def _with_gamma(example: dict[str, np.ndarray], generator: np.random.Generator, deviation: float) -> dict:
    return example | {"power": np.exp(deviation * generator.standard_normal(2)).astype(np.float32)}


def _with_synthesis(
    example: dict[str, np.ndarray],
    generator: np.random.Generator,
    options: dict[str, Any],
    voxel: tuple[float, float, float],
) -> dict[str, np.ndarray]:
    return example | drawn(generator, options, voxel)


def _with_images(
    example: dict[str, np.ndarray],
    pairs: tuple[Pair, ...],
    settings: dict[str, Any],
    shape: tuple[int, int, int],
    cache: Path | None,
) -> dict[str, np.ndarray]:
    """It travels to worker processes, with all that it is given."""
    pair, found = pairs[example["index"]], dict(example)
    for role, subject in (("fixed", pair.fixed), ("moving", pair.moving)):
        found[role] = load_image(subject, settings, cache=cache)
        check_extent(found[role], shape, subject)
    return found


def _stacked(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _stay_off_the_accelerator(worker: int, workers: int) -> None:
    # Grain has imported jax in this process; should anything come to use it, it shall not claim the device's memory.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def _grid(subject: Subject) -> tuple[tuple[int, ...], str]:
    """Shape and orientation of a NIfTI image, by its header."""
    image = opened(subject)
    assert image is not None
    shape = image.shape if len(image.shape) == 3 else image_of(subject).array.shape
    return shape, geometry.orientation(image.affine)


def _extent(image: np.ndarray) -> tuple[int, int, int]:
    d, h, w, _ = image.shape
    return d, h, w
