"""A registered pair as pictures show it: volumes on one grid, turned upright, and what is looked for in them."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Num, Real
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax.io.geometry import apply_affine, orientation, spacing
from dilformer_jax.ops.folding import jacobian_determinant

Image = Float32[np.ndarray, "_ _ _"]
Labels = Int32[np.ndarray, "_ _ _"]
IMAGES = ("fixed", "moving", "aligned", "moved")
LABELS = ("fixed_labels", "moving_labels", "moved_labels")
LARGEST = 256  # pixels along the volume's longest side; borders of labels have twice as many
LOCATIONS = 5  # folds that are listed


@dataclass(frozen=True, eq=False)
class Shown:
    """A pair on one grid, whose `affine` takes voxels to RAS mm.

    `moving` lies there by the headers alone, `aligned` after the affine, `moved` after all of it; so do
    `moving_labels` and `moved_labels`. `displacement` is the deformable part alone, in voxels of this grid:
    moved(x) = aligned(x + displacement(x)). Raises ValueError for shapes that do not agree.
    """

    fixed: Image
    moving: Image
    aligned: Image
    moved: Image
    displacement: Float32[np.ndarray, "_ _ _ 3"]
    affine: Real[np.ndarray, "4 4"]
    fixed_labels: Labels | None = None
    moving_labels: Labels | None = None
    moved_labels: Labels | None = None

    def __post_init__(self) -> None:
        for name in (*IMAGES, *LABELS):
            volume = getattr(self, name)
            if volume is not None and volume.shape != self.displacement.shape[:3]:
                raise ValueError(f"{name} is {volume.shape}, the displacement {self.displacement.shape}: one grid")

    @property
    def spacing(self) -> np.ndarray:
        """mm per voxel along each array axis."""
        return np.array(spacing(self.affine))

    @property
    def orientation(self) -> str:
        """Where each array axis points to, such as "RAS"."""
        return orientation(self.affine)

    @functools.cached_property
    def determinant(self) -> Float32[np.ndarray, "D H W"]:
        """The Jacobian determinant of x + displacement(x)."""
        return jacobian_determinant(self.displacement)

    @functools.cached_property
    def millimetres(self) -> Float32[np.ndarray, "D H W"]:
        """The length of the displacement."""
        return np.linalg.norm(self.displacement @ self.affine[:3, :3].T.astype(np.float32), axis=-1)

    @functools.cached_property
    def limits(self) -> dict[str, tuple[float, float]]:
        """The intensities shown as black and white: the moving image's own serve wherever it is carried to."""
        fixed, moving = window(self.fixed), window(self.moving)
        return {"fixed": fixed} | dict.fromkeys(IMAGES[1:], moving)

    def scaled(self, name: str) -> Float32[np.ndarray, "D H W"]:
        """The image from 0, black, to 1, white."""
        low, high = self.limits[name]
        return np.clip((getattr(self, name) - low) / (high - low), 0, 1)


def upright(shown: Shown) -> Shown:
    """The same pair with its axes in the order and direction of R, A, S, or nearest to them where it lies obliquely."""
    turn = nib.orientations.io_orientation(shown.affine)
    order, signs = np.argsort(turn[:, 0]), turn[:, 1].astype(np.float32)
    volumes = {name: getattr(shown, name) for name in (*IMAGES, *LABELS, "displacement")}
    turned: dict[str, Any] = {
        name: None if volume is None else nib.orientations.apply_orientation(volume, turn)
        for name, volume in volumes.items()
    }
    turned["displacement"] = (turned["displacement"] * signs)[..., order]
    shape = shown.displacement.shape[:3]
    return replace(shown, **turned, affine=shown.affine @ nib.orientations.inv_ornt_aff(turn, shape))


def window(image: Num[np.ndarray, "_ _ _"]) -> tuple[float, float]:
    """From the lowest intensity to the 99.8th percentile, or 1 more where that is the same."""
    low, high = float(image.min()), float(np.percentile(image, 99.8))
    return low, high if high > low else low + 1


def centre_of_mass(image: Num[np.ndarray, "_ _ _"]) -> list[int]:
    """The voxel nearest to it, of intensities above the lowest; the middle of a constant image."""
    weight = image - image.min()
    centre = []
    for axis in range(3):
        profile = weight.sum(axis=tuple(a for a in range(3) if a != axis), dtype=np.float64)
        total = profile.sum()
        middle = (np.arange(len(profile)) @ profile) / total if total > 0 else (len(profile) - 1) / 2
        centre.append(round(float(middle)))
    return centre


