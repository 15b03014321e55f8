"""DilformerNet: the dual-stream pyramid that registers a pair from coarse to fine (Peng et al., J. Zhejiang Univ.
(Eng. Sci.) 2026, 60(5):1082).

From the paper: two streams through one pyramid of MSR blocks, Dilformer blocks at the low resolutions, SRF blocks
before each displacement, a multi-resolution loss. The inner sizes, and every option, are ours.
"""

import functools
from collections.abc import Iterator

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dilformer_jax.models.blocks import (
    DTYPES,
    MSR,
    SRF,
    Conditioning,
    Conv,
    ConvNorm,
    Dilformer,
    Fusion,
    Head,
    Residual,
    SpatialTransformer,
    rematerialised,
)
from dilformer_jax.models.correlation import correlation
from dilformer_jax.ops import spatial


class Encoder(nn.Module):
    """An image to a pyramid of features, finest level first.

    Attributes: see `DilformerNet`.
    """

    width: int
    levels: int
    finest: int
    msr: bool
    dilformer: str
    attention: str
    heads: int
    window: tuple[int, int, int]
    dilations: tuple[int, int, int]

    @nn.compact
    def __call__(self, x: Float[Array, "b d h w 1"], remat: bool = False) -> list[Array]:
        pyramid = []
        for level in range(self.levels):
            for block in self._blocks(level):
                x = rematerialised(lambda block, x: block(x), [block], x, remat=remat)
            pyramid.append(x)
        return pyramid

    def _blocks(self, level: int) -> Iterator[nn.Module]:
        width = self.width * 2**level
        if level:
            yield ConvNorm(width, (2, 2, 2), 2, name=f"down{level}")
        elif self.finest:
            # The image enters by strided convolutions: no features at the resolutions that carry no displacement.
            yield ConvNorm(width, (4, 4, 4), 2, name="enter")
            for coarser in range(1, self.finest):
                yield ConvNorm(width, (2, 2, 2), 2, name=f"enter{coarser}")
        else:
            yield ConvNorm(width, name="enter")
        if level or self.finest:
            yield MSR(name=f"msr{level}") if self.msr else Residual(name=f"plain{level}")
        if self.dilformer in ("streams", "plain"):
            for block in range(dilformer_blocks(level, self.levels)):
                if self.dilformer == "plain":
                    yield Residual(name=f"plain_attention{level}_{block}")
                else:
                    shifted = block % 2 == 1
                    options = (self.attention, self.heads, self.window, shifted, self.dilations)
                    yield Dilformer(*options, name=f"dilformer{level}_{block}")


DILFORMERS, ATTENTIONS = ("streams", "fused", "plain"), ("channels", "windows")


def dilformer_blocks(level: int, levels: int) -> int:
    """How many Dilformer blocks a level has: two at the coarsest, one at the next, none above."""
    return {levels - 1: 2, levels - 2: 1}.get(level, 0) if level else 0


