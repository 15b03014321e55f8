"""A brain brought onto the grid of a data set: turned, aligned, resampled, cropped, its intensities scaled."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import nibabel as nib
import numpy as np
from jaxtyping import Float64, Real

from dilformer_jax.data.preprocessing import corner
from dilformer_jax.data.subjects import Subject
from dilformer_jax.data.volumes import image_of, labels_of, opened
from dilformer_jax.io.geometry import apply_affine, is_orientation, orientation, spacing
from dilformer_jax.io.headers import ASKING, BadInput, Reading, place
from dilformer_jax.io.volumes import Volume, normalise
from dilformer_jax.ops.foreground import box, content
from dilformer_jax.ops.resampling import resampled, smoothed

Matrix = Real[np.ndarray, "4 4"]
# The affine from RAS mm of the first image, a template, to RAS mm of the second one, and warnings about it.
Aligner = Callable[[Volume, Volume], tuple[Matrix, tuple[str, ...]]]
NORMALISATIONS = ("none", "max", "minmax", "percentile")
INTERPOLATIONS = ("nearest", "argmax")
ENDS = ("LR", "PA", "IS")
SMOOTHED = 1.2  # voxels that are larger by more than this are made of blurred ones, as in `registration.grids`
CUT = 0.5  # percent of what an image shows, beyond which it is said that the grid cuts it off


@dataclass(frozen=True)
class Settings:
    """How brains are brought onto one grid, in the order in which it is done.

    orientation: where the axes of the grid point to, such as 'LPS'; else as in the files. Axes are renamed and
      reversed; a brain that lies obliquely is not turned upright.
    spacing: the edges of a voxel in mm; else those of the files. grid: how many voxels; else as many as cover what the
      files cover. Where `grid` is given, its middle lies where that of what the image shows does, or, where all files
      lie on one grid or are aligned to a template, at one place for all.
    interpolation: of labels, 'nearest' or 'argmax' (that of trilinear shares); that of images is trilinear, after a
      blur where voxels become larger.
    crop: a box around the non-zero voxels of each image, or of the template, as in `preprocessing`.
    normalise: a method of `io.volumes.normalise`, after all else.
    reading, assume_same_grid: how files are read that leave something open.
    """

    orientation: str | None = None
    spacing: tuple[float, float, float] | None = None
    grid: tuple[int, int, int] | None = None
    interpolation: str = "nearest"
    crop: tuple[int, int, int] | None = None
    normalise: str = "none"
    reading: Reading = ASKING
    assume_same_grid: bool = False

    def __post_init__(self) -> None:
        if self.orientation is not None and not is_orientation(self.orientation):
            raise BadInput(
                f"{self.orientation!r} does not name three axes; give one letter each of R or L, A or P, S or I, such "
                "as LPS."
            )
        for name, numbers in (("grid", self.grid), ("crop", self.crop), ("grid spacing", self.spacing)):
            if numbers is not None and not all(0 < number < 1e5 for number in numbers):
                raise BadInput(f"The {name} is {numbers}; give three positive numbers.")
        for name, choice, choices in (
            ("normalisation", self.normalise, NORMALISATIONS),
            ("interpolation of labels", self.interpolation, INTERPOLATIONS),
        ):
            if choice not in choices:
                raise BadInput(f"{choice!r} is no {name}; choose one of {', '.join(choices)}.")


@dataclass(frozen=True, eq=False)
class Grid:
    """A grid of voxels and its affine to RAS mm."""

    shape: tuple[int, int, int]
    affine: Float64[np.ndarray, "4 4"]

    def told(self) -> tuple[tuple[int, int, int], tuple[float, ...], str]:
        """Its shape, voxel size and axes, which all brains of a data set have in common."""
        return self.shape, tuple(round(size, 3) for size in spacing(self.affine)), orientation(self.affine)


@dataclass(frozen=True, eq=False)
class Space:
    """What the brains of a data set have in common: nothing, one grid of their files, or a template with a grid."""

    shared: bool = False
    template: Volume | None = None
    name: str | None = None  # of the subject that is the template
    grid: Grid | None = None


@dataclass(frozen=True, eq=False)
class Standardised:
    """A brain on its grid, the affine that brought it there from the template, and sentences on what was settled."""

    image: Volume
    labels: Volume | None
    affine: Matrix | None
    notes: tuple[str, ...]


def template_space(template: Volume, settings: Settings, name: str | None) -> Space:
    """The space of a template, with the grid that all brains aligned to it are resampled to."""
    grid = grid_of(template, settings, _middle(template))
    if settings.crop is not None:
        grid = _cropped(_on(template, grid), settings.crop)
    return Space(True, template, name, grid)


def header_grid(subject: Subject, settings: Settings) -> Grid | None:
    """The grid of a subject's file by its header; None for a bare array, which has none. Raises BadInput."""
    image = opened(subject, settings.reading)
    if image is None:
        return None
    d, h, w = (*image.shape, 1, 1)[:3]
    return Grid((int(d), int(h), int(w)), np.asarray(image.affine, np.float64))


def told_by(grid: Grid, settings: Settings) -> tuple[tuple[int, int, int], tuple[float, ...], str]:
    """What `Grid.told` will say of the brain whose file lies on this grid."""
    told = grid_of(grid, settings, None).told()
    return (settings.crop or told[0], *told[1:])


