"""What a training step is fed: the images of a batch on the devices, varied there by the numbers that come with it.

The batches of `data.pipeline` bring the images along, or only say which they are: small sets live on the devices as a
whole (`upload`), and nothing but a few numbers is sent at each step.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from dilformer_jax.data.pipeline import check_extent
from dilformer_jax.data.preprocessing import decode_classes, decode_image
from dilformer_jax.data.subjects import Pair
from dilformer_jax.io.volumes import BadInput
from dilformer_jax.ops import slabs
from dilformer_jax.ops.slabs import Slabs
from dilformer_jax.training import parallel, synthesis

SHARE = 0.5  # of a device's memory, at most, for volumes: the rest is the step's
HOST_BYTES = 8 << 30  # for all devices together, where a device is part of the host and tells no limit
READERS = 4


@dataclass(frozen=True, eq=False)
class Resident:
    """A set of pairs whose volumes (subjects, D, H, W, 1), images or class maps of `data.synthesis`, are on every
    device; `rows` (pairs, 2) says which of them are the fixed and the moving one of each pair. Beside images, `labels`
    are their label maps as classes, where the loss looks at these."""

    volumes: Float[Array, "n d h w 1"] | UInt8[Array, "n d h w 1"]
    rows: Int[np.ndarray, "pairs 2"]
    labels: UInt8[Array, "n d h w 1"] | None = None


def upload(
    pairs: Sequence[Pair],
    preprocessing: Mapping[str, Any],
    shape: tuple[int, int, int],
    replicated: NamedSharding,
    *,
    classes: bool = False,
    ids: Sequence[int] = (),
) -> Resident:
    """Decodes each subject of the pairs once, its image or else the `classes` of its label map, and copies it to every
    device; `shape` is the images' common one. Given the `ids` of labels, their maps go beside the images.

    Raises BadInput where they do not fit into a device's memory beside the step, for files that cannot be read or have
    another shape, and for subjects without labels where these are asked for.
    """
    subjects = list(dict.fromkeys(subject for pair in pairs for subject in (pair.fixed, pair.moving)))
    place = {subject: row for row, subject in enumerate(subjects)}
    check_room(len(subjects), shape, jax.local_devices()[0])
    if ids and (bare := [subject for subject in subjects if subject.labels is None]):
        raise BadInput(f"{bare[0].image} has no label map, which loss.label_weight needs; add it or leave that out.")
    stack = np.empty((len(subjects), *shape, 1), np.uint8 if classes else np.float32)
    maps = np.empty((len(subjects) if ids else 0, *shape, 1), np.uint8)

    def read(row: int) -> None:
        subject = subjects[row]
        image = decode_classes(subject, preprocessing)[..., None] if classes else decode_image(subject, preprocessing)
        check_extent(image, shape, subject)
        stack[row] = image
        if ids:
            maps[row] = decode_classes(subject, preprocessing, ids)[..., None]

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, range(len(subjects))))
    rows = np.array([(place[pair.fixed], place[pair.moving]) for pair in pairs], np.int32)
    # Every process has read all of it: what each puts onto its own devices is the whole.
    placed = lambda array: jax.make_array_from_process_local_data(replicated, array, array.shape)
    return Resident(placed(stack), rows, placed(maps) if ids else None)


def check_room(count: int, shape: tuple[int, int, int], device: Any) -> None:
    """Raises BadInput where so many float32 volumes would leave the training step too little of the device's memory."""
    needed = count * 4 * int(np.prod(shape))
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        needed, room, where = needed * jax.local_device_count(), HOST_BYTES, "the host's memory"
    else:
        room, where = SHARE * limit, f"{device.device_kind}'s {limit / 1e9:.1f} GB"
    if needed > room:
        raise BadInput(
            f"data.cache='device' needs {needed / 1e9:.1f} GB for {count} volumes and may take {room / 1e9:.1f} GB of "
            f"{where}; set data.cache to a folder, from which the volumes are then read."
        )


