"""What a registration network minimises: similarity and smoothness at several resolutions."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from dilformer_jax.ops import regularisers, similarities, spatial

Scalar = Float[Array, ""]
SIMILARITIES = ("lncc", "mse")


def multi_resolution(
    fixed: Float[Array, "b d h w 1"],
    moving: Float[Array, "b d h w 1"],
    displacements: Sequence[Array],
    *,
    finest: int,
    weights: Sequence[float],
    windows: Sequence[int],
    similarity: str,
    regulariser: str,
    regulariser_weight: float | Float[Array, ""],
    border: str,
    fixed_labels: UInt8[Array, "b d h w 1"] | None = None,
    moving_labels: UInt8[Array, "b d h w 1"] | None = None,
    label_count: int = 0,
    label_weight: float = 0.0,
    inverse_weight: float = 0.0,
    foreground: bool = False,
    coarse_to_fine: float = 0.0,
    progress: Float[Array, ""] | float = 1.0,
) -> tuple[Scalar, dict[str, Scalar]]:
    """Σ over levels l of weights[l] · (dissimilarity_l + regulariser_weight · regulariser_l) and, where there are
    labels 1 to `label_count`, label_weight · (1 - `label_overlap`) at the finest of the levels.

    Level l is `finest` + its place in `weights`: the images averaged l times, and the displacement of that level, in
    its own voxels. Where a network ends at a coarser level than `finest`, its finest displacement is enlarged to it. A
    single weight is the plain loss, at one level. The windows are those of LNCC, a level each; with `foreground` its
    mean is over the voxels where the fixed image is above 0. An `inverse_weight` weighs the `inverse_inconsistency` of
    the finest level, for a batch of both directions. The levels join one after the other, from coarse to fine, in the
    part `coarse_to_fine` of the run, of which `progress` is how much is done (0 to 1).

    Returns:
      The loss, and its parts summed with the same weights: similarity (LNCC: higher is better; MSE: lower is better)
      and regulariser (as it enters the loss); with labels, their overlap; with an inverse_weight, inconsistency (not
      weighted).

    Raises:
      ValueError: an unknown similarity or regulariser, a foreground of another similarity than LNCC, weights and
        windows of different lengths, a level above 0, or a share of the run that is none.
    """
    if not 0 <= coarse_to_fine <= 1:
        raise ValueError(f"Levels join in a part of the run, 0 to 1, got {coarse_to_fine}.")
    if finest < 0:
        raise ValueError(f"The finest level of a loss is 0, the input's, or coarser, got {finest}.")
    if foreground and similarity != "lncc":
        raise ValueError(f"foreground is of the similarity 'lncc', not of {similarity!r}.")
    if similarity not in SIMILARITIES:
        raise ValueError(f"A similarity is one of {SIMILARITIES}, got {similarity!r}.")
    if regulariser not in regularisers.REGULARISERS:
        raise ValueError(f"A regulariser is one of {tuple(regularisers.REGULARISERS)}, got {regulariser!r}.")
    if len(weights) != len(windows):
        raise ValueError(
            f"Each level has a weight and a window, got {len(weights)} weights and {len(windows)} windows."
        )
    for _ in range(finest):
        fixed, moving = spatial.average(fixed), spatial.average(moving)
    by_shape = {u.shape[1:4]: u for u in displacements}
    similar, smooth, more = jnp.float32(0), jnp.float32(0), {}
    for level, (weight, window) in enumerate(zip(weights, windows, strict=True)):
        if level:
            fixed, moving = spatial.average(fixed), spatial.average(moving)
        shape = fixed.shape[1:4]
        u = by_shape[shape] if shape in by_shape else spatial.resize_displacement(displacements[0], shape)
        if level == 0 and fixed_labels is not None and moving_labels is not None:
            more = {"overlap": similarities.label_overlap(fixed_labels, moving_labels, u, label_count)}
        if level == 0 and inverse_weight:
            more["inconsistency"] = regularisers.inverse_inconsistency(u)
        moved = spatial.warp(moving, u)
        where = fixed > 0 if foreground else None
        if similarity == "lncc":
            alike = similarities.lncc(fixed, moved, window, border=border, where=where)
        else:
            alike = similarities.mse(fixed, moved)
        counting = weight * _joined(level, len(weights), coarse_to_fine, progress)
        similar += counting * alike
        smooth += counting * regulariser_weight * regularisers.REGULARISERS[regulariser](u)
    dissimilarity = -similar if similarity == "lncc" else similar
    loss = dissimilarity + smooth
    if "overlap" in more:
        loss += label_weight * (1 - more["overlap"])
    if inverse_weight:
        loss += inverse_weight * more["inconsistency"]
    return loss, {"similarity": similar, "regulariser": smooth} | more


def _joined(level: int, levels: int, share: float, progress: Float[Array, ""] | float) -> Float[Array, ""] | float:
    """How much a level counts already: the coarsest all of it from the start, the finest from `share` of the run on."""
    return jnp.clip(progress / share * (levels - 1) - (levels - 2 - level), 0, 1) if share else 1.0
