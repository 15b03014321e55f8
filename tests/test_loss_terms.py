"""What a loss may have beside similarity and roughness, against SciPy and loops."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from dilformer_jax.ops import losses, regularisers, similarities

PLAIN: dict[str, Any] = {
    "finest": 0,
    "weights": (1.0, 0.5, 0.25),
    "windows": (5, 3, 3),
    "similarity": "mse",
    "border": "cut",
    "regulariser": "diffusion",
    "regulariser_weight": 2.0,
}


def smooth(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """(*shape, 3), of about so many voxels."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(*shape, 3)), (2, 2, 2, 0))
    return (noise * scale / noise.std()).astype(np.float32)


def brains(batch: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Blobs (b, 16, 16, 16, 1), 0 around them."""
    rng = np.random.default_rng(3)
    x = ndimage.gaussian_filter(rng.normal(size=(2 * batch, 16, 16, 16)), (0, 1, 1, 1))
    distance = np.linalg.norm(np.moveaxis(np.indices((16, 16, 16)), 0, -1) - 7.5, axis=-1)
    inside = (distance < 5) | ((distance < 6) & (x > 0))
    x = np.where(inside, x - x.min() + 0.1, 0).astype(np.float32)[..., None]
    return x[:batch], x[batch:]


def test_inverse_inconsistency_is_what_is_left_of_a_point_carried_there_and_back():
    pair = np.stack([smooth(9, 8, 10, seed=1), smooth(9, 8, 10, seed=2)])
    points = np.moveaxis(np.indices((9, 8, 10)), 0, -1)
    squares = []
    for u, v in (pair, pair[::-1]):
        places = np.moveaxis(points + v, -1, 0)
        left = [ndimage.map_coordinates(u[..., a], places, order=1, mode="nearest") + v[..., a] for a in range(3)]
        squares.append(np.square(left).sum(axis=0).mean())
    assert regularisers.inverse_inconsistency(jnp.asarray(pair)) == pytest.approx(np.mean(squares), rel=1e-4)
    there = np.broadcast_to(np.float32([1.5, -2, 0.5]), (9, 8, 10, 3))
    assert regularisers.inverse_inconsistency(jnp.stack([there, -there])) == pytest.approx(0, abs=1e-10)
    assert regularisers.inverse_inconsistency(jnp.stack([there, there])) == pytest.approx(4 * 6.5, rel=1e-6)


def test_lncc_of_some_voxels_is_the_mean_of_theirs():
    rng = np.random.default_rng(0)
    fixed, moved = rng.uniform(size=(2, 6, 5, 7))
    where = rng.uniform(size=fixed.shape) < 0.3
    values = []
    for i, j, k in np.argwhere(where):
        window = tuple(slice(max(0, n - 1), n + 2) for n in (i, j, k))
        f, m = (x[window] - x[window].mean() for x in (fixed, moved))
        values.append((f * m).sum() ** 2 / ((f * f).sum() * (m * m).sum() + 1e-5))
    images = (jnp.asarray(x[..., None], jnp.float32) for x in (fixed, moved))
    assert similarities.lncc(*images, 3, where=jnp.asarray(where[..., None])) == pytest.approx(
        np.mean(values), rel=1e-4
    )


def test_terms_of_the_multi_resolution_loss_add_up():
    """Each against the plain loss: levels that have not joined yet weigh nothing, or half."""
    fixed, moving = brains()
    fields = [np.stack([smooth(n, n, n, seed=s, scale=0.7) for s in range(4)]) for n in (16, 8, 4)]
    both = [np.concatenate([fixed, moving]), np.concatenate([moving, fixed])]
    loss = jax.jit(
        lambda progress: {
            name: losses.multi_resolution(*jax.tree.map(jnp.asarray, (*both, fields)), **{**PLAIN, **options})
            for name, options in {
                "plain": {},
                "coarsest": {"weights": (0.0, 0.0, 0.25)},
                "between": {"weights": (0.0, 0.25, 0.25)},
                "joining": {"coarse_to_fine": 0.4, "progress": progress},
                "inverse": {"inverse_weight": 0.3},
                "lncc": {"similarity": "lncc"},
                "foreground": {"similarity": "lncc", "foreground": True},
            }.items()
        }
    )
    start, quarter, joined, late = (loss(jnp.float32(progress)) for progress in (0.0, 0.1, 0.4, 0.9))
    assert start["joining"][0] == pytest.approx(float(start["coarsest"][0]), rel=1e-5)
    assert quarter["joining"][0] == pytest.approx(float(start["between"][0]), rel=1e-5)
    for there in (joined, late):
        assert there["joining"][0] == pytest.approx(float(start["plain"][0]), rel=1e-5)
    assert abs(start["plain"][0] - start["between"][0]) > 0.2 * start["plain"][0]
    total, parts = start["inverse"]
    assert parts["inconsistency"] == pytest.approx(
        float(regularisers.inverse_inconsistency(jnp.asarray(fields[0]))), rel=1e-5
    )
    assert total == pytest.approx(float(start["plain"][0] + 0.3 * parts["inconsistency"]), rel=1e-5)
    # Of the mean over all voxels only those where the fixed image is not 0, at each level by itself.
    alike, image, other = 0.0, *both
    for level, (weight, window) in enumerate(zip(PLAIN["weights"], PLAIN["windows"], strict=True)):
        if level:
            image, other = (
                x.reshape(4, *(v for n in x.shape[1:4] for v in (n // 2, 2)), 1).mean((2, 4, 6)) for x in (image, other)
            )
        moved = np.stack([
            ndimage.map_coordinates(
                x[..., 0], np.indices(x.shape[:3]) + np.moveaxis(u, -1, 0), order=1, mode="nearest"
            )
            for x, u in zip(other, fields[level], strict=True)
        ])[..., None].astype(np.float32)  # fmt: skip
        alike += weight * float(
            similarities.lncc(*map(jnp.asarray, (image, moved)), window, where=jnp.asarray(image > 0))
        )
    assert start["foreground"][1]["similarity"] == pytest.approx(alike, rel=1e-4)
    assert alike > 1.1 * start["lncc"][1]["similarity"]


def test_levels_join_in_a_part_of_the_run():
    with pytest.raises(ValueError, match="a part of the run, 0 to 1, got 1.5"):
        images = jax.tree.map(jnp.asarray, brains())
        losses.multi_resolution(*images, [jnp.zeros((2, 16, 16, 16, 3))], **{**PLAIN, "coarse_to_fine": 1.5})
    with pytest.raises(ValueError, match="foreground is of the similarity 'lncc', not of 'mse'"):
        losses.multi_resolution(*images, [jnp.zeros((2, 16, 16, 16, 3))], **{**PLAIN, "foreground": True})
