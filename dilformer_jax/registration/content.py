"""What an image shows: where its foreground lies, of which extent, and averages of the image on small grids around it.

All images give grids of one size, so that the affine alignment is compiled once.
"""

from dataclasses import dataclass

import numpy as np
from einops import reduce
from jaxtyping import Bool, Float32, Float64
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax.io.volumes import BadInput, Volume

SIZES = (32, 64)  # voxels along each axis of the grids, of which the fixed image gives every second
BLUR = 1.2  # standard deviation, in voxels of the finer grid
RIM = 1  # voxels of the finer grid around the foreground
MARGIN = 0.08  # around the content, of its extent

Mask = Bool[np.ndarray, "_ _ _"]


@dataclass(frozen=True, eq=False)
class Content:
    """What an image shows.

    Attributes:
      grids: the image from 0 (background) to 1 around its foreground, averaged, a grid (n, n, n) for each of SIZES.
      foreground: which voxels of the finest grid show something.
      shape, linear: of the image and of its affine.
      low, high: the faces of the grids, in voxels of the image.
      centre: of the foreground, in voxels of the image.
      radius: of the foreground, the root mean square, in mm.
    """

    grids: tuple[Float32[np.ndarray, "_ _ _"], ...]
    foreground: Mask
    shape: tuple[int, ...]
    linear: Float64[np.ndarray, "3 3"]
    low: Float64[np.ndarray, "3"]
    high: Float64[np.ndarray, "3"]
    centre: Float64[np.ndarray, "3"]
    radius: float

    def rims(self) -> tuple[Float32[np.ndarray, "_ _ _"], ...]:
        """The foreground and a rim around it, for each of SIZES. What lies farther may be shown in one image only."""
        near = ndimage.binary_dilation(self.foreground, iterations=RIM).astype(np.float32)
        steps = [SIZES[-1] // size for size in SIZES]
        return tuple(reduce(near, "(d a) (h b) (w c) -> d h w", "mean", a=k, b=k, c=k) for k in steps)

    def box(self, unit: float) -> Float64[np.ndarray, "4 4"]:
        """From the unit cube between the faces to the world, of this unit in mm, around the centre."""
        matrix = np.eye(4)
        matrix[:3, :3] = self.linear * (self.high - self.low) / unit
        matrix[:3, 3] = self.linear @ (self.low - self.centre) / unit
        return matrix


def content(volume: Volume, mask: Mask | None = None) -> Content:
    """The foreground of an image and the grids around it. Raises as `align`."""
    array = np.asarray(volume.array, np.float32)
    least = array.min()
    if mask is not None:
        if mask.shape != array.shape:
            raise ValueError(f"the mask of {volume.path} is {mask.shape}, but the image is {array.shape}")
        array = np.where(mask, array, least)
    shown = array > least
    if not shown.any():
        raise BadInput(f"{volume.path} shows nothing (every voxel of it, or in its mask, is {least:g}); give another.")
    sides = [np.flatnonzero(shown.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    low, high = (np.array([float(side[end]) for side in sides]) + (end + 0.5) for end in (0, -1))
    linear = np.asarray(volume.affine[:3, :3], np.float64)
    n = SIZES[-1]
    view = _averaged(array, least, linear, low, high, n)
    foreground = _foreground(view)
    places = np.argwhere(foreground)
    voxel = (high - low) / n
    centre = low + (places.mean(0) + 0.5) * voxel
    radius = np.sqrt(np.square((places - places.mean(0)) * voxel @ linear.T).sum(1).mean())
    margin = MARGIN * np.ptp(places, axis=0) + 1
    low, high = low + (places.min(0) - margin) * voxel, low + (places.max(0) + 1 + margin) * voxel
    fine = _averaged(array, least, linear, low, high, n)
    fine = (fine / np.percentile(fine[_foreground(fine)], 99)).clip(0, 1)
    grids = [_averaged(fine, np.float32(0), np.eye(3), np.full(3, -0.5), np.full(3, n - 0.5), m) for m in SIZES[:-1]]
    return Content((*grids, fine), _foreground(fine), array.shape, linear, low, high, centre, float(radius))


def _averaged(
    array: np.ndarray, least: np.float32, linear: np.ndarray, low: np.ndarray, high: np.ndarray, n: int
) -> np.ndarray:
    """The array less its `least` value, which it has beyond its faces, as Gaussian averages at the centres of n³ boxes
    between low and high, in voxels."""
    voxel = np.linalg.norm(linear, axis=0)
    blur = BLUR * np.max((high - low) * voxel) / n
    weights = []
    for size, first, last, length in zip(array.shape, low, high, voxel, strict=True):
        place = first + (np.arange(n) + 0.5) / n * (last - first)
        sigma = max(blur / length, 0.6)  # below it the average would depend on where between voxels it is
        weight = np.exp(-0.5 * np.square((place[:, None] - np.arange(size)) / sigma)) / (sigma * np.sqrt(2 * np.pi))
        weights.append(weight.astype(np.float32))
    x, y, z = weights
    average = np.tensordot(x, y @ (array @ z.T), 1)
    return average - least * np.einsum("i,j,k->ijk", *(w.sum(1) for w in weights))


def _foreground(view: np.ndarray) -> np.ndarray:
    """The largest body of what is brighter than background, by Otsu's threshold (IEEE Trans. SMC 1979)."""
    counts, edges = np.histogram(view, 256)
    middles = (edges[1:] + edges[:-1]) / 2
    below, total = np.cumsum(counts)[:-1], np.cumsum(counts * middles)[:-1]
    above, rest = counts.sum() - below, (counts * middles).sum() - total
    between = below * above * np.square(total / below - rest / np.maximum(above, 1))
    bodies, _ = ndimage.label(view > edges[1 + np.argmax(between)])
    return bodies == 1 + np.argmax(np.bincount(bodies.ravel())[1:])
