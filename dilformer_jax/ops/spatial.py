"""Grids, warps and displacements.

The convention, once: a displacement `u` of shape (*b, D, H, W, 3) is float32, in voxels of the grid it lives on,
component a along array axis a, and `moved(x) = moving(x + u(x))`. Every function takes any number of leading batch
axes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy import ndimage
from jaxtyping import Array, Float, Int, Num

from dilformer_jax.ops import platforms, ring, sampling, slabs


def grid(shape: tuple[int, ...]) -> Float[Array, "d h w 3"]:
    """The voxel coordinates of a volume of this shape."""
    # Chosen by component, not stacked: so the compiler makes it on the way instead of keeping it.
    component = lax.broadcasted_iota(jnp.int32, (*shape, 3), 3)
    return lax.select_n(component, *(lax.broadcasted_iota(jnp.float32, (*shape, 3), axis) for axis in range(3)))


def warp(
    image: Num[Array | np.ndarray, "*b d h w c"],
    displacement: Float[Array | np.ndarray, "*b e f g 3"],
    *,
    order: int = 1,
    padding: str = "border",
    engine: str = "gather",
) -> Num[Array, "*b e f g c"]:
    """The image sampled at x + displacement(x), on the displacement's grid.

    With order 1 (trilinear) it equals `map_coordinates` and PyTorch's `grid_sample(align_corners=True)`; with order 0
    it takes the nearest voxel, an exact half going to the even one as in PyTorch. Outside the volume lies its border
    value, or zero with a linear ramp of one voxel for padding 'zeros'. The gradient to the displacement at a voxel
    centre is the slope towards the next voxel; padded with the border value, at the last face it is the slope from the
    voxel before, so that the identity gives training a usable gradient everywhere.

    The engine 'map_coordinates' is `jax.scipy.ndimage`'s, to compare with: slower, its nearest rounds halves away from
    zero, and its gradient at the last face is zero.

    A volume split over devices (`ops.slabs`) is sampled by gathers, trilinearly and padded with its border.

    Raises:
      ValueError: an unknown order, padding or engine, or another than these for a split volume.
    """
    if order not in (0, 1):
        raise ValueError(f"A warp has order 0 (nearest) or 1 (trilinear), got {order}.")
    if padding not in ("border", "zeros"):
        raise ValueError(f"A warp pads with 'border' or 'zeros', got {padding!r}.")
    if engine not in ("gather", "map_coordinates"):
        raise ValueError(f"A warp's engine is 'gather' or 'map_coordinates', got {engine!r}.")
    # From NumPy too: the engines index as only JAX's arrays can be.
    image, displacement = jnp.asarray(image), jnp.asarray(displacement)
    images = image.reshape(-1, *image.shape[-4:])
    place = grid(displacement.shape[-4:-1]) + jnp.array([1.0, 0.0, 0.0]) * slabs.first_plane(displacement)
    coordinates = (place + displacement).reshape(-1, *displacement.shape[-4:])
    if slabs.current() is not None and (order, padding, engine) != (1, "border", "gather"):
        raise ValueError(f"A split volume is not warped with order {order}, padding {padding!r} and engine {engine!r}.")
    sample = _map_coordinates if engine == "map_coordinates" else _gather
    return sample(images, coordinates, order, padding).reshape(*displacement.shape[:-1], image.shape[-1])


def _map_coordinates(images, coordinates, order, padding):
    mode = {"border": "nearest", "zeros": "constant"}[padding]

    def sample(image, points):
        channel = lambda values: ndimage.map_coordinates(values, points, order=order, mode=mode, cval=0.0)
        return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(sample)(images, jnp.moveaxis(coordinates, -1, 1))


def _gather(images, coordinates, order, padding):
    if order == 0:
        # Before anything is added: halves round to even, and must do so alike with every padding.
        coordinates = jnp.round(coordinates)
    if padding == "zeros":
        # One voxel of zeros around the volume is the border value that everything outside then takes.
        images = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
        coordinates = coordinates + 1.0
    # Strict inequalities: on the faces themselves the gradient must flow (`jnp.clip` halves it there).
    last = jnp.array([slabs.depth(images) - 1, *(size - 1 for size in images.shape[2:4])], coordinates.dtype)
    inside = jnp.where(coordinates < 0, 0.0, jnp.where(coordinates > last, last, coordinates))
    if slabs.current() is not None:
        return ring.sampled(sampling.trilinear, images, inside)
    if order == 1:
        return sampling.trilinear(images, inside, last)
    return sampling.take(images, sampling.index(inside.astype(jnp.int32), images.shape))


def warp_one_hot(
    labels: Int[Array | np.ndarray, "d h w"], displacement: Float[Array | np.ndarray, "e f g 3"]
) -> Int[Array, "e f g"]:
    """The label map that comes of warping each label's one-hot map trilinearly and taking the largest: at x +
    displacement(x), the label to which most of the weight of the eight voxels around belongs.

    Of two labels with the same weight it is the smaller one, as `argmax` over the one-hot maps takes it. Outside the
    volume every map is zero: half a voxel beyond a face the label of the face, from one voxel on 0.
    """
    labels, displacement = jnp.asarray(labels), jnp.asarray(displacement)
    nothing = jnp.iinfo(labels.dtype).max

    def plane(points):
        """Labels (f, g) at points (f, g, 3): plane by plane, what is known of the voxels around stays in the cache."""
        place, weight = jnp.zeros((), jnp.int32), jnp.ones(())
        for axis, size in enumerate(labels.shape):
            low = jnp.floor(points[..., axis])
            two, fraction = jnp.stack([low, low + 1]).astype(jnp.int32), points[..., axis] - low
            share = jnp.where((two >= 0) & (two < size), jnp.stack([1 - fraction, fraction]), 0)
            form = *(2 if other == axis else 1 for other in range(3)), *low.shape  # the eight voxels first
            place = place * size + jnp.clip(two, 0, size - 1).reshape(form)
            weight = weight * share.reshape(form)
        label = labels.ravel().at[place].get(mode="promise_in_bounds")
        # Without the barrier XLA writes all this anew for each of the 64 comparisons, and LLVM has to find out that it
        # is the same: where it optimises little, that takes long or is not done.
        around = list(zip(*lax.optimization_barrier([x.reshape(8, *low.shape) for x in (label, weight)]), strict=True))
        shares = [sum(jnp.where(other == mine, weight, 0) for other, weight in around) for mine, _ in around]
        most = functools.reduce(jnp.maximum, shares)
        largest = [jnp.where(share == most, mine, nothing) for share, (mine, _) in zip(shares, around, strict=True)]
        return jnp.where(most > 0, functools.reduce(jnp.minimum, largest), 0)

    return lax.map(plane, grid(displacement.shape[:3]) + displacement)


def compose(u: Float[Array, "*b d h w 3"], w: Float[Array, "*b d h w 3"]) -> Float[Array, "*b d h w 3"]:
    """The displacement of "w first on the fixed grid, then u": u(x + w(x)) + w(x), continued past the faces by its
    border value."""
    return warp(u, w) + w


def integrate(velocity: Float[Array, "*b d h w 3"], steps: int = 7) -> Float[Array, "*b d h w 3"]:
    """The displacement that a stationary velocity reaches in unit time, by scaling and squaring (Arsigny et al.,
    MICCAI 2006).

    `velocity` is in voxels per unit time. The loop is rolled: unrolled, it compiles ten times more slowly. Its gradient
    keeps the displacement of every step and computes the rest of a step anew: a third of the memory.
    """
    twice = jax.checkpoint(lambda u: compose(u, u), prevent_cse=False)
    return lax.fori_loop(0, steps, lambda _, u: twice(u), velocity / 2**steps)


def resize(
    x: Float[Array, "*b d h w c"], shape: tuple[int, ...], *, align_corners: bool = False
) -> Float[Array, "*b e f g c"]:
    """Trilinear resampling to a shape, as PyTorch's `interpolate(mode='trilinear')` in either corner convention (no
    antialiasing).

    Half-pixel by default: both grids cover the same box. With `align_corners` the first and the last voxels coincide
    instead. One matrix product an axis, or on a GPU a sum of neighbours where it doubles; resizing by gathers is slow
    on TPU. A volume split over devices is enlarged or reduced a whole number of times, in half-pixel convention, its
    slab to a slab of this shape.

    Raises:
      ValueError: a slab that is to become anything else.
    """
    if slabs.current() is not None and x.shape[slabs.DEPTH] != shape[0]:
        planes = x.shape[slabs.DEPTH]
        if align_corners or (shape[0] % planes and planes % shape[0]):
            raise ValueError(f"A slab of {planes} planes is resized by a whole number, not to {shape[0]}.")
        if planes > shape[0]:
            return _resized(x, shape, align_corners)  # no plane of the result looks beyond those that it stands for
        times = shape[0] // planes
        resized = lambda x: _resized(x, (x.shape[-4] * times, *shape[1:]), align_corners)
        return slabs.same(resized, x, 1, edge="border", scale=(times, 1))
    return _resized(x, shape, align_corners)


def _resized(x, shape, align_corners):
    for axis, size in zip((-4, -3, -2), shape, strict=True):
        if x.shape[axis] == size:
            continue
        product = functools.partial(_along, axis=axis, size=size, align_corners=align_corners)
        if size == 2 * x.shape[axis] and not align_corners:
            # A third of the product's time on a GPU, and none for its tuning; twice the product's on the CPU.
            x = platforms.by_platform(x, cuda=functools.partial(_doubled, axis=axis), default=product)
        else:
            x = product(x)
    return x


def _along(x, axis, size, align_corners):
    weights = _resize_weights(x.shape[axis], size, align_corners)
    return jnp.moveaxis(jnp.tensordot(x, weights, axes=(axis, 1), precision=lax.Precision.HIGHEST), -1, axis)


def _doubled(x, axis):
    """Each voxel as two, a quarter of the way to its neighbours."""
    axis += x.ndim
    n = x.shape[axis]
    wide = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(x.ndim)], mode="edge")
    before, after = (lax.slice_in_dim(wide, first, first + n, axis=axis) for first in (0, 2))
    halves = jnp.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis=axis + 1)
    return halves.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])


def _resize_weights(source: int, target: int, align_corners: bool) -> Float[Array, "target source"]:
    index = jnp.arange(target, dtype=jnp.float32)
    cornered = index * ((source - 1) / max(target - 1, 1))
    position = cornered if align_corners else (index + 0.5) * (source / target) - 0.5
    position = jnp.clip(position, 0, source - 1)
    return jnp.maximum(0.0, 1.0 - jnp.abs(position[:, None] - jnp.arange(source, dtype=jnp.float32)))


def resize_displacement(
    u: Float[Array, "*b d h w 3"], shape: tuple[int, ...], *, align_corners: bool = False
) -> Float[Array, "*b e f g 3"]:
    """A displacement on another grid over the same box, its vectors in voxels of that grid: `2 * resize(u)` going up
    one level.

    Raises:
      ValueError: an axis of one voxel with `align_corners`, where it has no length.
    """
    if align_corners and min(u.shape[-4:-1]) < 2:
        raise ValueError(f"Corners to align are two voxels an axis, got {u.shape[-4:-1]}.")
    span = [(s - 1, t - 1) if align_corners else (s, t) for s, t in zip(u.shape[-4:-1], shape, strict=True)]
    scale = jnp.asarray([target / source for source, target in span], u.dtype)
    return resize(u, shape, align_corners=align_corners) * scale


def average(x: Float[Array, "*b d h w c"]) -> Float[Array, "*b e f g c"]:
    """The next coarser level of an image: the mean of each 2x2x2 cube.

    Raises:
      ValueError: an axis of odd size.
    """
    *batch, d, h, w, c = x.shape
    if slabs.depth(x) % 2 or d % 2 or h % 2 or w % 2:
        raise ValueError(f"Averaging 2x2x2 cubes needs even axes, got a volume of {(slabs.depth(x), h, w)} voxels.")
    return x.reshape(*batch, d // 2, 2, h // 2, 2, w // 2, 2, c).mean(axis=(-6, -4, -2))


def jacobian_determinant(u: Float[Array, "*b d h w 3"]) -> Float[Array, "*b d h w"]:
    """det(I + du/dx): central differences inside, one-sided at the faces, as `numpy.gradient` has it."""
    # Written out, component by component, it is one pass over the voxels: stacked to matrices, eight times slower.
    parts = [u[..., component : component + 1] for component in range(3)]
    (a, b, c), (d, e, f), (g, h, i) = (
        [difference(part, axis)[..., 0] + (component == row) for component, part in enumerate(parts)]
        for row, axis in enumerate((-4, -3, -2))
    )
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def difference(x: Float[Array, "*b d h w c"], axis: int) -> Float[Array, "*b d h w c"]:
    """The derivative along one axis, counted from the last: central differences inside, one-sided at the faces."""
    if axis == slabs.DEPTH and slabs.current() is not None:
        wide = slabs.extended(x, 1, "border")
        place = (slabs.first_plane(x) + jnp.arange(x.shape[-4]))[:, None, None, None]
        central = (wide[..., 2:, :, :, :] - wide[..., :-2, :, :, :]) / 2
        return jnp.where((place == 0) | (place == slabs.depth(x) - 1), 2 * central, central)
    derivative = jnp.gradient(x, axis=axis)
    assert isinstance(derivative, jax.Array)  # a list only where several axes are asked for
    return derivative
