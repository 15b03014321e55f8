"""The images of `data.synthesis` on the devices, as a part of what `training.feeding` compiles."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt8

from dilformer_jax.data import synthesis

NUMBERS = (
    "elastic", "bias", "means", "deviations", "curve", "sigma", "spacing", "strip", "surroundings", "soft", "noise",
    "gamma", "kept",
)  # fmt: skip


def rendered(
    fixed: UInt8[Array, "b d h w 1"], moving: UInt8[Array, "b d h w 1"], numbers: Mapping[str, Array]
) -> dict[str, Array]:
    """'fixed' and 'moving', (b, d, h, w, 1) float32, of class maps, with '_clean' and '_labels' of each, by the numbers
    of a batch: (b, 2, ...) each, as `data.synthesis.drawn` gives them, with 'affine' and 'flips' where there are any.

    The noise of an image follows from the pair's key alone, on every backend.
    """
    maps = jnp.stack([fixed, moving], axis=1)[..., 0]
    b, _, *shape = maps.shape
    flips = numbers["flips"] if "flips" in numbers else jnp.zeros((b, 3), bool)
    affine = numbers["affine"] if "affine" in numbers else jnp.zeros((b, 2, 3, 4))

    def one(case):
        which, role = case
        of = {name: numbers[name][which, role] for name in NUMBERS}
        white = jax.random.normal(
            jax.random.fold_in(jax.random.wrap_key_data(numbers["key"][which]), role), (2, *shape)
        )
        # Coordinates need all their digits, which a GPU's matrix products would cut to ten bits.
        with jax.default_matmul_precision("highest"):
            return synthesis.rendered(jnp, maps[which, role], of, affine[which, role], flips[which], white)

    # One after the other: one program for all, and the memory of one.
    made = lax.map(one, (jnp.repeat(jnp.arange(b), 2), jnp.tile(jnp.arange(2), b)))
    pairs = {name: x.reshape(b, 2, *shape, 1) for name, x in made.items()}
    names = {"image": "", "clean": "_clean", "labels": "_labels"}
    return {
        f"{role}{names[name]}": x[:, place]
        for name, x in pairs.items()
        for place, role in enumerate(("fixed", "moving"))
    }
