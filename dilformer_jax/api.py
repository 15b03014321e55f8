"""Registration for Python: what the command `register` does, for images in files and in memory."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from dilformer_jax.io import bundle, transform_files
from dilformer_jax.io.folders import staged
from dilformer_jax.io.geometry import apply_affine
from dilformer_jax.io.headers import ASKING, BadInput, Reading
from dilformer_jax.io.masks import read_mask
from dilformer_jax.io.transforms import Transform, carried
from dilformer_jax.io.volumes import Volume, check_large_enough, nifti, on_grid, read_image, read_labels
from dilformer_jax.registration.warps import background, warped

if TYPE_CHECKING:
    from dilformer_jax.registration import pipeline
    from dilformer_jax.registration.predictor import Predictor
    from dilformer_jax.registration.refine import Refinement

ROLES = ("fixed", "moving")
SMALLEST = 8  # voxels along each axis
Image = nib.spatialimages.SpatialImage


@dataclass(frozen=True, eq=False)
class How:
    """Everything about a registration but its images."""

    predictor: "Predictor | None"
    refinement: "Refinement | None"
    affine: Any = "auto"
    formats: tuple[str, ...] = ()
    report: bool = False
    reading: Reading = ASKING
    assume_same_grid: bool = False
    command: str = "dilformer_jax.register(...)"

    @property
    def settings(self) -> dict[str, Any]:
        """What a pair's results depend on beside its files."""
        return {
            "network": None if self.predictor is None else self.predictor.name,
            "parameters_sha256": None if self.predictor is None else self.predictor.sha256,
            **({} if self.predictor is None else self.predictor.asked),
            "refinement": None if self.refinement is None else dataclasses.asdict(self.refinement),
            "affine": str(self.affine) if isinstance(self.affine, Path) else self.affine,
            "formats": list(self.formats),
            "report": self.report,
            "reading": dataclasses.asdict(self.reading) | {"assume_same_grid": self.assume_same_grid},
        }


@dataclass(frozen=True, eq=False)
class Inputs:
    """A pair as it was read: both images, with each its label map and mask where there are any."""

    fixed: Volume
    moving: Volume
    labels: tuple[Volume | None, Volume | None]
    masks: tuple[np.ndarray | None, np.ndarray | None]

    @property
    def notes(self) -> tuple[str, ...]:
        """What had to be settled in reading them."""
        volumes = (self.fixed, self.moving, *self.labels)
        return tuple(note for volume in volumes if volume is not None for note in volume.notes)


def network(weights: Path | str | None, workdir: Path | str | None) -> "tuple[Predictor | None, str]":
    """The network, None where `weights` are None or 'none', and the preset of refinement where none is asked for.

    With a `workdir`, `weights` are to be left at 'default'. Raises BadInput where there is no such network.
    """
    from dilformer_jax.registration.predictor import AFTER_DEFAULT, load_predictor

    if workdir is not None:
        if weights != bundle.DEFAULT:
            raise BadInput(f"The network is that of weights {weights} or of workdir {workdir}; give one of them.")
        return load_predictor(workdir=workdir), "fast"
    if weights is None or weights == bundle.NONE:
        return None, "default"
    return load_predictor(weights), AFTER_DEFAULT if weights == bundle.DEFAULT else "fast"


def read(how: How, images: Sequence[Any], labels: Sequence[Any], masks: Sequence[Any]) -> Inputs:
    """The pair, each of fixed and moving by its path or as a nibabel image. Raises BadInput, in one sentence."""
    fixed, moving = (read_image(x, how.reading, role) for x, role in zip(images, ROLES, strict=True))
    for image in (fixed, moving):
        check_large_enough(image, SMALLEST)
    maps, seen = [], []
    for image, label, mask, role in zip((fixed, moving), labels, masks, ROLES, strict=True):
        found = None if label is None else read_labels(label, how.reading, f"{role} labels")
        maps.append(None if found is None else on_grid(found, image, how.assume_same_grid))
        seen.append(None if mask is None else read_mask(mask, image, how.reading, f"{role} mask"))
    return Inputs(fixed, moving, (maps[0], maps[1]), (seen[0], seen[1]))


def carry_out(how: How, inputs: Inputs, *, distances: bool = False) -> "pipeline.Registration":
    """The registration itself. Raises BadInput where an affine's file cannot be used, and as pipeline.register does."""
    from dilformer_jax.registration.pipeline import AFFINES, register

    affine = how.affine
    if isinstance(affine, str | Path) and str(affine) not in AFFINES:
        affine = _affine(Path(affine), inputs)
    found = register(
        inputs.fixed,
        inputs.moving,
        how.predictor,
        *inputs.labels,
        how.refinement,
        affine=affine if isinstance(affine, str) else np.asarray(affine, float),
        fixed_mask=inputs.masks[0],
        moving_mask=inputs.masks[1],
        distances=distances,
    )
    return dataclasses.replace(found, warnings=(*inputs.notes, *found.warnings))


def _affine(path: Path, inputs: Inputs) -> np.ndarray:
    if not path.is_file():
        raise BadInput(f"affine {path} is no file; give auto, search, none or a file with an affine.")
    matrix = np.eye(4)
    for step in transform_files.read_transform(path, inputs.fixed, inputs.moving):
        if not isinstance(step, np.ndarray):
            raise BadInput(f"{path} holds a field of displacements; give a file with an affine alone.")
        matrix = step @ matrix
    return matrix