def grid_of(file: Grid | Volume, settings: Settings, middle: Float64[np.ndarray, "3"] | None) -> Grid:
    """The grid by the settings, before any crop, for a file's: around `middle`, in RAS mm, or that of the file's."""
    shape = file.shape if isinstance(file, Grid) else file.array.shape
    affine = np.asarray(file.affine, np.float64)
    here, sides = orientation(affine), np.array(spacing(affine))
    axes = [
        next(k for k, other in enumerate(here) if any({letter, other} <= set(ends) for ends in ENDS))
        for letter in settings.orientation or here
    ]
    signs = [1 if here[axis] == letter else -1 for axis, letter in zip(axes, settings.orientation or here, strict=True)]
    size = np.array(settings.spacing or sides[axes])
    counts = settings.grid or np.ceil(np.array(shape)[axes] * sides[axes] / size - 1e-3).astype(int)
    d, h, w = (int(count) for count in counts)
    new = np.eye(4)
    new[:3, :3] = affine[:3, axes] / sides[axes] * signs * size
    if middle is None or settings.grid is None:
        middle = apply_affine(affine, (np.array(shape) - 1) / 2)
    new[:3, 3] = middle - new[:3, :3] @ (np.array([d, h, w]) - 1) / 2
    voxels = np.linalg.inv(affine) @ new
    whole = np.rint(voxels)
    if np.abs(voxels - whole)[:3, :3].max() < 1e-3:
        new = affine @ whole  # voxels of the file, so that nothing is interpolated
    return Grid((d, h, w), new)


def standardised(subject: Subject, settings: Settings, space: Space, aligner: Aligner | None = None) -> Standardised:
    """The subject's files brought onto the grid that the settings and the space say. Raises BadInput."""
    image = image_of(subject, settings.reading)
    labels = labels_of(subject, image, settings.reading, assume_same_grid=settings.assume_same_grid)
    notes = image.notes + (() if labels is None else labels.notes)
    matrix = None
    if space.template is None:
        grid = grid_of(image, settings, None if space.shared else _middle(image))
        if settings.crop is not None:
            grid = _cropped(_on(image, grid), settings.crop)
    else:
        assert space.grid is not None
        grid, matrix = space.grid, np.eye(4)
        if subject.name != space.name:
            assert aligner is not None
            matrix, warnings = aligner(space.template, image)
            notes += tuple(f"{subject.name}: {warning}" for warning in warnings)
    to_file = np.eye(4) if matrix is None else matrix
    notes += _cut(image, grid, to_file)
    array = _resampled(image, grid, to_file, "linear")
    try:
        array = normalise(array, settings.normalise)
    except BadInput as fault:
        raise BadInput(f"{subject.image}: {fault}") from fault
    header = nib.nifti1.Nifti1Header()
    place(header, grid.affine)
    header.set_xyzt_units("mm")
    made = Volume(array, grid.affine, image.path, header)
    if labels is not None:
        ids = _resampled(labels, grid, to_file, settings.interpolation)
        labels = Volume(ids, grid.affine, labels.path, header)
    return Standardised(made, labels, matrix, notes)


def _middle(image: Volume) -> Float64[np.ndarray, "3"]:
    """The middle of what an image shows, RAS mm."""
    low, high = box(content(image.array))
    return apply_affine(image.affine, (low + high) / 2)


def _on(image: Volume, grid: Grid) -> Volume:
    return replace(image, array=_resampled(image, grid, np.eye(4), "linear"), affine=grid.affine)


def _cropped(image: Volume, shape: tuple[int, int, int]) -> Grid:
    """The grid of a box of this shape that is cropped of the image."""
    shift = np.eye(4)
    shift[:3, 3] = corner(image.array, shape)
    return Grid(shape, np.asarray(image.affine @ shift, np.float64))


def _resampled(volume: Volume, grid: Grid, to_file: Matrix, kind: str) -> np.ndarray:
    """The volume on the grid, with background beyond its file."""
    array = volume.array
    # Rounded, so that voxels which coincide do so exactly.
    places = (np.linalg.inv(volume.affine) @ to_file @ grid.affine).round(9)
    outside = min(0, array.min())
    ones = np.abs(places[:3, :3])
    if np.array_equal(places, np.rint(places)) and np.array_equal(
        np.sort(ones, axis=None), np.sort(np.eye(3), axis=None)
    ):
        return _window(array, places.astype(int), grid.shape, outside)
    if kind == "linear":
        factors = np.linalg.norm(places[:3, :3], axis=1)
        array = smoothed(array, np.where(factors > SMOOTHED, factors, 1.0).tolist())
    return resampled(array, grid.shape, lambda points: apply_affine(places, points), kind, outside)


def _window(array: np.ndarray, places: np.ndarray, shape: tuple[int, int, int], outside: float | int) -> np.ndarray:
    """As `_resampled`, where `places` only exchange and reverse axes and shift by whole voxels."""
    axes = np.abs(places[:3, :3]).argmax(axis=0)
    turned = array.transpose(axes)
    result = np.full(shape, outside, array.dtype)
    source, target = [], []
    for axis, (old, size) in enumerate(zip(axes, shape, strict=True)):
        start = places[old, 3]
        if places[old, axis] < 0:
            turned = np.flip(turned, axis)
            start = turned.shape[axis] - 1 - start
        low, high = max(0, start), max(0, start, min(turned.shape[axis], start + size))
        source.append(slice(low, high))
        target.append(slice(low - start, high - start))
    result[tuple(target)] = turned[tuple(source)]
    return result


def _cut(image: Volume, grid: Grid, to_file: Matrix) -> tuple[str, ...]:
    """A sentence where the grid leaves out more than little of what the image shows."""
    shown = np.argwhere(content(image.array))
    shown = shown[:: max(1, len(shown) // 100_000)]
    points = apply_affine(np.linalg.inv(to_file @ grid.affine) @ image.affine, shown)
    inside = ((points > -0.5) & (points < np.array(grid.shape) - 0.5)).all(axis=1)
    percent = 100 * float(1 - inside.mean())
    return (f"{image.path}: {percent:.2g} % of what it shows lies outside the grid.",) if percent > CUT else ()
