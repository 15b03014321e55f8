"""How alike two images, or two label maps, are.

Images are (*b, D, H, W, C). Every function but `self_similarity` returns a scalar: a mean over all voxels of the batch.
"""

import functools
import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, UInt8

from dilformer_jax.ops import slabs, spatial

Scalar = Float[Array, ""]
Image = Float[Array, "*b d h w c"]
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


def lncc_slope(
    fixed: Float[Array, "d h w 1"], window: int, *, epsilon: float = 1e-5
) -> Callable[[Float[Array, "d h w 1"]], tuple[Float[Array, "d h w 1"], Scalar]]:
    """Returns a function of the moved image, which computes the derivative of the sum of `lncc` over all voxels to each
    voxel of that image, and the mean of `lncc`.

    The mean and variances of the window around a voxel count as constants (Avants et al., Med. Image Anal. 2008), which
    halves the window sums of the exact gradient. Both images have means near 0: of uncentred intensities float32 loses
    the variance. What depends on the fixed image alone is computed once.
    """
    sums = functools.partial(_window_sum, window=window)
    count = _window_voxels(fixed, window)
    mean_f, energy_f = sums(fixed) / count, sums(fixed * fixed)
    variance_f = energy_f - count * mean_f * mean_f
    flat = variance_f <= ROUNDING * energy_f

    def slope(moved):
        mean_m, energy_m = sums(moved) / count, sums(moved * moved)
        cross = sums(fixed * moved) - count * mean_f * mean_m
        variance_m = energy_m - count * mean_m * mean_m
        constant = flat | (variance_m <= ROUNDING * energy_m)
        share = jnp.where(constant, 0.0, cross / (jnp.where(constant, 1.0, variance_f * variance_m) + epsilon))
        change = 2 * count * share * ((fixed - mean_f) - share * variance_f * (moved - mean_m))
        return change, (share * cross).mean()

    return slope


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
