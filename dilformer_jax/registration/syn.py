"""SyN (Avants et al., Med Image Anal 2008) by ANTsPy, the classical method that papers compare with.

`ants.registration` has it as type 'SyN', with ANTs' own affine alignment first, and as 'SyNOnly', from the identity, as
TransMorph's scripts run it on sets that come aligned: mean squares, at most 160, 80 and 40 iterations. These are the
settings here too, but after the alignment, since sets such as LPBA40 do not come aligned (S37 to S35 with 40, 20 and 0
iterations: Dice .699, from the identity .677). What ANTs' files hold is read as any transform of ITK's is and becomes
a displacement in voxels.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from dilformer_jax.io import itk
from dilformer_jax.io.transforms import Grid, Step, Transform
from dilformer_jax.io.volumes import BadInput, normalise
from dilformer_jax.io.voxel_fields import displacement as in_voxels

METRICS = ("CC", "meansquares", "mattes")
SEED = 1  # of the points that the affine alignment looks at; ANTS_RANDOM_SEED in the environment goes before it
SMALLEST = 16  # voxels an axis, of which the coarsest level keeps a quarter

Image = Float32[np.ndarray, "_ _ _"]
Displacement = Float32[np.ndarray, "_ _ _ 3"]


@dataclass(frozen=True)
class Syn:
    """How SyN registers, in ANTs' terms.

    Attributes:
      metric: 'CC' (local cross-correlation), 'meansquares' or 'mattes' (mutual information).
      sampling: CC's radius in voxels, or the bins of 'mattes'; no matter to 'meansquares'.
      iterations: at most, on each level from the coarsest, every one of twice the resolution of the one before; the
        last is the images' own.
      step: the gradient step, in voxels.
      update_smoothing: variance in voxels of the smoothing of each update.
      total_smoothing: that of the whole displacement.
      affine: whether ANTs' affine alignment goes before.
    """

    metric: str = "meansquares"
    sampling: int = 4
    iterations: tuple[int, ...] = (160, 80, 40)
    step: float = 0.2
    update_smoothing: float = 3.0
    total_smoothing: float = 0.0
    affine: bool = True

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"SyN's metric is one of {', '.join(METRICS)}, not {self.metric!r}")

    @property
    def name(self) -> str:
        """What results call it: every setting that another run of ANTs would need."""
        how = {"CC": f"CC radius {self.sampling}", "mattes": f"Mattes MI {self.sampling} bins"}
        return (
            f"{'SyN' if self.affine else 'SyNOnly'}, {how.get(self.metric, 'mean squares')}, "
            f"{'x'.join(map(str, self.iterations))} iterations, "
            f"SyN[{self.step:g},{self.update_smoothing:g},{self.total_smoothing:g}]"
        )


def displacement(
    fixed: Image,
    moving: Image,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    how: Syn | None = None,
    names: tuple[Any, Any] = ("fixed", "moving"),
) -> Displacement:
    """The displacement, in voxels, on the grid that both images share; intensities are as in their files, `spacing` is
    mm per voxel along each axis.

    Both images are scaled to [0, 1] by their percentiles first, without which mean squares would mean nothing. It runs
    on as many threads as ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS says, or on all; on one it gives the same bits each time,
    on more the affine alignment adds up in another order and can end elsewhere. Raises BadInput where ANTsPy is not
    installed or fails, and, saying which of `names` it is, for an image that is too small or whose intensities cannot
    be scaled, and ValueError for two shapes.
    """
    if fixed.shape != moving.shape:
        raise ValueError(f"fixed is {fixed.shape} and moving {moving.shape}; both lie on one grid")
    how = how or Syn()
    ants = _ants()
    check_shape(fixed.shape, names[0])
    images = []
    for array, name in zip((fixed, moving), names, strict=True):
        try:
            scaled = normalise(array, "percentile")
        except BadInput as fault:
            raise BadInput(f"{name}: {fault}") from fault
        images.append(ants.from_numpy(scaled, spacing=tuple(float(side) for side in spacing)))
    os.environ.setdefault("ANTS_RANDOM_SEED", str(SEED))
    with tempfile.TemporaryDirectory(prefix="dilformer-syn-") as folder:
        try:
            found = ants.registration(
                *images,
                type_of_transform="SyN" if how.affine else "SyNOnly",
                outprefix=f"{folder}/",
                syn_metric=how.metric,
                syn_sampling=how.sampling,
                reg_iterations=how.iterations,
                grad_step=how.step,
                flow_sigma=how.update_smoothing,
                total_sigma=how.total_smoothing,
            )
        except RuntimeError as error:
            raise BadInput(
                f"ANTs could not register {names[1]} to {names[0]} ({error}); look at the images."
            ) from error
        # ITK's axes run to the left, to the back and up where the direction is the identity.
        grid = Grid(fixed.shape, np.diag([-spacing[0], -spacing[1], spacing[2], 1.0]))
        return in_voxels(transform(found["fwdtransforms"]), grid, grid)


def transform(files: Sequence[str | Path]) -> Transform:
    """Files as `ants.apply_transforms` takes them, which warps by the first of them last, as a transform of points.

    Raises BadInput where one is neither an affine nor a displacement field.
    """
    # Of images the last acts first; of points, which go the other way, the first.
    return tuple(_step(Path(file)) for file in files)


def check_shape(shape: tuple[int, ...], name: Any) -> None:
    """Raises BadInput, about `name`, where an axis is too short for the coarsest level."""
    if min(shape) < SMALLEST:
        by = "x".join(map(str, shape))
        raise BadInput(f"{name} is {by}, too small for SyN, which takes {SMALLEST} voxels or more along each axis.")


def check_installed() -> None:
    """Raises BadInput where ANTsPy is not, before anything is read."""
    _ants()


def _step(path: Path) -> Step:
    return itk.read_field(path) if path.name.endswith((".nii", ".nii.gz")) else itk.read_affine(path)


def _ants() -> Any:
    try:
        import ants  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise BadInput(f"SyN needs ANTsPy ({error}); install it: pip install 'dilformer-jax[ants]'.") from error
    return ants
