"""The blocks of the registration networks: MSR, Dilformer and SRF, and the plain block that each ablation puts in
their place.

The paper names the blocks and their roles; their inner sizes are ours. Features are (b, d, h, w, c); a block keeps the
volume's shape. It computes in the type of its features, float32 or bfloat16, to which it casts its parameters, which
are float32; statistics, scores and sums over channels are float32 always, and so is what a head gives.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from dilformer_jax.ops import conv as convolution
from dilformer_jax.ops import slabs, spatial

Features = Float[Array, "b d h w c"]
Widened = Float[Array, "b d h w o"]
DTYPES = ("float32", "bfloat16")


def rematerialised(function: Callable, modules: Sequence[nn.Module], *arguments: Any, remat: bool) -> Any:
    """function(*modules, *arguments), and with `remat` only the arguments are kept for its gradient, for which it is
    computed anew. Every module and array that it depends on is given, so that parameters are named as without.

    Not by `jax.checkpoint`, whose barriers are gone from what XLA compiles for the CPU: nothing then keeps the second
    computation from being made along with the first. Here the arguments of the second hold the gradient that it waits
    for, times zero. (The branches of a conditional wait too, but convolutions are several times slower in them on the
    CPU.)
    """
    if not remat:
        return function(*modules, *arguments)
    unbound, variables = zip(*(module.unbind() for module in modules), strict=True)

    def compute(variables, *arguments):
        return function(*(module.bind(own) for module, own in zip(unbound, variables, strict=True)), *arguments)

    def gradient(saved, cotangent):
        first = jax.tree.leaves(cotangent)[0]
        zero = 0 * first[(0,) * first.ndim]
        return jax.vjp(compute, *jax.tree.map(lambda x: x + zero.astype(x.dtype), saved))[1](cotangent)

    rule = jax.custom_vjp(compute)
    rule.defvjp(lambda *operands: (compute(*operands), operands), gradient)
    return rule(variables, *arguments)


def activation(x: Features) -> Features:
    return nn.leaky_relu(x, 0.1)


def instance_norm(x: Features) -> Features:
    """Zero mean and unit variance over the voxels of each channel of each volume."""
    mean = functools.partial(slabs.mean, axis=(1, 2, 3), keepdims=True)
    precise = x.astype(jnp.float32)
    centred = precise - mean(precise)
    return (centred * jax.lax.rsqrt(mean(jnp.square(centred)) + 1e-5)).astype(x.dtype)


class Conv(nn.Module):
    """A convolution of `ops.conv` with its parameters: `kernel` (kd, kh, kw, c, features) and, unless a norm follows,
    `bias`. A 1³ takes several features, which stand beside each other as its c channels."""

    features: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: int = 1
    bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, *inputs: Float[Array, "b d h w _"]) -> Float[Array, "b e f g o"]:
        width, dtype = sum(x.shape[-1] for x in inputs), inputs[0].dtype
        kernel = self.param("kernel", self.kernel_init, (*self.kernel, width, self.features)).astype(dtype)
        if self.kernel == (1, 1, 1):
            x = convolution.pointwise(inputs, kernel[0, 0, 0])
        else:
            (x,) = inputs
            x = convolution.conv(x, kernel, stride=self.stride)
        return x + self.param("bias", nn.initializers.zeros, (self.features,)).astype(dtype) if self.bias else x


class ConvNorm(nn.Module):
    """Convolution, instance norm, LeakyReLU."""

    features: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: int = 1

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "b e f g o"]:
        return activation(instance_norm(Conv(self.features, self.kernel, self.stride, bias=False)(x)))


class Depthwise(nn.Module):
    """A depthwise 3³ convolution."""

    dilation: int = 1

    @nn.compact
    def __call__(self, x: Features) -> Features:
        kernel = self.param(
            "kernel",
            nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1, 2), out_axis=3),
            (3, 3, 3, x.shape[-1]),
        )
        return convolution.depthwise(x, kernel.astype(x.dtype), dilation=self.dilation)


class MSR(nn.Module):
    """Multi-scale residual learning: a 3³ path beside a factorised 5³ path, each at half width, joined by a 1³."""

    @nn.compact
    def __call__(self, x: Features) -> Features:
        width = x.shape[-1]
        narrow = ConvNorm(width // 2)(x)
        wide = Conv(width - width // 2, (1, 1, 1), bias=False)(x)
        for kernel in ((5, 1, 1), (1, 5, 1), (1, 1, 5)):
            wide = Conv(width - width // 2, kernel, bias=False)(wide)
        wide = activation(instance_norm(wide))
        y = Conv(width, (1, 1, 1), bias=False)(narrow, wide)
        return activation(instance_norm(y + x))


class Residual(nn.Module):
    """The plain counterpart of MSR and of Dilformer: one 3³ convolution and a residual, as in RDP's encoder."""

    @nn.compact
    def __call__(self, x: Features) -> Features:
        y = Conv(x.shape[-1], bias=False)(activation(instance_norm(x)))
        return activation(instance_norm(y + x))


