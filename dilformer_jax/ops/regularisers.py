"""How rough a displacement is, and how far two of them are from undoing each other.

Displacements are (*b, D, H, W, 3) in voxels of their own grid. Every function returns a scalar: a mean over all voxels
of the batch.
"""

import itertools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dilformer_jax.ops import slabs, spatial

Scalar = Float[Array, ""]
Displacement = Float[Array, "*b d h w 3"]


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


REGULARISERS = {"diffusion": diffusion, "bending": bending}
