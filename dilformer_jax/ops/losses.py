"""Similarity and smoothness: what a registration network minimises.

Images are (*b, D, H, W, C), displacements (*b, D, H, W, 3) in voxels of their own grid. Every function returns a
scalar: a mean over all voxels of the batch.
"""

import functools
import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, UInt8

from dilformer_jax.ops import slabs, spatial

Scalar = Float[Array, ""]
Image = Float[Array, "*b d h w c"]
Displacement = Float[Array, "*b d h w 3"]
# Of a window's sum of squares: the float32 rounding of its variance, measured at windows of 3 to 9.
ROUNDING = 2e-6


def lncc(
    fixed: Image,
    moved: Float[Array, "*b d h w c"],
    window: int = 9,
    *,
    border: str = "cut",
    epsilon: float = 1e-5,
    where: Bool[Array, "*b d h w c"] | None = None,
) -> Scalar:
    """Local normalised cross-correlation, squared: the mean over all voxels of cross² / (variance · variance +
    epsilon), from 0 to 1.

    cross and the variances are sums over the window³ around each voxel, after Avants et al. (Med. Image Anal. 2008).
    With border 'cut' the window is cut at the faces and holds fewer voxels there; with 'zeros' the volume is padded
    with zeros, which count as voxels, as in VoxelMorph (Balakrishnan et al., TMI 2019). A voxel whose window is
    constant counts 0. Given `where`, the mean of each volume is over the voxels that it names; their windows reach
    beyond them.

    Raises:
      ValueError: a window that is no odd number, or an unknown border.
    """
    if not isinstance(window, int) or window < 1 or window % 2 == 0:
        raise ValueError(f"An LNCC window has an odd number of voxels, got {window}.")
    if border not in ("cut", "zeros"):
        raise ValueError(f"LNCC's border is 'cut' or 'zeros', got {border!r}.")
    # Centred first, in float32: window sums of squares of uncentred intensities lose the variance to rounding.
    f, m = (x.astype(jnp.float32) for x in (fixed, moved))
    # Nothing depends on where the centres are: constants to the gradient.
    centre_f, centre_m = (lax.stop_gradient(slabs.mean(x, (-4, -3, -2), keepdims=True)) for x in (f, m))
    f, m = f - centre_f, m - centre_m
    held = _window_voxels(fixed, window)
    count = held if border == "cut" else jnp.float32(window**3)
    sums = lambda x: slabs.same(functools.partial(_window_sum, window=window), x, window // 2)
    sum_f, sum_m, energy_f, energy_m = sums(f), sums(m), sums(f * f), sums(m * m)
    cross = sums(f * m) - sum_f * sum_m / count
    variance_f, variance_m = energy_f - sum_f * sum_f / count, energy_m - sum_m * sum_m / count
    if border == "zeros":
        # The voxels beyond the faces lie below the centres by as much as these are above zero: what they add to the
        # sums in closed form, which is nothing where the window is whole.
        beyond = (count - held) / count
        cross += beyond * (centre_f * sum_m + centre_m * sum_f + held * centre_f * centre_m)
        variance_f += beyond * centre_f * (2 * sum_f + held * centre_f)
        variance_m += beyond * centre_m * (2 * sum_m + held * centre_m)
    # Below this a variance is rounding, which in intensities of hundreds is far above epsilon. What is no number is not
    # below it.
    constant = (variance_f <= ROUNDING * energy_f) | (variance_m <= ROUNDING * energy_m)
    variances = jnp.where(constant, 1.0, variance_f * variance_m)
    squares = jnp.where(constant, 0.0, cross * cross / (variances + epsilon))
    if where is None:
        return slabs.mean(squares)
    # Of each volume by itself, so that a batch may be computed in parts.
    of_each = lambda x: slabs.mean(x, (-4, -3, -2))
    return (of_each(jnp.where(where, squares, 0.0)) / jnp.maximum(of_each(where.astype(jnp.float32)), 1e-6)).mean()


def _window_sum(x: Array, window: int) -> Array:
    """Sums over window³, cut at the faces: one 1-D sum an axis.

    A dense box convolution costs a thousand times as much.
    """
    for axis in (-4, -3, -2):
        size = [1] * x.ndim
        size[axis] = window
        x = lax.reduce_window(x, 0.0, lax.add, size, (1,) * x.ndim, "SAME")
    return x


def _window_voxels(x: Image, window: int) -> Float[Array, "d h w 1"]:
    """How many voxels of the volume each window holds, (d, h, w, 1); axis by axis, so that nothing is left for
    the compiler to fold."""
    reach, first = window // 2, slabs.first_plane(x)

    def along(start, count, size):
        place = start + jnp.arange(count)
        held = jnp.minimum(place + reach, size - 1) - jnp.maximum(place - reach, 0) + 1
        return jnp.maximum(held, 1).astype(jnp.float32)  # at least one in the planes that only pad a slab

    d = along(first, x.shape[-4], slabs.depth(x))
    h, w = (along(0, size, size) for size in x.shape[-3:-1])
    return d[:, None, None, None] * h[:, None, None] * w[:, None]


# The six voxels around one, and the six diagonals, up to their sign, that join two of them which are not opposite.
AROUND = tuple(tuple(sign * int(a == axis) for a in range(3)) for axis in range(3) for sign in (-1, 1))
DIAGONALS = tuple(d for d in itertools.product((-1, 0, 1), repeat=3) if np.abs(d).sum() == 2 and d > (0, 0, 0))


def mind(
    fixed: Float[Array, "*b d h w 1"], moved: Float[Array, "*b d h w 1"], *, radius: int = 1, distance: int = 1
) -> Scalar:
    """The mean squared difference of the `self_similarity` of two images, from 0 to 1: what is left of it does not
    depend on how their intensities are related. Raises ValueError as that does."""
    return mse(*(self_similarity(x, radius=radius, distance=distance) for x in (fixed, moved)))


def self_similarity(
    image: Float[Array, "*b d h w 1"], *, radius: int = 1, distance: int = 1
) -> Float[Array, "*b d h w 12"]:
    """The self-similarity context of each voxel (MIND-SSC): how alike patches around it are to each other, from 0 to 1
    for the most alike, after Heinrich et al. (Med. Image Anal. 2012; MICCAI 2013).

    The patches are cubes of 2 · radius + 1 voxels, `distance` voxels off along the axes, of which no two opposite ones
    are compared: 12 pairs, exp(-(D - smallest D) / V) each, where D is the mean squared difference of two patches and V
    the mean of the voxel's twelve, no less than a thousandth of its own mean over the volume and no more than a
    thousand of it. The image is continued by its border value; it does not depend on the scale of its intensities.

    Raises:
      ValueError: a negative radius, a distance below 1, or a volume split over devices.
    """
    if radius < 0 or distance < 1:
        raise ValueError(f"Patches have a radius of 0 or more and a distance of 1 or more, got {radius}, {distance}.")
    if slabs.current() is not None:
        raise ValueError("The self-similarity of a volume split over devices is not computed.")
    x, reach = image[..., 0].astype(jnp.float32), radius + distance
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(reach, reach)] * 3, mode="edge")
    distances = []
    for diagonal in DIAGONALS:
        # What comes in at the other end is in no patch. Each diagonal joins two pairs: one difference serves both.
        step = jnp.square(x - jnp.roll(x, [-distance * d for d in diagonal], (-3, -2, -1)))
        for axis in (-3, -2, -1):
            size = [1] * x.ndim
            size[axis] = 2 * radius + 1
            step = lax.reduce_window(step, 0.0, lax.add, size, (1,) * x.ndim, "VALID")
        for first in AROUND:
            if tuple(np.add(first, diagonal)) in AROUND:
                start = [distance * (1 + a) for a in first]
                place = [slice(low, low + n) for low, n in zip(start, image.shape[-4:-1], strict=True)]
                distances.append(step[..., *place])
    apart = jnp.stack(distances, axis=-1) / (2 * radius + 1) ** 3
    noise = apart.mean(-1, keepdims=True)
    typical = noise.mean((-4, -3, -2), keepdims=True)
    noise = jnp.clip(noise, 1e-3 * typical, 1e3 * typical)
    # Where the whole image is constant all distances are 0.
    return jnp.exp(-(apart - apart.min(-1, keepdims=True)) / jnp.where(noise > 0, noise, 1.0))