class Dilformer(nn.Module):
    """A transformer block whose queries, keys and values see different ranges: depthwise convolutions at several
    dilations.

    Attributes:
      attention: 'channels' (between the channels of a head, linear in voxels) or 'windows' (between the voxels of a
      window).
      heads: attention heads; the features' width is a multiple of it.
      window: voxels of an attention window along each axis.
      shifted: whether the windows start half a window earlier, so that consecutive blocks exchange across their
      borders.
      dilations: of the queries', the keys' and the values' convolution.
    """

    attention: str = "channels"
    heads: int = 4
    window: tuple[int, int, int] = (5, 6, 5)
    shifted: bool = False
    dilations: tuple[int, int, int] = (1, 2, 3)

    @nn.compact
    def __call__(self, x: Features) -> Features:
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"{self.heads} attention heads do not divide a width of {width} channels.")
        y = nn.LayerNorm(epsilon=1e-5, dtype=x.dtype, name="attention_norm")(x)
        q, k, v = (
            Depthwise(dilation, name=f"{name}_range")(Conv(width, (1, 1, 1), bias=False, name=name)(y))
            for name, dilation in zip(("query", "key", "value"), self.dilations, strict=True)
        )
        if self.attention == "channels":
            temperature = self.param("temperature", nn.initializers.ones, (self.heads, 1, 1))
            y = channel_attention(q, k, v, temperature)
        elif self.attention == "windows":
            positions = math.prod(2 * size - 1 for size in self.window)
            bias = self.param("position_bias", nn.initializers.normal(0.02), (positions, self.heads))
            y = window_attention(q, k, v, bias, self.window, self.shifted)
        else:
            raise ValueError(f"Dilformer's attention is 'channels' or 'windows', got {self.attention!r}.")
        x = x + Conv(width, (1, 1, 1), name="join")(y)
        y = nn.LayerNorm(epsilon=1e-5, dtype=x.dtype, name="feed_forward_norm")(x)
        y = Conv(2 * width, (1, 1, 1), name="widen")(y)
        y = nn.gelu(Depthwise(name="mix")(y))
        return x + Conv(width, (1, 1, 1), bias=False, name="narrow")(y)


def channel_attention(q: Features, k: Features, v: Features, temperature: Float[Array, "heads 1 1"]) -> Features:
    """Attention between the channels of each head; queries and keys are normalised over the voxels (Restormer, Zamir
    et al., CVPR 2022)."""
    shape = dict(zip("dhw", q.shape[1:4], strict=True))
    q, k = slabs.masked(q), slabs.masked(k)
    q, k, v = (rearrange(a, "b d h w (heads c) -> b heads (d h w) c", heads=len(temperature)) for a in (q, k, v))
    squares = lambda a: slabs.total(jnp.square(a.astype(jnp.float32)).sum(axis=2, keepdims=True))
    unit = lambda a: (a * jax.lax.rsqrt(squares(a) + 1e-6)).astype(a.dtype)
    products = jnp.einsum("bhnc,bhne->bhce", unit(q), unit(k), preferred_element_type=jnp.float32)
    scores = nn.softmax(slabs.total(products) * temperature, axis=-1).astype(v.dtype)
    y = jnp.einsum("bhce,bhne->bhnc", scores, v)
    return rearrange(y, "b heads (d h w) c -> b d h w (heads c)", **shape)


