"""3-D convolutions, channels-last, each lowered as its platform likes it.

The CPU gets the forms of `ops.conv_cpu`, which are several times faster there, GPU and TPU XLA's native 3-D
convolution, but where that is slow on a GPU: with one channel in or few out, depthwise, and for kernels of 2³
(`experiments/benchmark.py` measures the forms). Forward and gradient rules choose separately, so that one traced
function, or one exported artefact, can serve every platform (`ops.platforms`).
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dilformer_jax.ops import conv_cpu, platforms, slabs

LAYOUT_3D = ("NDHWC", "DHWIO", "NDHWC")
FEWEST = 8  # channels out of a native convolution


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


# --- 1³ ---


@jax.custom_vjp
def _pointwise(inputs, kernel):
    if len(inputs) == 1:
        return inputs[0] @ kernel
    return platforms.by_platform(*inputs, kernel, cpu=conv_cpu.by_planes, default=_sum_of_products)


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


# --- stride 1 ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x, kernel, dilation):
    return platforms.by_platform(
        x,
        kernel,
        cpu=functools.partial(conv_cpu.sliced, dilation=dilation),
        default=functools.partial(_native, dilation=dilation),
    )


def _conv_forward(x, kernel, dilation):
    return _conv(x, kernel, dilation), (x, kernel)


def _conv_backward(dilation, saved, gradient):
    def native(x, kernel, gradient):
        return jax.vjp(functools.partial(_native, dilation=dilation), x, kernel)[1](gradient)

    own = functools.partial(conv_cpu.gradients, dilation=dilation)
    return platforms.by_platform(*saved, gradient, cpu=own, default=native)


_conv.defvjp(_conv_forward, _conv_backward)


def _native(x, kernel, dilation):
    *sizes, c, o = kernel.shape
    if c == 1:
        # One product with the voxels of each window side by side: a quarter of cuDNN's time, most of which is the
        # kernel's gradient.
        windows = jnp.concatenate(list(_windows(x, sizes, dilation)), axis=-1)
        return windows @ kernel.reshape(-1, o)
    # Few channels out are made eight: half the time on a GPU, most of it again the kernel's gradient.
    kernel = jnp.pad(kernel, ((0, 0),) * 4 + ((0, max(FEWEST - o, 0)),))
    padding = [(dilation * (size // 2),) * 2 for size in sizes]
    y = lax.conv_general_dilated(
        x, kernel, (1, 1, 1), padding, rhs_dilation=(dilation,) * 3, dimension_numbers=LAYOUT_3D
    )
    return y[..., :o]


def _windows(x, sizes, dilation):
    """Zero-padded `x`, shifted, as each tap of a kernel of these sizes sees it."""
    padded = jnp.pad(x, ((0, 0), *((dilation * (size // 2),) * 2 for size in sizes), (0, 0)))
    for taps in itertools.product(*(range(size) for size in sizes)):
        yield lax.slice(padded, (0, *(dilation * tap for tap in taps), 0), (
            x.shape[0], *(dilation * tap + n for tap, n in zip(taps, x.shape[1:4], strict=True)), x.shape[4]
        ))  # fmt: skip


# --- stride 2 ---


def _halving_conv(x, kernel):
    def native(x, kernel):
        size = kernel.shape[0]
        padding = {3: (1, 0), 4: (1, 1)}[size]
        return lax.conv_general_dilated(x, kernel, (2, 2, 2), (padding,) * 3, dimension_numbers=LAYOUT_3D)

    if kernel.shape[0] == 2:
        return _packed(x, kernel)
    # Each form has a gradient rule of its own; the packed one is stride-free and differentiates into fast forms.
    form = conv_cpu.strided if kernel.shape[0] == 3 else _packed

    @jax.custom_vjp
    def halving(x, kernel):
        return platforms.by_platform(x, kernel, cpu=form, default=native)

    def forward(x, kernel):
        return halving(x, kernel), (x, kernel)

    def backward(saved, gradient):
        rule = lambda form: lambda x, kernel, gradient: jax.vjp(form, x, kernel)[1](gradient)
        own = conv_cpu.strided_gradients if form is conv_cpu.strided else rule(_packed)
        return platforms.by_platform(*saved, gradient, cpu=own, default=rule(native))

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
    return platforms.by_platform(
        x,
        kernel,
        cpu=functools.partial(conv_cpu.shifted, dilation=dilation),
        default=functools.partial(_fused, dilation=dilation),
    )


def _depthwise_forward(x, kernel, dilation):
    return _depthwise(x, kernel, dilation), (x, kernel)


def _depthwise_backward(dilation, saved, gradient):
    def fused(x, kernel, gradient):
        return jax.vjp(functools.partial(_fused, dilation=dilation), x, kernel)[1](gradient)

    own = functools.partial(conv_cpu.depthwise_gradients, dilation=dilation)
    return platforms.by_platform(*saved, gradient, cpu=own, default=fused)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _fused(x, kernel, dilation):
    """The sum of shifted windows times the channels' weights, written out: XLA fuses it to one pass over the voxels. A
    grouped convolution takes twenty times as long on a GPU, its gradients most of it."""
    precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    weights = kernel.astype(precise.dtype).reshape(-1, kernel.shape[-1])
    windows = _windows(precise, kernel.shape[:3], dilation)
    return sum(window * weight for window, weight in zip(windows, weights, strict=True)).astype(x.dtype)