@dataclass(frozen=True, eq=False)
class Registration:
    """A registered pair.

    Attributes:
      moved: the moving image on the fixed image's grid, as a NIfTI image with the fixed image's header.
      moved_labels: its label map likewise, by nearest neighbour, where there was one.
      affine: (4, 4), the affine part, points of the fixed image to points of the moving image, RAS mm.
      metrics: what `registration.pipeline.Registration` lists: folding, displacement, inverse error, Dice ...
      warnings: sentences about what may be wrong.
    """

    moved: nib.Nifti1Image
    moved_labels: nib.Nifti1Image | None
    affine: np.ndarray
    metrics: Mapping[str, Any]
    warnings: tuple[str, ...]
    found: "pipeline.Registration"
    labels: tuple[Volume | None, Volume | None]
    how: How

    @functools.cached_property
    def displacement(self) -> np.ndarray:
        """(D, H, W, 3) in mm (RAS) at each voxel of the fixed image: how far its match lies in the moving image."""
        return _displaced(self.found.transform, self.found.fixed)

    @functools.cached_property
    def inverse(self) -> np.ndarray:
        """The same at each voxel of the moving image: how far its match lies in the fixed image."""
        return _displaced(self.found.inverse_transform, self.found.moving)

    def apply(
        self, image: "Path | str | Image", *, labels: bool = False, inverse: bool = False, interpolation: str = "linear"
    ) -> nib.Nifti1Image:
        """Another image of the moving subject on the fixed image's grid; with `inverse` one of the fixed subject on the
        moving image's. Labels are carried by nearest neighbour, images 'linear' or 'cubic'. Raises BadInput."""
        volume = (read_labels if labels else read_image)(image, self.how.reading)
        transform = self.found.inverse_transform if inverse else self.found.transform
        grid = self.found.moving if inverse else self.found.fixed
        outside = 0 if labels else background(volume)
        kind = "nearest" if labels else interpolation
        return nifti(warped(volume, transform, grid.array.shape, grid.affine, kind, outside), grid)

    def points(self, points: np.ndarray, *, inverse: bool = False) -> np.ndarray:
        """Where points (n, 3) of the fixed image, RAS mm, lie in the moving image; with `inverse` the other way."""
        transform = self.found.inverse_transform if inverse else self.found.transform
        return carried(np.asarray(points, np.float64), transform)

    def save(self, output: Path | str, *, formats: Sequence[str] = (), report: bool = False) -> Path:
        """Writes what `dilformer register` does into a folder, and returns it. Raises BadInput where it cannot."""
        from dilformer_jax.reporting import outputs

        with staged(output, outputs.OPTIONAL) as folder:
            record = {"command": self.how.command, "settings": self.how.settings}
            outputs.write(folder, self.found, formats=formats, labels=self.labels, report=report, record=record)
        return Path(output)

    def _repr_png_(self) -> bytes:
        """The picture that a notebook shows."""
        from dilformer_jax.reporting import figures, outputs, pair_figures
        from dilformer_jax.reporting.shown import upright

        return figures.png(pair_figures.alignment(upright(outputs.shown(self.found, *self.labels))), dpi=100)


def registered(
    fixed: "Path | str | Image",
    moving: "Path | str | Image",
    *,
    weights: Path | str | None = bundle.DEFAULT,
    workdir: Path | str | None = None,
    affine: "str | Path | np.ndarray" = "auto",
    smoothness: float | None = None,
    preset: str | None = None,
    refine: int | None = None,
    fixed_labels: "Path | str | Image | None" = None,
    moving_labels: "Path | str | Image | None" = None,
    fixed_mask: "Path | str | Image | None" = None,
    moving_mask: "Path | str | Image | None" = None,
    reading: Reading = ASKING,
    **refinement: Any,
) -> Registration:
    """Registers a moving image to a fixed one, both of any shape, spacing and orientation: paths or nibabel images.

    By the network that ships, or that of other `weights` (a bundle) or of a `workdir` (a training run), and refinement
    behind it; with `weights` None by refinement alone. `preset` is 'fast', the network alone, 'default' or 'best';
    unless given, 'default' with the weights that ship or with none, and 'fast' with others. `refine` replaces the
    preset's steps at the finest level.
    A network that was trained for several is asked for `smoothness`, its regulariser's weight times the usual one.
    Further keywords are `Refinement`'s: `similarity`, `window`, `total_smoothing` ...
    `affine` is 'auto', 'search', 'none', a file or a matrix (4, 4) from fixed to moving RAS mm. Masks hide all but the
    brain. `reading` says how to read what headers leave open.

    Raises BadInput, in one sentence, for what the user can mend.
    """
    from dilformer_jax.registration.refine import from_options

    predictor, default_preset = network(weights, workdir)
    if predictor is not None:
        predictor = predictor.with_smoothness(smoothness)
    elif smoothness is not None:
        raise BadInput("smoothness is asked of a network; leave it out with weights=None.")
    refining = from_options(preset, refine, network=predictor is not None, default_preset=default_preset, **refinement)
    given = affine if isinstance(affine, str | Path) else np.asarray(affine).tolist()
    how = How(predictor, refining, given, reading=reading)
    inputs = read(how, (fixed, moving), (fixed_labels, moving_labels), (fixed_mask, moving_mask))
    found = carry_out(how, inputs)
    moved_labels = None if found.moved_labels is None else nifti(found.moved_labels, found.fixed)
    return Registration(
        nifti(found.moved, found.fixed),
        moved_labels,
        found.affine,
        found.metrics,
        found.warnings,
        found,
        inputs.labels,
        how,
    )


def _displaced(transform: Transform, grid: Volume) -> np.ndarray:
    voxels = np.stack(np.unravel_index(np.arange(grid.array.size), grid.array.shape), axis=-1)
    points = apply_affine(grid.affine, voxels)
    return (carried(points, transform) - points).astype(np.float32).reshape(*grid.array.shape, 3)