def feeder(mesh: Mesh, split: Slabs | None = None, resident: Resident | None = None) -> Callable[..., dict[str, Array]]:
    """The function from a process's share of a batch, as `pipeline.batches` gives it, to {'fixed', 'moving'} on the
    devices, (b, D, H, W, 1) for the b examples of all processes, and padded with zeros along D where the volumes are
    split. It returns before the devices have done it.

    Of class maps it makes the images, and beside them {'fixed_clean', 'moving_clean', 'fixed_labels', 'moving_labels'}
    of the same shape, as `data.synthesis.rendered` says; of images that have label maps beside them these too.
    """
    made = assembly(mesh, split)

    def feed(batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        how: Any = {name: batch[name] for name in batch if name not in ("index", "fixed", "moving")}
        if resident is not None:
            how |= {"rows": resident.rows[batch["index"]]}
            return made(resident.volumes, resident.labels, {}, parallel.to_devices(how, mesh))
        images = parallel.to_devices({role: batch[role] for role in ("fixed", "moving")}, mesh)
        return made(None, None, images, parallel.to_devices(how, mesh))

    return feed


def assembly(mesh: Mesh, split: Slabs | None) -> Any:
    """The program behind `feeder`: (volumes, label maps or None, {}, numbers with 'rows') or (None, None, images,
    numbers) to the images.

    Each device makes its own examples from its own copy of the volumes, without a word to the others, and keeps its
    slab of them: an image is small beside its features.
    """
    rows = jax.P("data")

    @functools.partial(jax.jit, out_shardings=parallel.sharded(mesh))
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(jax.P(), jax.P(), rows, rows),
        out_specs=jax.P("data", "space"),
        check_vma=False,
    )
    def made(
        volumes: Array | None, labels: Array | None, images: dict[str, Array], how: dict[str, Array]
    ) -> dict[str, Array]:
        # A gather would do the same; XLA's for the CPU takes each voxel by itself.
        row = lambda stack, index: lax.dynamic_index_in_dim(stack, index, keepdims=False)
        taken = lambda stack, column: jnp.stack([row(stack, index) for index in how["rows"][:, column]])
        if volumes is not None:
            images = {"fixed": taken(volumes, 0), "moving": taken(volumes, 1)}
        if labels is not None:
            images |= {"fixed_labels": taken(labels, 0), "moving_labels": taken(labels, 1)}
        flips = how.get("flips")
        if "key" in how:
            images = synthesis.rendered(images["fixed"], images["moving"], how)
        elif "affine" in how:
            flips = jnp.zeros((len(how["affine"]), 3), bool) if flips is None else flips
            maps = {"fixed": how["affine"][:, 0], "moving": how["affine"][:, 1]}
            images = {
                name: (relabelled if name.endswith("_labels") else resampled)(x, flips, maps[name.split("_")[0]])
                for name, x in images.items()
            }
        elif flips is not None:
            images = {role: flipped(image, flips) for role, image in images.items()}
        if "power" in how:
            images |= {
                role: powered(images[role], how["power"][:, place]) for place, role in enumerate(("fixed", "moving"))
            }
        with slabs.split(split):
            return {role: slabs.own(image) for role, image in images.items()}

    return made


