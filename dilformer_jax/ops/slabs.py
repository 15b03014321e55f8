"""One volume on several devices: each holds a slab, a run of planes of the first spatial axis.

Inside `jax.shard_map` over a mesh axis, and within `split`, the functions of `ops` work on slabs as they work on whole
volumes elsewhere: what looks at neighbouring planes gets them from the neighbouring devices (`same`, `extended`), what
sums over voxels sums over devices (`total`, `mean`). Where no volume is split, all of this is the identity, padding or
NumPy's own sum.

A volume of which the devices cannot have equal slabs is padded at its end. The padding planes of an array hold
anything; whoever looks beyond its own voxel takes them for what lies outside of the volume.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Num

DEPTH = -4  # the axis that is split: the first spatial one of (*b, d, h, w, c)


@dataclass(frozen=True)
class Slabs:
    """How the volumes are split: over `count` devices along the mesh axis `axis`.

    `depth` is the number of planes of the network's input without padding, and `planes` how many of them, padding
    included, each device has. At coarser levels both are as much smaller. `together` are all axes of the mesh: the
    devices along them run in step.
    """

    axis: str
    together: tuple[str, ...]
    count: int
    depth: int
    planes: int

    def __post_init__(self) -> None:
        if self.count * self.planes < self.depth:
            raise ValueError(f"{self.count} slabs of {self.planes} planes do not hold {self.depth}.")


_split: contextvars.ContextVar[Slabs | None] = contextvars.ContextVar("slabs", default=None)


@contextlib.contextmanager
def split(slabs: Slabs | None) -> Iterator[None]:
    """While a function is traced in here, and its gradient, its volumes are slabs (or whole, for None)."""
    token = _split.set(slabs)
    try:
        yield
    finally:
        _split.reset(token)


def current() -> Slabs | None:
    """How volumes are split here; None where they are whole."""
    return _split.get()


def planes(depth: int, count: int, multiple: int) -> int:
    """How many planes each of `count` devices gets of a volume of `depth`: the same for all, and a multiple of what the
    network halves."""
    return -(-depth // (count * multiple)) * multiple


def own(whole: Num[Array, "*b d h w c"]) -> Num[Array, "*b p h w c"]:
    """This device's slab of a volume that every device has; beyond its end, zeros."""
    slabs = current()
    if slabs is None:
        return whole
    margin = [(0, 0)] * whole.ndim
    margin[DEPTH] = (0, slabs.count * slabs.planes - slabs.depth)
    start = lax.axis_index(slabs.axis) * slabs.planes
    return lax.dynamic_slice_in_dim(jnp.pad(whole, margin), start, slabs.planes, axis=whole.ndim + DEPTH)


def depth(x: Num[Array, "*b d h w c"]) -> int:
    """The planes of the whole volume, at the level of `x`."""
    slabs = current()
    return x.shape[DEPTH] if slabs is None else slabs.depth * x.shape[DEPTH] // slabs.planes


def first_plane(x: Num[Array, "*b d h w c"]) -> Num[Array, ""]:
    """The place of this slab's first plane in the whole volume."""
    slabs = current()
    return jnp.int32(0) if slabs is None else lax.axis_index(slabs.axis) * x.shape[DEPTH]


def inside(x: Num[Array, "*b d h w c"], reach: int = 0) -> Bool[Array, "p 1 1 1"]:
    """Which planes of a slab, with `reach` more on either side, lie in the volume."""
    place = first_plane(x) + jnp.arange(-reach, x.shape[DEPTH] + reach)
    return ((place >= 0) & (place < depth(x)))[:, None, None, None]


def masked(x: Num[Array, "*b d h w c"]) -> Num[Array, "*b d h w c"]:
    """Zeros in the padding planes."""
    return jnp.where(inside(x), x, 0) if _padded(x) else x


