"""Points sampled in a volume of which every device holds a slab, wherever in the volume they lie.

Most points lie near their own voxel: they are sampled in the device's own slab with a halo of `HALO` planes on either
side. For the others the slabs travel from device to device, as many hops as the farthest point needs, and each device
takes from every slab that comes by what lies in it. So a device holds two slabs beside its own and never the volume,
every displacement is sampled exactly, and where none reaches beyond the halo nothing travels.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from dilformer_jax.ops import slabs

HALO = 4
NOWHERE = np.iinfo(np.int32).max
# (volume, coordinates, last): `last` holds the coordinates (3,) of the last voxel of the whole volume.
Sampler = Callable[[Array, Array, Array], Array]


def sampled(
    sample: Sampler, images: Num[Array, "b d h w c"], coordinates: Float[Array, "b e f g 3"]
) -> Num[Array, "b e f g c"]:
    """sample(volume, coordinates, last), for coordinates inside the whole volume that the slabs `images` are of.

    `sample` is linear in the volume and takes the planes floor(x) and floor(x) + 1, at the last face the two before it.
    Differentiable once, in both arguments.
    """
    halo = min(HALO, images.shape[1])
    start, here = slabs.first_plane(images) - halo, _distance(images, coordinates) == 0
    own = _within(sample, slabs.extended(images, halo), coordinates, start, here, _last(images))
    return own + _from_afar(sample, images, coordinates)


def hops(images: Num[Array, "b d h w c"], coordinates: Float[Array, "b e f g 3"]) -> Int[Array, ""]:
    """How far the slabs travel for these points, in devices; the same number on all devices of the mesh."""
    distance = _distance(images, coordinates)
    split = slabs.current()
    assert split is not None
    # All devices, for they run one program: where some would go on alone, none would meet them.
    return lax.pmax(jnp.where(distance == NOWHERE, 0, jnp.abs(distance)).max(), split.together)


def _last(images):
    return jnp.array([slabs.depth(images) - 1, *(size - 1 for size in images.shape[2:4])], jnp.float32)


def _distance(images, coordinates):
    """How many slabs away, (b, e, f, g), each point's planes begin; 0 where this slab and its halo have both, and
    NOWHERE for what stands in the padding planes."""
    n, first = images.shape[1], slabs.first_plane(images)
    halo = min(HALO, n)
    below = jnp.clip(jnp.floor(coordinates[..., 0]), 0, max(slabs.depth(images) - 2, 0)).astype(jnp.int32)
    near = (below >= first - halo) & (below + 1 < first + n + halo)
    distance = jnp.where(near, 0, below // n - first // n)
    return jnp.where(slabs.inside(coordinates)[..., 0], distance, NOWHERE)


def _within(sample, volume, coordinates, start, here, last):
    """The samples of the points that lie `here`, in a volume whose first plane is `start`; 0 for the others."""
    origin = jnp.array([1.0, 0.0, 0.0], coordinates.dtype) * start
    local = jnp.where(here[..., None], coordinates - origin, 0)
    return jnp.where(here[..., None], sample(volume, local, last - origin), 0)


def _with_next_plane(images, split):
    """A slab and the first plane of the next, between which its last points lie."""
    return jnp.concatenate([images, slabs.passed(images[:, :1], split, -1)], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _from_afar(sample, images, coordinates):
    """The samples of the points that lie beyond the slab and its halo; 0 for the others."""
    split = slabs.current()
    assert split is not None
    visiting = _visiting(sample, images, coordinates)

    def hop(number, carried):
        total, onwards, backwards = carried
        onwards, backwards = slabs.passed(onwards, split, 1), slabs.passed(backwards, split, -1)
        return total + visiting(-number, onwards) + visiting(number, backwards), onwards, backwards

    wide = _with_next_plane(images, split)
    nothing = jnp.zeros((*coordinates.shape[:-1], images.shape[-1]), images.dtype)
    return lax.fori_loop(1, hops(images, coordinates) + 1, hop, (nothing, wide, wide))[0]


def _visiting(sample, images, coordinates):
    """The function that takes, from the slab that is so many slabs away, what lies in it."""
    n, last = images.shape[1], _last(images)
    first, distance = slabs.first_plane(images), _distance(images, coordinates)
    return lambda away, slab, at=coordinates: _within(sample, slab, at, first + away * n, distance == away, last)


def _from_afar_forward(sample, images, coordinates):
    return _from_afar(sample, images, coordinates), (images, coordinates)


def _from_afar_backward(sample, saved, gradient):
    images, coordinates = saved
    split, farthest = slabs.current(), hops(images, coordinates)
    assert split is not None
    visiting = _visiting(sample, images, coordinates)
    wide, to_slab = jax.vjp(lambda images: _with_next_plane(images, split), images)

    def to_points(away, slab):
        return jax.vjp(lambda at: visiting(away, slab, at), coordinates)[1](gradient)[0]

    def to_slab_at(away):
        # Linear in the slab, whose values therefore need not travel again.
        return jax.vjp(lambda slab: visiting(away, slab), jnp.zeros_like(wide))[1](gradient)[0]

    def hop(number, carried):
        total, onwards, backwards = carried
        onwards, backwards = slabs.passed(onwards, split, 1), slabs.passed(backwards, split, -1)
        return total + to_points(-number, onwards) + to_points(number, backwards), onwards, backwards

    def way_home(back, carried):
        """Each device adds its share to what comes from farther off, and sends it one slab nearer home."""
        number = farthest - back
        from_above, from_below = carried
        from_above = slabs.passed(from_above + to_slab_at(-number), split, -1)
        return from_above, slabs.passed(from_below + to_slab_at(number), split, 1)

    to_coordinates, _, _ = lax.fori_loop(1, farthest + 1, hop, (jnp.zeros_like(coordinates), wide, wide))
    nothing = jnp.zeros_like(wide)
    from_above, from_below = lax.fori_loop(0, farthest, way_home, (nothing, nothing))
    return *to_slab(from_above + from_below), to_coordinates


_from_afar.defvjp(_from_afar_forward, _from_afar_backward)
