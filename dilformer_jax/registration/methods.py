"""What is scored: doing nothing, an affine map, SyN, a network, refinement, each as one function of two images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from dilformer_jax.io import voxel_fields
from dilformer_jax.io.geometry import spacing
from dilformer_jax.io.headers import by
from dilformer_jax.io.volumes import BadInput, Volume
from dilformer_jax.registration import refine
from dilformer_jax.registration import syn as ants
from dilformer_jax.registration.affine import align
from dilformer_jax.registration.predictor import Predictor, load_predictor
from dilformer_jax.registration.refine import Refinement
from dilformer_jax.registration.syn import Syn

Displacement = Float32[np.ndarray, "_ _ _ 3"]
SMALLEST = 8  # voxels along each axis, of what is aligned affinely


def _any_shape(shape: tuple[int, ...], name: object) -> None:
    """Neither compiles nor refuses anything."""


@dataclass(frozen=True, eq=False)
class Method:
    """`displacement(fixed, moving)` of two volumes on one grid, in voxels of it: what is timed.

    `compile(shape, name)` is what need not be done for each pair; `check_shape(shape, name)` raises BadInput, about
    `name`, for volumes that are too small. `settings` is what there is to say of it beside its name, `sha256` and
    `parameters` (their count) are of a network's parameters. `warms_up` where the first call takes longer than others.
    """

    name: str
    displacement: Callable[[Volume, Volume], Displacement]
    compile: Callable[[tuple[int, ...], Any], None] = _any_shape
    check_shape: Callable[[tuple[int, ...], Any], None] = _any_shape
    settings: Mapping[str, Any] = field(default_factory=dict)
    sha256: str | None = None
    parameters: int | None = None
    warms_up: bool = True


def identity() -> Method:
    """Doing nothing: what every method is compared with."""
    return Method("identity", lambda fixed, moving: np.zeros((*fixed.array.shape, 3), np.float32))


def affine() -> Method:
    """The affine alignment of `register`, by itself.

    Its Jacobian determinant is the same at every voxel, so that nothing is folded and log J has no spread.
    """

    def displacement(fixed: Volume, moving: Volume) -> Displacement:
        return voxel_fields.displacement((align(fixed, moving).matrix,), fixed, moving)

    return Method("affine", displacement, check_shape=_check_alignable)


def _check_alignable(shape: tuple[int, ...], name: Any) -> None:
    if min(shape) < SMALLEST:
        raise BadInput(f"{name} is {by(shape)}, too small to align; give {SMALLEST} voxels or more along each axis.")


def syn(how: Syn | None = None) -> Method:
    """ANTs' SyN. Raises BadInput where ANTsPy is not installed."""
    ants.check_installed()
    how = how or Syn()

    def displacement(fixed: Volume, moving: Volume) -> Displacement:
        return ants.displacement(fixed.array, moving.array, spacing(fixed.affine), how, (fixed.path, moving.path))

    return Method(how.name, displacement, check_shape=ants.check_shape, settings=asdict(how), warms_up=False)


def network(predictor: Predictor) -> Method:
    """A trained network alone."""

    def displacement(fixed: Volume, moving: Volume) -> Displacement:
        return predictor.displacement(fixed.array, moving.array, (fixed.path, moving.path))

    count = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(predictor.params))
    return Method(
        predictor.name,
        displacement,
        predictor.compile,
        predictor.check_shape,
        {"network": type(predictor.module).__name__} | predictor.asked,
        predictor.sha256,
        count,
    )


def refined(method: Method, predictor: Predictor | None, refinement: Refinement) -> Method:
    """Instance optimisation from what the predictor gives, or without one from nothing."""

    def displacement(fixed: Volume, moving: Volume) -> Displacement:
        arrays, names = (fixed.array, moving.array), (fixed.path, moving.path)
        initial = None if predictor is None else predictor.displacement(*arrays, names)
        return refine.refine(*arrays, refinement, initial, names, spacing(fixed.affine))

    def compile_both(shape: tuple[int, ...], name: Path | str) -> None:
        method.compile(shape, name)
        refine.check_shape(shape, name)
        likely = replace(refinement, similarity="lncc") if refinement.similarity == "auto" else refinement
        refine.compiled(shape, likely, predictor is not None)

    def check_both(shape: tuple[int, ...], name: Path | str) -> None:
        method.check_shape(shape, name)
        refine.check_shape(shape, name)

    name = f"{method.name}, {refinement.steps} steps of refinement"
    settings = {**method.settings, "refinement": asdict(refinement)}
    return Method(name, displacement, compile_both, check_both, settings, method.sha256, method.parameters)


def chosen(
    name: str | None,
    weights: Path | str | None,
    workdir: Path | None,
    refinement: Refinement | None,
    syn_iterations: Sequence[int] | None = None,
    smoothness: float | None = None,
) -> Method:
    """The method of this name, one of 'identity', 'affine' and 'syn', or without one the network of the weights or of
    the workdir, asked for this smoothness; with a refinement, refined; SyN with so many iterations. Raises BadInput
    where that cannot be."""
    if syn_iterations is not None and (name != "syn" or min(syn_iterations) < 0 or max(syn_iterations) < 1):
        raise BadInput("--syn-iterations is for --method syn: how many on each level, none below 0 and not all 0.")
    if smoothness is not None and name is not None:
        raise BadInput(f"--smoothness is asked of a network, not of --method {name}.")
    if name in ("affine", "syn"):
        if refinement is not None:
            raise BadInput(f"--refine goes on from a network or from the identity, not from --method {name}.")
        return affine() if name == "affine" else syn(Syn(iterations=tuple(syn_iterations or Syn.iterations)))
    predictor = None if name == "identity" else load_predictor(weights, workdir).with_smoothness(smoothness)
    method = identity() if predictor is None else network(predictor)
    return method if refinement is None else refined(method, predictor, refinement)