def extended(x: Num[Array, "*b d h w c"], reach: int, edge: str = "zeros") -> Num[Array, "*b e h w c"]:
    """The slab with `reach` more planes on either side, its neighbours'; beyond the volume zeros, or the 'border'
    plane.

    Raises:
      ValueError: an unknown edge.
    """
    if edge not in ("zeros", "border"):
        raise ValueError(f"Beyond the volume lie 'zeros' or its 'border', got {edge!r}.")
    slabs = current()
    if reach == 0:
        return x
    if slabs is None:
        margin = [(0, 0)] * x.ndim
        margin[DEPTH] = (reach, reach)
        return jnp.pad(x, margin, mode="constant" if edge == "zeros" else "edge")
    x = masked(x)
    n = x.shape[DEPTH]
    before: list[Array] = []
    after: list[Array] = []
    for hop in range(1, -(-reach // n) + 1):
        count = min(n, reach - (hop - 1) * n)
        before.insert(0, passed(_part(x, n - count, n), slabs, hop))
        after.append(passed(_part(x, 0, count), slabs, -hop))
    wide = jnp.concatenate([*before, x, *after], axis=DEPTH)
    if edge == "zeros":
        return wide
    # The border planes are the first and the last device's own, but where a halo or the padding reaches over more than
    # one of them.
    place = (first_plane(x) + jnp.arange(-reach, n + reach))[:, None, None, None]
    last = depth(x) - 1
    lone = reach <= n
    first = _part(x, 0, 1) if lone else _plane(x, 0)
    wide = jnp.where(place < 0, first, wide)
    return jnp.where(place > last, _part(x, n - 1, n) if lone and not _padded(x) else _plane(x, last), wide)


def same(
    function: Callable[[Array], Array],
    x: Num[Array, "*b d h w c"],
    reach: int,
    *,
    edge: str = "zeros",
    scale: tuple[int, int] = (1, 1),
) -> Num[Array, "*b e f g o"]:
    """function(x), where each plane of the result looks `reach` planes of `x` far on either side.

    The function continues a whole volume by what `edge` says. Where it makes `scale[0]` planes out of `scale[1]`,
    `reach` is a multiple of the latter.
    """
    if current() is None or reach == 0:
        return function(x)
    y = function(extended(x, reach, edge))
    cut = reach * scale[0] // scale[1]
    return _part(y, cut, y.shape[DEPTH] - cut)


def total(x: Num[Array, "..."]) -> Num[Array, "..."]:
    """The sum over all slabs of what each has made of its own."""
    slabs = current()
    return x if slabs is None else lax.psum(x, slabs.axis)


def mean(x: Num[Array, "*b d h w c"], axis: tuple[int, ...] | None = None, *, keepdims: bool = False) -> Array:
    """The mean over these axes, the split one among them (all by default), of the whole volume."""
    if current() is None:
        return x.mean(axis, keepdims=keepdims)
    local = masked(x).mean(axis, keepdims=keepdims)
    return total(local) * (x.shape[DEPTH] / depth(x))


def passed(x: Array, slabs: Slabs, hops: int) -> Array:
    """Each device's x sent `hops` slabs onwards (backwards where negative); zeros come in at the end."""
    pairs = [(device, device + hops) for device in range(slabs.count) if 0 <= device + hops < slabs.count]
    return lax.ppermute(x, slabs.axis, pairs) if pairs else jnp.zeros_like(x)


def _padded(x: Array) -> bool:
    slabs = current()
    return slabs is not None and slabs.count * slabs.planes != slabs.depth


def _part(x: Array, start: int, end: int) -> Array:
    return lax.slice_in_dim(x, start, end, axis=x.ndim + DEPTH)


def _plane(x: Array, place: int) -> Array:
    """One plane of the whole volume, on every device."""
    at = (first_plane(x) + jnp.arange(x.shape[DEPTH]) == place)[:, None, None, None]
    return total(jnp.where(at, x, 0).sum(DEPTH, keepdims=True))