def shapes(image: jax.ShapeDtypeStruct, *, made: bool, labelled: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """What `feeder` gives, in images of this shape; `made` from class maps or not, with label maps beside or not."""
    kinds = {"": jnp.float32} | ({"_clean": jnp.float32} if made else {}) | ({"_labels": jnp.uint8} if labelled else {})
    return {
        f"{role}{kind}": jax.ShapeDtypeStruct(image.shape, dtype, sharding=image.sharding)
        for kind, dtype in kinds.items()
        for role in ("fixed", "moving")
    }


def flipped(image: Float[Array, "b d h w 1"], flips: Bool[Array, "b 3"]) -> Float[Array, "b d h w 1"]:
    """Each image with the axes reversed that its row names."""
    for axis in range(3):
        image = jnp.where(flips[:, axis, None, None, None, None], jnp.flip(image, axis + 1), image)
    return image


def powered(image: Float[Array, "b d h w 1"], power: Float[Array, " b"]) -> Float[Array, "b d h w 1"]:
    """Each image with its intensities raised to its power, negative ones by their size."""
    return jnp.sign(image) * jnp.abs(image) ** power[:, None, None, None, None]


@jax.vmap
def resampled(
    image: Float32[Array, "d h w 1"], flips: Bool[Array, "3"], affine: Float32[Array, "3 4"]
) -> Float32[Array, "d h w 1"]:
    """Each image of a batch, `flipped`, then read trilinearly at x + A (x - centre) + t, (A | t) being `affine`; 0
    beyond the outermost voxels' centres, as in `scipy.ndimage.affine_transform(order=1)`. No axis is a single voxel.

    It is written out because `ops.spatial.warp` along a displacement of the same numbers takes nine times as long on
    two CPU cores.
    """
    shape = image.shape[:3]
    away = [jnp.expand_dims(jnp.arange(n, dtype=jnp.float32) - (n - 1) / 2, [a for a in range(3) if a != axis])
            for axis, n in enumerate(shape)]  # fmt: skip
    first, inside, fraction = jnp.int32(0), jnp.bool_(True), []
    for axis, n in enumerate(shape):
        # Read from the other end: flips made before would be fused into each of the eight reads by XLA for the CPU.
        sign = jnp.where(flips[axis], -1.0, 1.0)
        u = sign * (affine[axis, 3] + sum(affine[axis, other] * away[other] for other in range(3)))
        # Of u by itself, and not of x + u, which has fewer digits left for the fraction.
        whole = jnp.floor(u)
        low = whole + (sign * away[axis] + (n - 1) / 2)
        inside &= (low >= 0) & ((low < n - 1) | ((low == n - 1) & (u == whole)))
        corner = jnp.clip(low, 0, n - 2)
        fraction.append(u - whole + (low - corner))
        first = first * n + corner.astype(jnp.int32)
    # What is outside reads the first voxel, whatever its coordinates are.
    first, voxels = jnp.where(inside, first, 0), image.reshape(-1)

    def between(axis: int, offset: int) -> Float32[Array, "d h w"]:
        """Interpolated along this axis and those after it, `offset` voxels further than the first corner."""
        if axis == 3:
            return voxels.at[first + offset].get(mode="promise_in_bounds")
        low, high = between(axis + 1, offset), between(axis + 1, offset + math.prod(shape[axis + 1 :]))
        return low + fraction[axis] * (high - low)

    return jnp.where(inside, between(0, 0), 0)[..., None]


@jax.vmap
def relabelled(
    labels: UInt8[Array, "d h w 1"], flips: Bool[Array, "3"], affine: Float32[Array, "3 4"]
) -> UInt8[Array, "d h w 1"]:
    """The label nearest to where `resampled` reads each voxel; 0 beyond the volume's faces."""
    shape = labels.shape[:3]
    away = [jnp.expand_dims(jnp.arange(n, dtype=jnp.float32) - (n - 1) / 2, [a for a in range(3) if a != axis])
            for axis, n in enumerate(shape)]  # fmt: skip
    place, inside = jnp.int32(0), jnp.bool_(True)
    for axis, n in enumerate(shape):
        reached = away[axis] + affine[axis, 3] + sum(affine[axis, other] * away[other] for other in range(3))
        voxel = jnp.round(jnp.where(flips[axis], -1.0, 1.0) * reached + (n - 1) / 2).astype(jnp.int32)
        inside &= (voxel >= 0) & (voxel < n)
        place = place * n + voxel
    found = labels.reshape(-1).at[jnp.where(inside, place, 0)].get(mode="promise_in_bounds")
    return jnp.where(inside, found, 0)[..., None]
