"""VoxelMorph-2 (Balakrishnan et al., IEEE TMI 2019): a U-Net on the concatenated pair, one displacement at full
resolution."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dilformer_jax.models.blocks import DTYPES, Conv, Head, rematerialised


class VoxelMorph(nn.Module):
    """Fixed and moving images (b, d, h, w, 1) to a displacement, as a tuple of one.

    The defaults are VoxelMorph-2 as in the TransMorph benchmark: strided 3³ convolutions down, nearest-neighbour
    enlargement and skips up, LeakyReLU 0.2, no norm.
    301,411 parameters.

    Attributes:
      down: channels of the strided convolutions.
      up: channels of the convolutions after each enlargement.
      final: channels of the convolutions at full resolution.
      dtype: 'float32', or 'bfloat16' for all but the parameters and the displacement.
    """

    down: tuple[int, ...] = (16, 32, 32, 32)
    up: tuple[int, ...] = (32, 32, 32, 32)
    final: tuple[int, ...] = (32, 16, 16)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not 0 < len(self.up) <= len(self.down):
            raise ValueError(f"VoxelMorph goes up as often as down, or less often, got {self.up} after {self.down}.")
        if min(*self.down, *self.up, *self.final) < 1:
            raise ValueError(f"VoxelMorph's channels are 1 or more, got {self.down}, {self.up} and {self.final}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"VoxelMorph's dtype is one of {DTYPES}, got {self.dtype!r}.")
        super().__post_init__()

    @property
    def downsampling(self) -> int:
        """What every axis of the input must be a multiple of."""
        return 2 ** len(self.down)

    @nn.compact
    def __call__(
        self,
        fixed: Float[Array, "b d h w 1"],
        moving: Float[Array, "b d h w 1"],
        *,
        both: bool = False,
        remat: bool = False,
    ) -> tuple[Array, ...]:
        """The displacement (b, d, h, w, 3) in voxels; `both` and `remat` as `DilformerNet` has them.

        Raises:
          ValueError: an axis that is not a multiple of `downsampling`.
        """
        if any(size % self.downsampling for size in fixed.shape[1:4]):
            raise ValueError(
                f"This network needs axes that are multiples of {self.downsampling}, got {fixed.shape[1:4]}."
            )
        if both:
            stack = lambda first, second: jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])
            fixed, moving = stack(fixed, moving), stack(moving, fixed)
        x = jnp.concatenate([moving, fixed], axis=-1).astype(self.dtype)
        skips = [x]
        for features in self.down:
            x = nn.leaky_relu(Conv(features, stride=2)(x), 0.2)
            skips.append(x)
        x = skips.pop()
        for features in self.up:
            x = rematerialised(_upwards, [Conv(features)], x, skips.pop(), remat=remat)
        for features in self.final:
            x = nn.leaky_relu(Conv(features)(x), 0.2)
        return (Head(name="head")(x),)


def _upwards(conv, x, skip):
    return jnp.concatenate([_enlarge(nn.leaky_relu(conv(x), 0.2)), skip], axis=-1)


def _enlarge(x):
    """Each voxel becomes a 2x2x2 cube of itself."""
    b, d, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :, None], (b, d, 2, h, 2, w, 2, c))
    return x.reshape(b, 2 * d, 2 * h, 2 * w, c)