def mse(fixed: Image, moved: Float[Array, "*b d h w c"]) -> Scalar:
    """The mean squared difference of intensities."""
    return slabs.mean(jnp.square(fixed.astype(jnp.float32) - moved.astype(jnp.float32)))


def soft_dice(fixed: Float[Array, "*b d h w k"], moved: Float[Array, "*b d h w k"], *, epsilon: float = 1e-5) -> Scalar:
    """The mean over labels and batch of 2 Σ f·m / (Σ f² + Σ m² + epsilon), for one-hot or probabilistic maps
    (Milletari et al., 3DV 2016)."""
    fixed, moved = (slabs.masked(x.astype(jnp.float32)) for x in (fixed, moved))
    total = lambda x: slabs.total(x.sum((-4, -3, -2)))
    return (2 * total(fixed * moved) / (total(fixed**2) + total(moved**2) + epsilon)).mean()


def label_overlap(
    fixed: UInt8[Array, "b d h w 1"], moving: UInt8[Array, "b d h w 1"], u: Float[Array, "b e f g 3"], count: int
) -> Scalar:
    """The mean soft Dice, 2 Σ f·m / (Σ f + Σ m), of the labels 1 to `count` that are in the fixed map, over all pairs
    (SynthMorph's, Hoffmann et al., TMI 2022).

    The displacement may lie on a coarser grid, so many times: f and m are each label's share of the voxels there, m
    read trilinearly where it has come from.
    """
    factor = fixed.shape[-2] // u.shape[-2]
    f = _shares(fixed, factor, count)
    m = spatial.warp(_shares(moving, factor, count), u)
    total = lambda x: slabs.total(slabs.masked(x).sum((-4, -3, -2)))
    fixed_sum = total(f)
    there = (fixed_sum > 0).astype(jnp.float32)
    dice = 2 * total(f * m) / jnp.maximum(fixed_sum + total(m), 1e-5)
    # Of all pairs together, as a mean over devices and parts of a batch has it: a pair counts by its mean.
    return ((dice * there).sum(-1) / jnp.maximum(there.sum(-1), 1)).mean()