def window_attention(
    q: Features,
    k: Features,
    v: Features,
    bias: Float[Array, "positions heads"],
    window: tuple[int, int, int],
    shifted: bool,
) -> Features:
    """Attention between the voxels of each window, with a learnt bias for each relative position (Swin, Liu et al.,
    ICCV 2021).

    The volume is padded to whole windows and the padding masked, so that a shift is a padding in front and nothing
    wraps around.

    Raises:
      ValueError: a volume that is split over devices: its windows would be.
    """
    if slabs.current() is not None:
        raise ValueError("Attention in 'windows' does not work on a volume split over devices; take 'channels'.")
    volume, heads = q.shape[1:4], bias.shape[1]
    front = [size // 2 if shifted else 0 for size in window]
    padding = [(f, -(size + f) % w) for size, f, w in zip(volume, front, window, strict=True)]
    padded = [before + size + after for size, (before, after) in zip(volume, padding, strict=True)]
    counts = {name: size // w for name, size, w in zip("def", padded, window, strict=True)}
    pattern = "(d wd) (e we) (f wf)"
    sizes = dict(zip(("wd", "we", "wf"), window, strict=True))
    cut = lambda a: rearrange(
        jnp.pad(a, ((0, 0), *padding, (0, 0))),
        f"b {pattern} (heads c) -> (b d e f) heads (wd we wf) c",
        heads=heads,
        **sizes,
    )
    inside = rearrange(jnp.pad(jnp.ones(volume, bool), padding), f"{pattern} -> (d e f) 1 1 (wd we wf)", **sizes)
    place = jnp.stack(jnp.meshgrid(*(jnp.arange(size) for size in window), indexing="ij"), axis=-1).reshape(-1, 3)
    offset = place[:, None] - place[None] + jnp.array(window) - 1
    relative = (offset[..., 0] * (2 * window[1] - 1) + offset[..., 1]) * (2 * window[2] - 1) + offset[..., 2]
    q, k, windows = cut(q), cut(k), cut(v)
    scores = jnp.einsum("nhqc,nhkc->nhqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    scores += rearrange(bias[relative], "q k heads -> heads q k")
    scores = jnp.where(jnp.tile(inside, (v.shape[0], 1, 1, 1)), scores, -1e9)
    y = jnp.einsum("nhqk,nhkc->nhqc", nn.softmax(scores, axis=-1).astype(v.dtype), windows)
    y = rearrange(y, f"(b d e f) heads (wd we wf) c -> b {pattern} (heads c)", **counts, **sizes)
    return y[:, *(slice(before, before + size) for size, (before, _) in zip(volume, padding, strict=True))]


class SRF(nn.Module):
    """Separable residual fusion: a 1³ to the level's width, then two rounds of factorised 3³ convolutions and a
    residual.

    No norm on the residual: it alone tells how far apart this pair is, which a norm of every path would take away.
    """

    features: int

    @nn.compact
    def __call__(self, *inputs: Float[Array, "b d h w _"], remat: bool = False) -> Widened:
        def factorised(depth, height, width, y):
            return activation(instance_norm(width(height(depth(y)))))

        x = Conv(self.features, (1, 1, 1))(*inputs)
        y = activation(x)
        for _ in range(2):
            convs = [Conv(self.features, kernel, bias=False) for kernel in ((3, 1, 1), (1, 3, 1), (1, 1, 3))]
            y = rematerialised(factorised, convs, y, remat=remat)
        return activation(x + y)


class Fusion(nn.Module):
    """The plain counterpart of SRF: two dense 3³ convolutions."""

    features: int

    @nn.compact
    def __call__(self, *inputs: Float[Array, "b d h w _"], remat: bool = False) -> Widened:
        x = jnp.concatenate(inputs, axis=-1)
        for _ in range(2):
            x = rematerialised(ConvNorm.__call__, [ConvNorm(self.features)], x, remat=remat)
        return x


class Conditioning(nn.Module):
    """A scale and a shift of each channel by one number (FiLM, Perez et al., AAAI 2018), which a fresh network does not
    have: how smooth a displacement is to be, as in Mok and Chung's conditional LapIRN (MICCAI 2021)."""

    @nn.compact
    def __call__(self, x: Features, number: Float[Array, ""]) -> Features:
        y = nn.leaky_relu(nn.Dense(32, name="widen")(number[None]), 0.1)
        scale, shift = jnp.split(nn.Dense(2 * x.shape[-1], kernel_init=nn.initializers.zeros, name="film")(y), 2)
        return x * (1 + scale).astype(x.dtype) + shift.astype(x.dtype)


class Head(nn.Module):
    """Features to a displacement in voxels, float32; nearly zero at first, so that a fresh network is the identity."""

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "b d h w 3"]:
        return Conv(3, kernel_init=nn.initializers.normal(1e-5))(x.astype(jnp.float32))


class SpatialTransformer(nn.Module):
    """`ops.spatial.warp` as a layer without parameters; interpolates in float32 whatever the image's type."""

    order: int = 1
    padding: str = "border"
    engine: str = "gather"

    @nn.compact
    def __call__(self, image: Features, displacement: Float[Array, "b e f g 3"]) -> Float[Array, "b e f g c"]:
        precise = image.astype(jnp.float32)
        moved = spatial.warp(precise, displacement, order=self.order, padding=self.padding, engine=self.engine)
        return moved.astype(image.dtype)