class DilformerNet(nn.Module):
    """Fixed and moving images (b, d, h, w, 1) to displacements, one a level, finest first.

    Attributes:
      width: channels of the finest level; each coarser level has twice as many.
      levels: levels that carry a displacement.
      finest: the finest of them, in halvings of the input: 0 is full resolution.
      recursions: how often each level refines its displacement, with shared weights.
      diffeomorphic: whether each level's output is a velocity, integrated by scaling and squaring.
      separate_encoders: whether the two streams have weights of their own.
      msr: False puts a plain residual block in MSR's place.
      dilformer: 'streams' (in the encoder), 'fused' (on the fused features of the decoder), or 'plain' (a residual
      block in its place).
      srf: False puts dense convolutions in SRF's place.
      correlation: whether the decoder is shown, at every level but the finest (where it would cost most), how alike
      each fixed feature is to the moving ones around its place.
      attention: 'channels' or 'windows'.
      heads, window, dilations: of the attention.
      smoothness: the least and the most, of a `smoothness` that the network is told: what the regulariser's weight is
      multiplied by in training, and chosen anew at each registration. () for a network that is told nothing.
      dtype: 'float32', or 'bfloat16' for what lies between the images and the heads; parameters and displacements are
      float32 always.
    """

    width: int = 16
    levels: int = 4
    finest: int = 0
    recursions: int = 1
    diffeomorphic: bool = False
    separate_encoders: bool = False
    msr: bool = True
    dilformer: str = "streams"
    srf: bool = True
    correlation: bool = True
    attention: str = "channels"
    heads: int = 4
    window: tuple[int, int, int] = (5, 6, 5)
    dilations: tuple[int, int, int] = (1, 2, 3)
    smoothness: tuple[float, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, lowest in (("width", 1), ("levels", 1), ("finest", 0), ("recursions", 1), ("heads", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"DilformerNet's {name} is {lowest} or more, got {getattr(self, name)}.")
        for name, choices in (("dilformer", DILFORMERS), ("attention", ATTENTIONS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"DilformerNet's {name} is one of {choices}, got {getattr(self, name)!r}.")
        if self.smoothness and not (len(self.smoothness) == 2 and 0 < self.smoothness[0] <= 1 <= self.smoothness[1]):
            raise ValueError(f"DilformerNet's smoothness is () or two factors around 1, got {self.smoothness}.")
        if len(self.dilations) != 3 or not all(isinstance(d, int) and d > 0 for d in self.dilations):
            raise ValueError(f"DilformerNet's dilations are three of 1 or more, got {self.dilations}.")
        super().__post_init__()

    @property
    def downsampling(self) -> int:
        """What every axis of the input must be a multiple of."""
        return 2 ** (self.finest + self.levels - 1)

    @nn.compact
    def __call__(
        self,
        fixed: Float[Array, "b d h w 1"],
        moving: Float[Array, "b d h w 1"],
        *,
        both: bool = False,
        remat: bool = False,
        inverse: bool = False,
        smoothness: Float[Array, ""] | float = 1.0,
    ) -> tuple[Array, ...] | tuple[tuple[Array, ...], Array]:
        """Displacements of each level in its own voxels, (b, d / 2^l, h / 2^l, w / 2^l, 3), finest first.

        With `both`, one encoding serves both directions: the batch is 2b long, 2i registers moving i to fixed i and 2i
        + 1 fixed i to moving i. With `remat`, the gradient computes each level's features anew instead of keeping them:
        less memory for more time, the same numbers. With `inverse`, a pair: the displacements, and the inverse of the
        finest one on the same grid, exact but for interpolation: a diffeomorphic network's displacement is a chain of
        exp(v), whose inverse is that of exp(-v) in reverse order. `smoothness` is for a network that is told one.

        Raises:
          ValueError: an axis that is not a multiple of `downsampling`, heads that do not divide a level's channels, or
            the inverse of a network that is not diffeomorphic.
        """
        if inverse and not self.diffeomorphic:
            raise ValueError("Only a diffeomorphic network knows its inverse; make it with diffeomorphic=True.")
        if any(size % self.downsampling for size in fixed.shape[1:4]):
            raise ValueError(
                f"This network needs axes that are multiples of {self.downsampling}, got {fixed.shape[1:4]}."
            )
        fixed_pyramid, moving_pyramid = self._encode(fixed.astype(self.dtype), moving.astype(self.dtype), both, remat)
        warp = SpatialTransformer()
        displacements: list[Array] = []
        x: Array | None = None
        u: Array | None = None
        back: Array | None = None
        for level in reversed(range(self.levels)):
            f, m = fixed_pyramid[level], moving_pyramid[level]
            width = f.shape[-1]
            fuse = (SRF if self.srf else Fusion)(width, name=f"fuse{level}")
            head = Head(name=f"head{level}")
            up = Conv(width, (1, 1, 1), bias=False, name=f"up{level}") if u is not None else None
            if u is not None:
                u = spatial.resize_displacement(u, f.shape[1:4])
            if back is not None:
                back = spatial.resize_displacement(back, f.shape[1:4])
            compared = self.correlation and level > 0
            for recursion in range(self.recursions):
                if up is None:
                    inputs = _beside(f, m if u is None else warp(m, u), jnp.zeros_like(f) if x is None else x, compared)
                else:
                    meet = functools.partial(_meet, compared=compared, enlarging=recursion == 0)
                    inputs = rematerialised(meet, [up, warp], f, m, x, u, remat=remat)
                x = fuse(*inputs, remat=remat)
                if self.dilformer == "fused" and recursion == 0:
                    for block in range(dilformer_blocks(level, self.levels)):
                        options = (self.attention, self.heads, self.window, block % 2 == 1, self.dilations)
                        mix = Dilformer(*options, name=f"dilformer{level}_{block}")
                        x = rematerialised(lambda mix, x: mix(x), [mix], x, remat=remat)
                if self.smoothness:
                    told = jnp.log(jnp.asarray(smoothness, jnp.float32))
                    x = Conditioning(name=f"smoothness{level}")(x, told) if recursion == 0 else x
                w = rematerialised(lambda head, x: head(x), [head], x, remat=remat)
                if inverse:
                    undone = spatial.integrate(-w)
                    back = undone if back is None else spatial.compose(undone, back)
                if self.diffeomorphic:
                    w = spatial.integrate(w)
                u = w if u is None else spatial.compose(u, w)
            assert u is not None
            displacements.append(u)
        finest_first = tuple(reversed(displacements))
        return finest_first if back is None else (finest_first, back)

    def _encode(self, fixed, moving, both, remat):
        options = (
            self.width,
            self.levels,
            self.finest,
            self.msr,
            self.dilformer,
            self.attention,
            self.heads,
            self.window,
            self.dilations,
        )
        b = fixed.shape[0]
        # Pairs are stacked beside each other, not one stream behind the other, so that a batch split over devices
        # stays where it is.
        stack = lambda first, second: jnp.stack([first, second], axis=1).reshape(2 * b, *fixed.shape[1:])
        if self.separate_encoders:
            encode_fixed, encode_moving = (
                Encoder(*options, name="fixed_encoder"),
                Encoder(*options, name="moving_encoder"),
            )
            if both:
                return encode_fixed(stack(fixed, moving), remat), encode_moving(stack(moving, fixed), remat)
            return encode_fixed(fixed, remat), encode_moving(moving, remat)
        pyramid = Encoder(*options, name="encoder")(stack(fixed, moving), remat)
        beside = [x.reshape(b, 2, *x.shape[1:]) for x in pyramid]
        if both:
            return pyramid, [x[:, ::-1].reshape(2 * b, *x.shape[2:]) for x in beside]
        return [x[:, 0] for x in beside], [x[:, 1] for x in beside]


def _meet(up, warp, f, m, x, u, *, compared, enlarging):
    """What a level fuses. Where it has not been enlarged before, x is the features of the level below."""
    if enlarging:
        # To the level's width before the enlargement, where it costs an eighth.
        x = spatial.resize(up(x).astype(jnp.float32), f.shape[1:4]).astype(f.dtype)
    return _beside(f, warp(m, u), x, compared)


def _beside(f, seen, below, compared):
    return [f, seen, below, correlation(f, seen)] if compared else [f, seen, below]
