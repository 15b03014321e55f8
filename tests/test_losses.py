"""The loss of a pyramid against the sum of its terms, by NumPy and loops."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_terms_by_hand import SHAPE, compiled, image, lncc_by_loop, points
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax.ops import losses, regularisers, similarities


def halved(volume: np.ndarray) -> np.ndarray:
    """2x2x2 means of (d, h, w, c): what a linear zoom by half samples, between the voxels."""
    return np.mean([volume[i::2, j::2, k::2] for i, j, k in itertools.product((0, 1), repeat=3)], axis=0)


def enlarged(u: np.ndarray) -> np.ndarray:
    """A displacement one level up: half-pixel linear, its vectors doubled."""
    zoom = lambda component: ndimage.zoom(component, 2, order=1, mode="nearest", grid_mode=True)
    return 2 * np.stack([zoom(u[..., a]) for a in range(3)], axis=-1)


def warped(volume: np.ndarray, u: np.ndarray) -> np.ndarray:
    coordinates = np.moveaxis(points(u.shape[:3]) + u, -1, 0)
    return ndimage.map_coordinates(volume[..., 0], coordinates, order=1, mode="nearest")


def diffusion_by_numpy(u: np.ndarray) -> float:
    return float(np.mean([(np.diff(u, axis=axis) ** 2).mean() for axis in range(3)]))


def bending_by_numpy(u: np.ndarray) -> float:
    """Stencils applied by SciPy, inner voxels only."""
    second, central, energy = np.array([1, -2, 1]), np.array([-0.5, 0, 0.5]), 0.0
    for a, b in itertools.product(range(3), repeat=2):
        if a == b:
            derivative = ndimage.correlate1d(u, second, axis=a)
        else:
            derivative = ndimage.correlate1d(ndimage.correlate1d(u, central, axis=a), central, axis=b)
        energy += (derivative[1:-1, 1:-1, 1:-1] ** 2).mean()
    return float(energy)


def displacements_of(levels: list[tuple[int, int, int]]) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    smooth = lambda shape: ndimage.gaussian_filter(rng.normal(size=(*shape, 3)), (1, 1, 1, 0)) * 4
    return [np.stack([smooth(shape), smooth(shape)]) for shape in levels]


def test_multi_resolution_is_the_sum_of_its_levels():
    """Three levels of weights, displacements at two: from the input's resolution, below it, and from a coarser one."""
    shape = (8, 12, 8)
    at = lambda level: tuple(n // 2**level for n in shape)
    fixed, moving = image(2, *shape, 1), image(2, *shape, 1, seed=1)
    lncc: dict[str, Any] = {"similarity": "lncc", "border": "cut", "windows": (5, 3), "weights": (1.0, 0.5)}
    cases: list[tuple[list, int, dict[str, Any]]] = [
        ([at(0), at(1)], 0, lncc | {"regulariser": "diffusion", "regulariser_weight": 2.0}),
        ([at(1)], 0, lncc | {"border": "zeros", "regulariser": "bending", "regulariser_weight": 0.5}),
        ([at(1)], 1, {"similarity": "mse", "border": "cut", "windows": (3,), "weights": (0.7,)}
         | {"regulariser": "diffusion", "regulariser_weight": 0.1}),
    ]  # fmt: skip
    fields = [displacements_of(levels) for levels, _, _ in cases]
    every = lambda fixed, moving, fields: [
        losses.multi_resolution(fixed, moving, field, finest=finest, **options)
        for field, (_, finest, options) in zip(fields, cases, strict=True)
    ]
    for (total, parts), field, (_, finest, options) in zip(
        compiled(every, fixed, moving, fields), fields, cases, strict=True
    ):
        similarity, regulariser = 0.0, 0.0
        for level, (weight, window) in enumerate(zip(options["weights"], options["windows"], strict=True), finest):
            for b in range(2):
                f, m = fixed[b], moving[b]
                for _ in range(level):
                    f, m = halved(f), halved(m)
                own = [u[b] for u in field if u.shape[1:4] == at(level)]
                u = own[0] if own else enlarged(field[0][b])
                f, m = f[..., 0], warped(m, u)
                lncc_here = lambda f, m, window=window, border=options["border"]: lncc_by_loop(f, m, window, border)
                alike = lncc_here(f, m) if options["similarity"] == "lncc" else ((f - m) ** 2).mean()
                rough = {"diffusion": diffusion_by_numpy, "bending": bending_by_numpy}[options["regulariser"]](u)
                # Means over the batch.
                similarity += weight * alike / 2
                regulariser += weight * options["regulariser_weight"] * rough / 2
        sign = -1 if options["similarity"] == "lncc" else 1
        assert set(parts) == {"similarity", "regulariser"}
        assert parts["similarity"] == pytest.approx(similarity, rel=2e-4), options
        assert parts["regulariser"] == pytest.approx(regulariser, rel=2e-4), options
        assert total == pytest.approx(sign * similarity + regulariser, rel=5e-4), options


def test_losses_of_bfloat16_are_computed_in_float32():
    maps, u = image(2, *SHAPE, 1), np.random.default_rng(2).normal(size=(2, *SHAPE, 3))
    every = lambda f, m, u: [
        similarities.lncc(f, m, 3),
        similarities.mse(f, m),
        similarities.soft_dice(f, m),
        regularisers.diffusion(u),
        regularisers.bending(u),
    ]
    coarse = [jnp.asarray(x, jnp.bfloat16) for x in (maps, image(2, *SHAPE, 1, seed=1), u)]
    fine = [x.astype(jnp.float32) for x in coarse]
    values, expected = jax.jit(lambda coarse, fine: (every(*coarse), every(*fine)))(coarse, fine)
    assert all(value.dtype == jnp.float32 for value in values)
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_losses_refuse_unknown_options(unchecked):
    pair = (jnp.zeros((1, 4, 4, 4, 1)),) * 2
    options: dict[str, Any] = {
        "finest": 0,
        "weights": (1.0,),
        "windows": (3,),
        "similarity": "mse",
        "regulariser": "diffusion",
        "regulariser_weight": 1.0,
        "border": "cut",
    }
    wrongs: tuple[tuple[dict[str, Any], str], ...] = (
        ({"similarity": "ssim"}, "got 'ssim'"),
        ({"regulariser": "none"}, "got 'none'"),
        ({"windows": (5, 3)}, "got 1 weights and 2 windows"),
        ({"finest": -1}, "or coarser, got -1"),
    )
    for wrong, sentence in wrongs:
        with pytest.raises(ValueError, match=sentence):
            losses.multi_resolution(*pair, [jnp.zeros((1, 4, 4, 4, 3))], **(options | wrong))
