"""The forms that convolutions have on the CPU (`ops.conv` chooses): 2-D convolutions, shifted slices and matrix
products, a few slabs at a time, so that what they need stays in the cache.

XLA's own 3-D convolutions are several times slower there, and its gradients of them more.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

LAYOUT_2D = ("NHWC", "HWIO", "NHWC")
# Voxels times channels of a volume that is small: there the forms that compile soonest take from half to twice the time
# of the others, milliseconds, and save seconds of compiling.
SMALL = 2**16


def room(shape: tuple[int, ...], dtype: jnp.dtype, after: Float[Array, "..."]) -> Array:
    """Zeros for a loop to write its result into, made when `after` exists.

    XLA schedules constants first, so that plain zeros take their memory from the program's beginning on. The count of a
    number's bits is never negative, which the compiler does not know: it cannot tell that this is a constant.
    """
    (first,) = after[tuple(slice(0, 1) for _ in after.shape)].astype(jnp.float32).ravel()
    zero = jnp.minimum(lax.population_count(lax.bitcast_convert_type(first, jnp.int32)), 0)
    return jnp.broadcast_to(zero.astype(dtype), shape)


# --- 1³ ---


def by_planes(*operands):
    """The CPU's form: beside each other a plane at a time, which stays in the cache for its product."""
    *inputs, kernel = operands
    b, d, h, w, _ = inputs[0].shape
    planes = tuple(x.reshape(b * d, h, w, -1) for x in inputs)

    def add_plane(index, y):
        plane = jnp.concatenate([lax.dynamic_index_in_dim(x, index, keepdims=False) for x in planes], axis=-1)
        return lax.dynamic_update_index_in_dim(y, plane @ kernel, index, 0)

    y = room((b * d, h, w, kernel.shape[-1]), jnp.result_type(inputs[0], kernel), inputs[-1])
    return lax.fori_loop(0, b * d, add_plane, y).reshape(b, d, h, w, -1)


# --- stride 1 ---


def sliced(x, kernel, dilation):
    """The CPU's form, by the kernel's shape: 2-D convolutions, fewer where the kernel has three depths."""
    kd, kh, kw = kernel.shape[:3]
    form = _winograd if kd == 3 and kh * kw > 1 and x.size > SMALL else _planes
    return _joined(form(_residues(x, dilation, kernel.shape), kernel), x.shape, dilation, kernel.shape)


