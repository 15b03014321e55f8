"""What an image shows, against its background."""

import numpy as np
from jaxtyping import Bool, Num

FAINT = 0.02  # of the brightest: below it is background


def content(array: Num[np.ndarray, "d h w"], threshold: float = FAINT) -> Bool[np.ndarray, "d h w"]:
    """What is brighter than background: than the least value, by a share of the way to the 99th percentile of all that
    is not that value. Padding with the least value changes nothing."""
    low = array.min()
    return array > low + threshold * (np.percentile(array[array > low], 99) - low)


def box(mask: Bool[np.ndarray, "d h w"]) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last voxel of a mask along each axis, as floats."""
    lines = [np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis))) for axis in range(3)]
    return np.array([line[0] for line in lines], float), np.array([line[-1] for line in lines], float)
