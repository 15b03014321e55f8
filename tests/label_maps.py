"""Label maps that tests measure with, and the regions of the real ones."""

import numpy as np
from scipy import ndimage

LPBA40 = [*range(21, 35), *range(41, 51), *range(61, 69), *range(81, 93), 101, 102, 121, 122, *range(161, 167)]
Triple = tuple[int, int, int]


def cube(shape: Triple, start: Triple, size: Triple, label: int = 1) -> np.ndarray:
    volume = np.zeros(shape, np.int32)
    volume[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = label
    return volume


def blobs(seed: int, shape: Triple = (13, 15, 11)) -> np.ndarray:
    """Ragged regions 0..3 that touch one another and the faces of the volume."""
    noise = np.random.default_rng(seed).normal(size=(4, *shape))
    return np.argmax([ndimage.gaussian_filter(n, 1.5) for n in noise], axis=0).astype(np.int32)


def crop(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both masks in the box of either, which leaves what is measured as it is."""
    (box,) = ndimage.find_objects((a | b).astype(np.uint8))
    return a[box], b[box]