def slices(image: Float[np.ndarray, "D H W"], axis: int, count: int) -> list[int]:
    """The indices of up to `count` slices along an axis, evenly spread over what the image, 0 to 1, has in it."""
    profile = (image > 0.1).sum(axis=tuple(a for a in range(3) if a != axis))
    filled = np.flatnonzero(profile > 0.02 * profile.max())
    first, last = (filled[0], filled[-1]) if len(filled) else (0, len(profile) - 1)
    margin = 0.08 * (last - first)
    return [int(k) for k in np.unique(np.linspace(first + margin, last - margin, count).round())]


def pixels(shown: Shown, tile: Num[np.ndarray, "_ _"], axis: int, largest: int = LARGEST) -> Num[np.ndarray, "_ _"]:
    """A slice across `axis` with square pixels, at most `largest` along the volume's longest side: images linear,
    labels nearest and twice as fine."""
    finer = 2 if tile.dtype.kind == "i" else 1
    side = max(shown.spacing.min(), (np.array(shown.fixed.shape) * shown.spacing).max() / largest) / finer
    factors = np.delete(shown.spacing, axis) / side
    if finer == 2:
        return ndimage.zoom(tile, factors, order=0, grid_mode=True, mode="nearest")
    smooth = ndimage.gaussian_filter(tile, np.where(factors < 0.8, 0.4 / factors, 0))  # no aliasing where it shrinks
    return np.clip(ndimage.zoom(smooth, factors, order=1, grid_mode=True, mode="nearest"), 0, 1)


def edges(image: Float[np.ndarray, "width height"], sigma: float = 1.5) -> Bool[np.ndarray, "width height"]:
    """Canny's edges of a slice from 0 to 1: ridges of the gradient at `sigma` pixels, weak ones where they go on from
    strong ones (Canny, TPAMI 1986)."""
    x, y = (ndimage.gaussian_filter(image, sigma, order=order) for order in ((1, 0), (0, 1)))
    slope = np.hypot(x, y)
    step = np.stack([x, y]) / np.maximum(slope, 1e-12)
    places = np.indices(image.shape)
    ahead, behind = (ndimage.map_coordinates(slope, places + s * step, order=1, mode="nearest") for s in (1, -1))
    ridge = (slope >= ahead) & (slope > behind)
    strong = 0.12 / sigma
    weak = ridge & (slope > 0.4 * strong)
    parts, _ = ndimage.label(weak, np.ones((3, 3)))
    return weak & np.isin(parts, np.unique(parts[weak & (slope > strong)]))


def borders(labels: Num[np.ndarray, "width height"]) -> Bool[np.ndarray, "width height"]:
    """The pixels of structures whose right or upper neighbour has another label, and those of the background."""
    border = np.zeros(labels.shape, bool)
    border[:-1] |= labels[:-1] != labels[1:]
    border[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    return border


def locations(shown: Shown) -> list[dict[str, Any]]:
    """Where to look, as rows of what, value, voxel and RAS mm: the deepest folds, each at its lowest determinant with
    the voxels it joins, or without folds the strongest shrinkage; the strongest growth; the largest displacement."""
    determinant = shown.determinant
    rows = []

    def row(what: str, value: str, flat: int) -> dict[str, Any]:
        voxel = np.array(np.unravel_index(flat, determinant.shape))
        point = apply_affine(shown.affine, voxel)
        return {
            "what": what,
            "value": value,
            "R, A, S [mm]": ", ".join(f"{x:.1f}" for x in point),
            "voxel": ", ".join(str(i) for i in voxel),
        }

    folds, count = ndimage.label(~(determinant > 0), np.ones((3, 3, 3)))
    if count:
        sizes = np.bincount(folds.ravel())
        lowest = np.asarray(ndimage.minimum(determinant, folds, np.arange(1, count + 1)))
        for fold in np.argsort(lowest)[:LOCATIONS] + 1:
            inside = np.flatnonzero(folds.ravel() == fold)
            place = int(inside[np.argmin(determinant.ravel()[inside])])
            voxels = f"{sizes[fold]} voxel{'s' if sizes[fold] > 1 else ''}"
            rows.append(row(f"fold of {voxels}", f"J = {lowest[fold - 1]:.3g}", place))
    else:
        place = int(np.argmin(determinant))
        rows.append(row("strongest shrinkage", f"J = {determinant.flat[place]:.3g}", place))
    place = int(np.argmax(determinant))
    rows.append(row("strongest growth", f"J = {determinant.flat[place]:.3g}", place))
    place = int(np.argmax(shown.millimetres))
    rows.append(row("largest displacement", f"{shown.millimetres.flat[place]:.3g} mm", place))
    return rows
