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
        return _sliced(gradient, flipped, dilation=dilation), _kernel_gradient(x, gradient, kernel, dilation)

    return lax.platform_dependent(*saved, gradient, cpu=sliced, default=native)


_conv.defvjp(_conv_forward, _conv_backward)


def _native(x, kernel, dilation):
    padding = [(dilation * (size // 2),) * 2 for size in kernel.shape[:3]]
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), padding, rhs_dilation=(dilation,) * 3, dimension_numbers=LAYOUT_3D
    )


def _plane_conv(x, kernel, dilation=1):
    """A 2-D convolution of every depth slice: (b, d, h, w, c) with (kh, kw, c, o)."""
    b, d, h, w, c = x.shape
    padding = [(dilation * (size // 2),) * 2 for size in kernel.shape[:2]]
    if dilation == 1 or kernel.shape[:2] == (1, 1):
        y = lax.conv_general_dilated(x.reshape(b * d, h, w, c), kernel, (1, 1), padding, dimension_numbers=LAYOUT_2D)
        return y.reshape(b, d, h, w, -1)
    # XLA's dilated convolution is slow on the CPU: each residue class of rows and columns is a dense convolution of
    # its own.
    up = lambda n: -(-n // dilation) * dilation
    x = jnp.pad(x, ((0, 0), (0, 0), (0, up(h) - h), (0, up(w) - w), (0, 0)))
    x = x.reshape(b, d, up(h) // dilation, dilation, up(w) // dilation, dilation, c)
    x = jnp.moveaxis(x, (3, 5), (1, 2)).reshape(b * dilation**2, d, up(h) // dilation, up(w) // dilation, c)
    y = _plane_conv(x, kernel).reshape(b, dilation, dilation, d, up(h) // dilation, up(w) // dilation, -1)
    return jnp.moveaxis(y, (1, 2), (3, 5)).reshape(b, d, up(h), up(w), -1)[:, :, :h, :w]


def _sliced(x, kernel, dilation):
    """The CPU's form: 2-D convolutions of the depth slices, summed over the kernel's depth."""
    kd, kh, kw, c, o = kernel.shape
    d, reach = x.shape[1], dilation * (kd // 2)
    if kd == 1:
        return _plane_conv(x, kernel[0], dilation)
    along_depth = lambda a, i: lax.slice_in_dim(a, i * dilation, i * dilation + d, axis=1)
    margin = ((0, 0), (reach, reach), (0, 0), (0, 0), (0, 0))
    if kh == kw == 1:
        x = jnp.pad(x, margin)
        return sum(along_depth(x, i) @ kernel[i, 0, 0] for i in range(kd))
    # One convolution with the depth kernels side by side, then the sum of its outputs, shifted in depth.
    beside = jnp.moveaxis(kernel, 0, 3).reshape(kh, kw, c, kd * o)
    y = jnp.pad(_plane_conv(x, beside, dilation), margin)
    return sum(along_depth(y, i)[..., i * o : (i + 1) * o] for i in range(kd))


def _kernel_gradient(x, gradient, kernel, dilation):
    kd, kh, kw, c, o = kernel.shape
    d, h, w = x.shape[1:4]
    if kd == 1:
        return jax.vjp(functools.partial(_plane_conv, x, dilation=dilation), kernel[0])[1](gradient)[0][None]
    deep, high, wide = (dilation * (size // 2) for size in (kd, kh, kw))
    if kh == kw == 1:
        x = jnp.pad(x, ((0, 0), (deep, deep), (0, 0), (0, 0), (0, 0)))
        offsets = (lax.slice_in_dim(x, i * dilation, i * dilation + d, axis=1) for i in range(kd))
        return jnp.stack([jnp.einsum("bdhwc,bdhwo->co", offset, gradient) for offset in offsets])[:, None, None]
    # Slab by slab, so that no copy of the volume is made for each of the kernel's voxels: a matrix product for each row
    # of the kernel, between its shifts in width of the slab and the gradients of the slabs that it reaches in depth.
    x = jnp.pad(x, ((0, 0), (0, 0), (high, high), (wide, wide), (0, 0)))
    gradient = jnp.pad(gradient, ((0, 0), (deep, deep), (0, 0), (0, 0), (0, 0)))

    def add_slab(total, index):
        slab = lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)
        reached = lax.dynamic_slice_in_dim(gradient, index, 2 * deep + 1, axis=1)
        reached = jnp.concatenate([reached[:, 2 * deep - i * dilation] for i in range(kd)], axis=-1)
        shifted = jnp.concatenate([slab[:, :, k * dilation : k * dilation + w] for k in range(kw)], axis=-1)
        rows = [shifted[:, j * dilation : j * dilation + h].reshape(-1, kw * c) for j in range(kh)]
        return total + jnp.stack([row.T @ reached.reshape(-1, kd * o) for row in rows]), None

    # Summed in float32 at least, however coarse the numbers are.
    zeros = jnp.zeros((kh, kw * c, kd * o), jnp.promote_types(kernel.dtype, jnp.float32))
    total, _ = lax.scan(add_slab, zeros, jnp.arange(d))
    return jnp.moveaxis(total.reshape(kh, kw, c, kd, o), 3, 0).astype(kernel.dtype)


# --- stride 2 ---


def _halving_conv(x, kernel):
    def native(x, kernel):
        size = kernel.shape[0]
        padding = {2: (0, 0), 3: (1, 0), 4: (1, 1)}[size]
        return lax.conv_general_dilated(x, kernel, (2, 2, 2), (padding,) * 3, dimension_numbers=LAYOUT_3D)

    # The two forms differentiate through one rule each; the packed form is stride-free, so its gradients are fast as
    # well.
    @jax.custom_vjp
    def halving(x, kernel):
        return lax.platform_dependent(x, kernel, cpu=_packed, default=native)

    def forward(x, kernel):
        return halving(x, kernel), (x, kernel)

    def backward(saved, gradient):
        rule = lambda form: lambda x, kernel, gradient: jax.vjp(form, x, kernel)[1](gradient)
        return lax.platform_dependent(*saved, gradient, cpu=rule(_packed), default=rule(native))

    halving.defvjp(forward, backward)
    return halving(x, kernel)


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
