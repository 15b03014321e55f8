"""3-D convolutions, channels-last, each lowered as its platform likes it.

A program is lowered for the platform it runs on by `jax.lax.platform_dependent`: GPU and TPU get XLA's native 3-D
convolution, the CPU gets sums of 2-D convolutions, shifted slices and matrix products, which are several times faster
there (`experiments/benchmark.py` measures both). Forward and gradient rules choose separately, so that one traced
function, or one exported artefact, serves every platform.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dilformer_jax.ops import slabs

LAYOUT_3D = ("NDHWC", "DHWIO", "NDHWC")
LAYOUT_2D = ("NHWC", "HWIO", "NHWC")


def conv(
    x: Float[Array, "b d h w c"], kernel: Float[Array, "kd kh kw c o"], *, stride: int = 1, dilation: int = 1
) -> Float[Array, "b e f g o"]:
    """Dense or axis-wise convolution, zero-padded, centred on the voxels of the result.

    With stride 1 the kernel sizes are odd and the result has the shape of `x`. With stride 2 voxel i of the result lies
    between voxels 2i and 2i+1 of `x`, as in the image pyramid, when the kernel size is even (2 or 4), and on voxel 2i
    when it is 3 (as VoxelMorph has it); every spatial axis of `x` must then be even.

    Raises:
      ValueError: a kernel size, stride or volume that cannot be centred so.
    """
    sizes = kernel.shape[:3]
    if stride == 1:
        if any(size % 2 == 0 for size in sizes):
            raise ValueError(f"A convolution of stride 1 needs odd kernel sizes, got {sizes}.")
        return slabs.same(lambda x: _conv(x, kernel, dilation), x, dilation * (sizes[0] // 2))
    if stride != 2 or dilation != 1:
        raise ValueError(
            f"Convolutions have stride 1, or stride 2 without dilation; got stride {stride}, dilation {dilation}."
        )
    if set(sizes) not in ({2}, {3}, {4}):
        raise ValueError(f"A convolution of stride 2 needs a kernel of 2, 3 or 4 voxels along each axis, got {sizes}.")
    if any(size % 2 for size in x.shape[1:4]):
        raise ValueError(f"A convolution of stride 2 needs even spatial axes, got a volume of {x.shape[1:4]} voxels.")
    return slabs.same(lambda x: _halving_conv(x, kernel), x, 0 if sizes[0] == 2 else 2, scale=(1, 2))


def depthwise(
    x: Float[Array, "b d h w c"], kernel: Float[Array, "kd kh kw c"], *, dilation: int = 1
) -> Float[Array, "b d h w c"]:
    """Each channel convolved with its own kernel, zero-padded, centred.

    Raises:
      ValueError: a kernel of even size.
    """
    if any(size % 2 == 0 for size in kernel.shape[:3]):
        raise ValueError(f"A depthwise convolution needs odd kernel sizes, got {kernel.shape[:3]}.")
    return slabs.same(lambda x: _depthwise(x, kernel, dilation), x, dilation * (kernel.shape[0] // 2))


def pointwise(inputs: Sequence[Float[Array, "b d h w _"]], kernel: Float[Array, "c o"]) -> Float[Array, "b d h w o"]:
    """A 1³ convolution of features that stand beside each other as channels, c together, without a copy of the volume
    that puts them there."""
    return _pointwise(tuple(inputs), kernel)


def room(shape: tuple[int, ...], dtype: jnp.dtype, after: Float[Array, "..."]) -> Array:
    """Zeros for a loop to write its result into, made when `after` exists.

    XLA schedules constants first, so that plain zeros take their memory from the program's beginning on. The count of a
    number's bits is never negative, which the compiler does not know: it cannot tell that this is a constant.
    """
    (first,) = after[tuple(slice(0, 1) for _ in after.shape)].astype(jnp.float32).ravel()
    zero = jnp.minimum(lax.population_count(lax.bitcast_convert_type(first, jnp.int32)), 0)
    return jnp.broadcast_to(zero.astype(dtype), shape)


# --- 1³ ---


@jax.custom_vjp
def _pointwise(inputs, kernel):
    if len(inputs) == 1:
        return inputs[0] @ kernel
    return lax.platform_dependent(*inputs, kernel, cpu=_by_planes, default=_sum_of_products)


def _pointwise_forward(inputs, kernel):
    return _pointwise(inputs, kernel), (inputs, kernel)


def _pointwise_backward(saved, gradient):
    inputs, kernel = saved
    parts = _rows(inputs, kernel)
    to_kernel = [
        jnp.einsum("bdhwc,bdhwo->co", x, gradient, preferred_element_type=jnp.promote_types(kernel.dtype, jnp.float32))
        for x in inputs
    ]
    return tuple(gradient @ part.T for part in parts), jnp.concatenate(to_kernel).astype(kernel.dtype)


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


def _rows(inputs, kernel):
    """The kernel's rows for each input."""
    ends = itertools.accumulate(x.shape[-1] for x in inputs)
    return [kernel[end - x.shape[-1] : end] for x, end in zip(inputs, ends, strict=True)]