def _shares(labels: UInt8[Array, "b d h w 1"], factor: int, count: int) -> Float[Array, "b e f g k"]:
    b, d, h, w, _ = labels.shape
    blocks = labels.reshape(b, d // factor, factor, h // factor, factor, w // factor, factor)
    blocks = blocks.transpose(0, 1, 3, 5, 2, 4, 6).reshape(*(b, d // factor, h // factor, w // factor), 1, factor**3)
    return (blocks == jnp.arange(1, count + 1, dtype=labels.dtype)[:, None]).astype(jnp.float32).mean(-1)


def diffusion(u: Displacement, spacing: Float[Array, "3"] | None = None) -> Scalar:
    """The mean squared forward difference of a displacement, over its three components and three axes (VoxelMorph's
    `Grad('l2')`).

    Given the `spacing` of the voxels along each axis, in any unit, it is that of the displacement in this unit over
    distances in this unit: where voxels are cubes, the same.

    Raises:
      ValueError: an axis of one voxel.
    """
    depth = slabs.depth(u)
    if min(depth, *u.shape[-3:-1]) < 2:
        raise ValueError(f"Diffusion needs two voxels an axis, got {(depth, *u.shape[-3:-1])}.")
    u = u.astype(jnp.float32)
    if spacing is not None:
        u = u * spacing
    if slabs.current() is None:
        ahead = jnp.square(jnp.diff(u, axis=-4)).mean()
    else:
        # The last plane's difference, to the border beyond it, is zero, and not counted.
        steps = jnp.diff(slabs.extended(u, 1, "border"), axis=-4)[..., 1:, :, :, :]
        ahead = slabs.mean(jnp.square(steps)) * depth / (depth - 1)
    along = [ahead, *(slabs.mean(jnp.square(jnp.diff(u, axis=axis))) for axis in (-3, -2))]
    if spacing is not None:
        along = [square / spacing[axis] ** 2 for axis, square in enumerate(along)]
    return sum(along, jnp.float32(0)) / 3


def bending(u: Displacement, spacing: Float[Array, "3"] | None = None) -> Scalar:
    """The mean bending energy of a displacement: Σ over axes a, b of (d²u / da db)², central differences, over the
    inner voxels.

    After Rueckert et al. (TMI 1999), averaged over the three components. Given the `spacing` of the voxels along each
    axis, in some unit, it is that of the displacement in this unit over distances in this unit.

    Raises:
      ValueError: an axis of fewer than three voxels.
    """
    depth = slabs.depth(u)
    if min(depth, *u.shape[-3:-1]) < 3:
        raise ValueError(f"Bending needs three voxels an axis, got {(depth, *u.shape[-3:-1])}.")
    u = u.astype(jnp.float32)
    if spacing is not None:
        u = u * spacing
    wide = u if slabs.current() is None else slabs.extended(u, 1, "border")
    planes, rows, columns = (n - 2 for n in wide.shape[-4:-1])
    # Columns and components as one axis, of slices that lie side by side in memory: five times faster than by rolls.
    wide = wide.reshape(*wide.shape[:-2], -1)

    def at(offset: np.ndarray) -> Array:
        """The inner voxels' neighbours."""
        d, h, w = 1 + offset
        return wide[..., d : d + planes, h : h + rows, 3 * w : 3 * (w + columns)]

    def mean_square(x: Array) -> Scalar:
        if slabs.current() is None:
            return jnp.square(x).mean()
        place = slabs.first_plane(u) + jnp.arange(planes)
        between = ((place > 0) & (place < depth - 1))[:, None, None]
        return slabs.mean(jnp.where(between, jnp.square(x), 0)[..., None]) * depth / (depth - 2)

    energy = jnp.float32(0)
    here, step = np.zeros(3, int), np.eye(3, dtype=int)
    area = lambda a, b: 1.0 if spacing is None else spacing[a] * spacing[b]
    for a in range(3):
        energy += mean_square(at(step[a]) - 2 * at(here) + at(-step[a])) / area(a, a) ** 2
    for a, b in itertools.combinations(range(3), 2):
        p, q = step[a], step[b]
        energy += 2 * mean_square((at(p + q) - at(p - q) - at(q - p) + at(-p - q)) / 4) / area(a, b) ** 2
    return energy


def inverse_inconsistency(u: Float[Array, "b d h w 3"]) -> Scalar:
    """The mean squared length, in voxels, of what is left of each displacement after that of the exchanged images,
    u(x + v(x)) + v(x), for a batch that holds both directions of each pair beside each other (after Christensen and
    Johnson, TMI 2001)."""
    other = u.reshape(-1, 2, *u.shape[1:])[:, ::-1].reshape(u.shape)
    return 3 * slabs.mean(jnp.square(spatial.compose(u, other)))


SIMILARITIES = ("lncc", "mse")
REGULARISERS = {"diffusion": diffusion, "bending": bending}


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
    if regulariser not in REGULARISERS:
        raise ValueError(f"A regulariser is one of {tuple(REGULARISERS)}, got {regulariser!r}.")
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
            more = {"overlap": label_overlap(fixed_labels, moving_labels, u, label_count)}
        if level == 0 and inverse_weight:
            more["inconsistency"] = inverse_inconsistency(u)
        moved = spatial.warp(moving, u)
        where = fixed > 0 if foreground else None
        alike = lncc(fixed, moved, window, border=border, where=where) if similarity == "lncc" else mse(fixed, moved)
        counting = weight * _joined(level, len(weights), coarse_to_fine, progress)
        similar += counting * alike
        smooth += counting * regulariser_weight * REGULARISERS[regulariser](u)
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