def _residues(x, dilation, kernel_shape):
    """The residue classes of the voxels along each dilated axis as volumes of their own, zero-padded to one size, in
    the batch: a dilated convolution is a dense one of each, and XLA's own is slow on the CPU."""
    steps = [dilation if size > 1 else 1 for size in kernel_shape[:3]]
    if math.prod(steps) == 1:
        return x
    b, *volume, c = x.shape
    inner = [-(-n // step) for n, step in zip(volume, steps, strict=True)]
    x = jnp.pad(x, ((0, 0), *((0, n * step - old) for n, step, old in zip(inner, steps, volume, strict=True)), (0, 0)))
    x = x.reshape(b, inner[0], steps[0], inner[1], steps[1], inner[2], steps[2], c)
    return jnp.moveaxis(x, (2, 4, 6), (1, 2, 3)).reshape(-1, *inner, c)


def _joined(y, shape, dilation, kernel_shape):
    """The volumes of `_residues` put together again, for a volume of `shape`."""
    steps = [dilation if size > 1 else 1 for size in kernel_shape[:3]]
    if math.prod(steps) == 1:
        return y
    _, *inner, o = y.shape
    y = jnp.moveaxis(y.reshape(shape[0], *steps, *inner, o), (1, 2, 3), (2, 4, 6))
    y = y.reshape(shape[0], *(n * step for n, step in zip(inner, steps, strict=True)), o)
    return y[:, : shape[1], : shape[2], : shape[3]]


def _planes(x, kernel):
    kd, kh, kw, c, o = kernel.shape
    b, d, h, w, _ = x.shape
    if kd > 1 and kh == kw == 1:
        # Along the depth alone: a 2-D convolution over depth and all the rest.
        return _planes(x.reshape(b, 1, d, h * w, c), kernel.reshape(1, kd, 1, c, o)).reshape(b, d, h, w, o)
    # One convolution of all depth slices with the depth kernels side by side, then the sum of its outputs, shifted in
    # depth.
    beside = jnp.moveaxis(kernel, 0, 3).reshape(kh, kw, c, kd * o)
    y = lax.conv_general_dilated(
        x.reshape(b * d, h, w, c), beside, (1, 1), [(kh // 2,) * 2, (kw // 2,) * 2], dimension_numbers=LAYOUT_2D
    ).reshape(b, d, h, w, kd * o)
    if kd == 1:
        return y
    y = jnp.pad(y, ((0, 0), (kd // 2, kd // 2), (0, 0), (0, 0), (0, 0)))
    return sum(lax.slice_in_dim(y, i, i + d, axis=1)[..., i * o : (i + 1) * o] for i in range(kd))


# Winograd's F(4, 3): four neighbouring results of a 3-tap convolution from six products instead of twelve (Lavin and
# Gray 2016, arXiv:1509.09308). The kernel's transform; those of the input and of the results are written out.
KERNEL_TRANSFORM = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
# Voxels times channels that a step of a rolled loop takes at once: few temporaries, and enough work for all cores.
STEP = 2**20


def _winograd(x, kernel):
    """A kernel of three depths by F(4, 3) over the depth, of 2-D convolutions; its rounding error is about three times
    that of the plain sum. In a loop over the depth, so that the temporaries stay small."""
    b, d, h, w, c = x.shape
    o = kernel.shape[-1]
    weights = jnp.einsum("pd,dhwco->phwco", jnp.array(KERNEL_TRANSFORM), kernel.astype(jnp.float32))
    quads = -(-d // 4)
    step = next(n for n in range(max(1, STEP // (4 * b * h * w * c)), 0, -1) if quads % n == 0)
    x = jnp.pad(x, ((0, 0), (1, 4 * quads - d + 3), (0, 0), (0, 0), (0, 0))).reshape(b, quads + 1, 4, h, w, c)

    def add_quads(index, y):
        part = lax.dynamic_slice_in_dim(x, index * step, step + 1, axis=1)
        p = _plane_convs(_input_transform(part), weights)
        part = jnp.stack(_result_transform(p), axis=2).reshape(b, 4 * step, h, w, o)
        return lax.dynamic_update_slice_in_dim(y, part.astype(y.dtype), 4 * step * index, axis=1)

    y = room((b, 4 * quads, h, w, o), jnp.result_type(x, kernel), x)
    return lax.fori_loop(0, quads // step, add_quads, y)[:, :d]


def _plane_convs(volumes, kernels):
    padding = [(size // 2,) * 2 for size in kernels.shape[1:3]]
    for x, kernel in zip(volumes, kernels, strict=True):
        y = lax.conv_general_dilated(x.reshape(-1, *x.shape[2:]), kernel, (1, 1), padding, dimension_numbers=LAYOUT_2D)
        yield y.reshape(*x.shape[:4], -1)


def _input_transform(x):
    """(b, n+1, 4, h, w, c) to six of (b, n, h, w, c): each four slabs of results see six of the input."""
    x = x.astype(jnp.float32)
    x0, x1, x2, x3, x4, x5 = *(x[:, :-1, i] for i in range(4)), x[:, 1:, 0], x[:, 1:, 1]
    return (
        4 * x0 - 5 * x2 + x4,
        x3 + x4 - 4 * (x1 + x2),
        x4 - x3 + 4 * (x1 - x2),
        x4 - x2 + 2 * (x3 - x1),
        x4 - x2 - 2 * (x3 - x1),
        4 * x1 - 5 * x3 + x5,
    )


def _result_transform(products):
    p0, p1, p2, p3, p4, p5 = products
    near, near_odd, far, far_odd = p1 + p2, p1 - p2, p3 + p4, p3 - p4
    return p0 + near + far, near_odd + 2 * far_odd, near + 4 * far, near_odd + 8 * far_odd + p5


def _small_kernel_gradient(x, gradient, kernel, dilation):
    """One matrix product with all windows side by side, in the order of the kernel's taps; joined along one axis after
    the other, since 27 at once compile slowly."""
    *sizes, c, o = kernel.shape
    for axis in (3, 2, 1):
        taps, size = sizes[axis - 1], x.shape[axis]
        margin = [(dilation * (taps // 2),) * 2 if other == axis else (0, 0) for other in range(5)]
        padded = jnp.pad(x, margin)
        seen = [lax.slice_in_dim(padded, dilation * tap, dilation * tap + size, axis=axis) for tap in range(taps)]
        x = jnp.concatenate(seen, axis=-1)
    windows = x.reshape(-1, math.prod(sizes) * c)
    total = jnp.matmul(windows.T, gradient.reshape(-1, o), preferred_element_type=_sum_type(kernel))
    return total.reshape(kernel.shape).astype(kernel.dtype)


def _kernel_gradient(x, gradient, kernel):
    """Slab by slab, so that no copy of the volume is made for each of the kernel's voxels: matrix products between the
    windows of the slab and the gradients of the slabs that it reaches in depth."""
    kd, kh, kw, c, o = kernel.shape
    if kd == 3 and kh * kw > 1:
        return _winograd_kernel_gradient(x, gradient, kernel)
    d, h, w = x.shape[1:4]
    x = jnp.pad(x, ((0, 0), (0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
    gradient = jnp.pad(gradient, ((0, 0), (kd // 2, kd // 2), (0, 0), (0, 0), (0, 0)))
    dtype = _sum_type(kernel)

    def add_slab(index, total):
        slab = lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)
        reached = lax.dynamic_slice_in_dim(gradient, index, kd, axis=1)
        windows = [slab[:, j : j + h, k : k + w].reshape(-1, c) for j in range(kh) for k in range(kw)]
        products = (
            jnp.matmul(window.T, reached[:, kd - 1 - i].reshape(-1, o), preferred_element_type=dtype)
            for i in range(kd)
            for window in windows
        )
        return [t + product for t, product in zip(total, products, strict=True)]

    total = lax.fori_loop(0, d, add_slab, [jnp.zeros((c, o), dtype)] * (kd * kh * kw))
    return jnp.stack(total).reshape(kernel.shape).astype(kernel.dtype)


def _winograd_kernel_gradient(x, gradient, kernel):
    """The adjoint of `_winograd` to the kernel: four slabs of the gradient at a time, and for each of the six products
    and each row of the kernel one matrix product with the row's shifts in width side by side."""
    _, kh, kw, c, o = kernel.shape
    b, d, h, w, _ = x.shape
    quads = -(-d // 4)
    margins = ((1, 4 * quads - d + 3), (kh // 2, kh // 2), (kw // 2, kw // 2))
    x = jnp.pad(x, ((0, 0), *margins, (0, 0))).reshape(b, quads + 1, 4, h + kh - 1, w + kw - 1, c)
    gradient = jnp.pad(gradient, ((0, 0), (0, 4 * quads - d), (0, 0), (0, 0), (0, 0)))
    gradient = gradient.reshape(b, quads, 4, h, w, o)

    def add_quad(index, total):
        seen = lax.dynamic_index_in_dim(gradient, index, axis=1, keepdims=False).astype(jnp.float32)
        seen = (each.reshape(-1, o) for each in _result_transform_adjoint(seen))
        products = []
        for volume, each in zip(_input_transform(lax.dynamic_slice_in_dim(x, index, 2, axis=1)), seen, strict=True):
            wide = jnp.concatenate([volume[:, 0, :, k : k + w] for k in range(kw)], axis=-1)
            products += [each.T @ wide[:, j : j + h].reshape(-1, kw * c) for j in range(kh)]
        return [t + product for t, product in zip(total, products, strict=True)]

    total = jnp.stack(lax.fori_loop(0, quads, add_quad, [jnp.zeros((o, kw * c), jnp.float32)] * (6 * kh)))
    total = total.reshape(6, kh, o, kw, c)
    return jnp.einsum("pd,phowc->dhwco", jnp.array(KERNEL_TRANSFORM), total).astype(kernel.dtype)


def _result_transform_adjoint(y):
    """(b, 4, h, w, o) to six of (b, h, w, o)."""
    y0, y1, y2, y3 = (y[:, i] for i in range(4))
    even, odd, far_even, far_odd = y0 + y2, y1 + y3, y0 + 4 * y2, 2 * (y1 + 4 * y3)
    return y0, even + odd, even - odd, far_even + far_odd, far_even - far_odd, y3


def _sum_type(kernel):
    """Kernel gradients are summed in float32 at least, however coarse the numbers are."""
    return jnp.promote_types(kernel.dtype, jnp.float32)


def gradients(x, kernel, gradient, *, dilation):
    """Of `sliced`, to the input and to the kernel."""
    # To the input: the same convolution with the kernel flipped and its channels exchanged.
    flipped = jnp.swapaxes(kernel[::-1, ::-1, ::-1], 3, 4)
    to_input = sliced(gradient, flipped, dilation=dilation)
    if x.size <= SMALL:
        return to_input, _small_kernel_gradient(x, gradient, kernel, dilation)
    apart = functools.partial(_residues, dilation=dilation, kernel_shape=kernel.shape)
    return to_input, _kernel_gradient(apart(x), apart(gradient), kernel)


# --- stride 2 ---


def strided(x, kernel):
    """3x3x3 by 2-D convolutions of stride 2: the even slabs by the middle of the kernel, the odd ones, which two slabs
    of the result see, by its two ends side by side."""
    b, d, h, w, c = x.shape
    o = kernel.shape[-1]
    x = x.reshape(b, d // 2, 2, h, w, c)

    def planes(slabs, kernel):
        slabs = slabs.reshape(-1, h, w, c)
        y = lax.conv_general_dilated(slabs, kernel, (2, 2), [(1, 0), (1, 0)], dimension_numbers=LAYOUT_2D)
        return y.reshape(b, d // 2, h // 2, w // 2, -1)

    odd = planes(x[:, :, 1], jnp.concatenate([kernel[2], kernel[0]], axis=-1))
    before = jnp.pad(odd[:, :-1, ..., o:], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
    return planes(x[:, :, 0], kernel[1]) + odd[..., :o] + before


def strided_gradients(x, kernel, gradient):
    return _strided_input_gradient(gradient, kernel), _strided_kernel_gradient(x, gradient, kernel)


def _strided_input_gradient(gradient, kernel):
    """Voxel 2i takes the middle tap times gradient i, voxel 2i+1 the last tap times gradient i and the first times
    gradient i+1: along height and width a 2x2 convolution to the four parities, along the depth a sum."""
    b, d, h, w, o = gradient.shape
    c = kernel.shape[3]
    taps = jnp.array([[[0, 1, 0], [0, 0, 1]], [[0, 0, 0], [1, 0, 0]]], kernel.dtype)  # gradient i or i+1, parity, tap
    weights = jnp.einsum("ipj,kql,tjlco->ikotpqc", taps, taps, kernel).reshape(2, 2, o, 12 * c)
    y = lax.conv_general_dilated(
        gradient.reshape(b * d, h, w, o), weights, (1, 1), [(0, 1), (0, 1)], dimension_numbers=LAYOUT_2D
    ).reshape(b, d, h, w, 3, 2, 2 * c)
    following = jnp.pad(y[:, 1:, :, :, 0], ((0, 0), (0, 1), *((0, 0),) * 4))
    y = jnp.stack([y[:, :, :, :, 1], y[:, :, :, :, 2] + following], axis=2)
    return jnp.moveaxis(y, 5, 4).reshape(b, 2 * d, 2 * h, 2 * w, c)


def _strided_kernel_gradient(x, gradient, kernel):
    """Slab by slab of the result, as `_kernel_gradient`."""
    b, d, h, w, o = gradient.shape
    c = x.shape[-1]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0))).reshape(b, 2 * d + 2, h + 1, 2, w + 1, 2 * c)
    dtype = _sum_type(kernel)

    def add_slab(index, total):
        slabs = lax.dynamic_slice_in_dim(x, 2 * index, 3, axis=1)
        windows = jnp.concatenate([slabs[..., :w, :], slabs[..., 1:, :c]], axis=-1)
        seen = lax.dynamic_index_in_dim(gradient, index, axis=1, keepdims=False).reshape(-1, o)
        rows = [rows for i in range(3) for rows in (windows[:, i, :h, 0], windows[:, i, :h, 1], windows[:, i, 1:, 0])]
        products = (jnp.matmul(row.reshape(-1, 3 * c).T, seen, preferred_element_type=dtype) for row in rows)
        return [t + product for t, product in zip(total, products, strict=True)]

    total = lax.fori_loop(0, d, add_slab, [jnp.zeros((3 * c, o), dtype)] * 9)
    return jnp.stack(total).reshape(3, 3, 3, c, o).astype(kernel.dtype)


# --- depthwise ---


def _tap_windows(x, kernel_shape, dilation):
    """The function that gives the shifted window of zero-padded `x` seen by the kernel's tap number t."""
    _, kh, kw, _ = kernel_shape
    padded = jnp.pad(x, ((0, 0), *((dilation * (size // 2),) * 2 for size in kernel_shape[:3]), (0, 0)))

    def window(tap):
        i, j, k = tap // (kh * kw), tap // kw % kh, tap % kw
        return lax.dynamic_slice(padded, (0, i * dilation, j * dilation, k * dilation, 0), x.shape)

    return window


def shifted(x, kernel, dilation):
    """The CPU's form: the sum of shifted windows times the channels' weights; rolled, since 27 unrolled terms compile
    slowly."""
    window = _tap_windows(x, kernel.shape, dilation)
    weights = kernel.reshape(-1, kernel.shape[-1])
    return lax.fori_loop(0, len(weights), lambda tap, y: y + window(tap) * weights[tap], room(x.shape, x.dtype, x))


def depthwise_gradients(x, kernel, gradient, *, dilation):
    """Of `shifted`, to the input and to the kernel."""
    # A product with a row of ones sums over the voxels several times faster than XLA's own reduction on the CPU.
    ones = jnp.ones((1, gradient.size // gradient.shape[-1]), gradient.dtype)
    window = _tap_windows(x, kernel.shape, dilation)
    to_kernel = lax.map(
        lambda tap: (ones @ (window(tap) * gradient).reshape(ones.size, -1))[0],
        jnp.arange(math.prod(kernel.shape[:3])),
    )
    return shifted(gradient, kernel[::-1, ::-1, ::-1], dilation=dilation), to_kernel.reshape(kernel.shape)