def _sum_of_products(*operands):
    *inputs, kernel = operands
    return sum(x @ part for x, part in zip(inputs, _rows(inputs, kernel), strict=True))


def _by_planes(*operands):
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x, kernel, dilation):
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_sliced, dilation=dilation),
        default=functools.partial(_native, dilation=dilation),
    )


def _conv_forward(x, kernel, dilation):
    return _conv(x, kernel, dilation), (x, kernel)


def _conv_backward(dilation, saved, gradient):
    def native(x, kernel, gradient):
        return jax.vjp(functools.partial(_native, dilation=dilation), x, kernel)[1](gradient)

    def sliced(x, kernel, gradient):
        # To the input: the same convolution with the kernel flipped and its channels exchanged.
        flipped = jnp.swapaxes(kernel[::-1, ::-1, ::-1], 3, 4)
        apart = functools.partial(_residues, dilation=dilation, kernel_shape=kernel.shape)
        to_kernel = _kernel_gradient(apart(x), apart(gradient), kernel)
        return _sliced(gradient, flipped, dilation=dilation), to_kernel

    return lax.platform_dependent(*saved, gradient, cpu=sliced, default=native)


_conv.defvjp(_conv_forward, _conv_backward)


def _native(x, kernel, dilation):
    padding = [(dilation * (size // 2),) * 2 for size in kernel.shape[:3]]
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), padding, rhs_dilation=(dilation,) * 3, dimension_numbers=LAYOUT_3D
    )


def _sliced(x, kernel, dilation):
    """The CPU's form, by the kernel's shape: 2-D convolutions, fewer where the kernel has three depths."""
    kd, kh, kw = kernel.shape[:3]
    form = _winograd if kd == 3 and kh * kw > 1 else _planes
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

    y = jnp.zeros((b, 4 * quads, h, w, o), jnp.result_type(x, kernel))
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


# --- stride 2 ---


def _halving_conv(x, kernel):
    def native(x, kernel):
        size = kernel.shape[0]
        padding = {2: (0, 0), 3: (1, 0), 4: (1, 1)}[size]
        return lax.conv_general_dilated(x, kernel, (2, 2, 2), (padding,) * 3, dimension_numbers=LAYOUT_3D)

    # Each form has a gradient rule of its own; the packed one is stride-free and differentiates into fast forms.
    form = _strided if kernel.shape[0] == 3 else _packed

    @jax.custom_vjp
    def halving(x, kernel):
        return lax.platform_dependent(x, kernel, cpu=form, default=native)

    def forward(x, kernel):
        return halving(x, kernel), (x, kernel)

    def backward(saved, gradient):
        rule = lambda form: lambda x, kernel, gradient: jax.vjp(form, x, kernel)[1](gradient)
        own = _strided_gradients if form is _strided else rule(_packed)
        return lax.platform_dependent(*saved, gradient, cpu=own, default=rule(native))

    halving.defvjp(forward, backward)
    return halving(x, kernel)


def _strided(x, kernel):
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


def _strided_gradients(x, kernel, gradient):
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


def _packed(x, kernel):
    """Each 2x2x2 cube of `x` becomes one voxel of 8c channels, the strided kernel a dense one over those cubes."""
    b, d, h, w, c = x.shape
    x = x.reshape(b, d // 2, 2, h // 2, 2, w // 2, 2, c)
    x = jnp.moveaxis(x, (2, 4, 6), (4, 5, 6)).reshape(b, d // 2, h // 2, w // 2, 8 * c)
    size, o = kernel.shape[0], kernel.shape[-1]
    if size == 2:
        return x @ kernel.reshape(8 * c, o)
    # Taps start at voxel 2i-1, the second of the cube before; the cubes before, at and (size 4) after are the dense
    # kernel's taps.
    kernel = jnp.pad(kernel, ((1, 4 - size + 1),) * 3 + ((0, 0), (0, 0)))
    kernel = kernel.reshape(3, 2, 3, 2, 3, 2, c, o)
    kernel = jnp.moveaxis(kernel, (1, 3, 5), (3, 4, 5)).reshape(3, 3, 3, 8 * c, o)
    return _conv(x, kernel, 1)


# --- depthwise ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x, kernel, dilation):
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_shifted, dilation=dilation),
        default=functools.partial(_grouped, dilation=dilation),
    )


def _depthwise_forward(x, kernel, dilation):
    return _depthwise(x, kernel, dilation), (x, kernel)


def _depthwise_backward(dilation, saved, gradient):
    def grouped(x, kernel, gradient):
        return jax.vjp(functools.partial(_grouped, dilation=dilation), x, kernel)[1](gradient)

    def shifted(x, kernel, gradient):
        # A product with a row of ones sums over the voxels several times faster than XLA's own reduction on the CPU.
        ones = jnp.ones((1, gradient.size // gradient.shape[-1]), gradient.dtype)
        window = _tap_windows(x, kernel.shape, dilation)
        to_kernel = lax.map(
            lambda tap: (ones @ (window(tap) * gradient).reshape(ones.size, -1))[0],
            jnp.arange(math.prod(kernel.shape[:3])),
        )
        return _shifted(gradient, kernel[::-1, ::-1, ::-1], dilation=dilation), to_kernel.reshape(kernel.shape)

    return lax.platform_dependent(*saved, gradient, cpu=shifted, default=grouped)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _grouped(x, kernel, dilation):
    padding = [(dilation * (size // 2),) * 2 for size in kernel.shape[:3]]
    return lax.conv_general_dilated(
        x,
        kernel[..., None, :],
        (1, 1, 1),
        padding,
        rhs_dilation=(dilation,) * 3,
        dimension_numbers=LAYOUT_3D,
        feature_group_count=x.shape[-1],
    )


def _tap_windows(x, kernel_shape, dilation):
    """The function that gives the shifted window of zero-padded `x` seen by the kernel's tap number t."""
    _, kh, kw, _ = kernel_shape
    padded = jnp.pad(x, ((0, 0), *((dilation * (size // 2),) * 2 for size in kernel_shape[:3]), (0, 0)))

    def window(tap):
        i, j, k = tap // (kh * kw), tap // kw % kh, tap % kw
        return lax.dynamic_slice(padded, (0, i * dilation, j * dilation, k * dilation, 0), x.shape)

    return window


def _shifted(x, kernel, dilation):
    """The CPU's form: the sum of shifted windows times the channels' weights; rolled, since 27 unrolled terms compile
    slowly."""
    window = _tap_windows(x, kernel.shape, dilation)
    weights = kernel.reshape(-1, kernel.shape[-1])
    return lax.fori_loop(0, len(weights), lambda tap, y: y + window(tap) * weights[tap], room(x.shape, x.dtype, x))
