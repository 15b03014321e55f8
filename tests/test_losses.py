"""Losses against loops over windows in float64, hand-made answers, and fields whose derivatives are known."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax.ops import losses

SHAPE = (7, 6, 5)


@pytest.fixture
def unchecked():
    """The functions as users have them, without the test run's shape checks in front of their own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def single(array: Any) -> jax.Array:
    return jnp.asarray(array, jnp.float32)


def compiled(function: Callable, *operands: Any) -> Any:
    """What one program gives for float32 operands, as NumPy arrays."""
    return jax.tree.map(np.asarray, jax.jit(function)(*jax.tree.map(single, operands)))


def image(*shape: int, seed: int = 0) -> np.ndarray:
    """Random intensities from 0 to 1, exact in float32."""
    return np.random.default_rng(seed).random(shape).astype(np.float32).astype(np.float64)


def points(shape: tuple[int, ...]) -> np.ndarray:
    return np.moveaxis(np.indices(shape, np.float64), 0, -1)


# --- similarity ---


def lncc_by_loop(fixed: np.ndarray, moved: np.ndarray, window: int, border: str, epsilon: float = 1e-5) -> float:
    """The definition, a window at a time, for volumes (d, h, w)."""
    reach = window // 2
    if border == "zeros":
        fixed, moved = np.pad(fixed, reach), np.pad(moved, reach)
    centres = [range(reach, n - reach) if border == "zeros" else range(n) for n in fixed.shape]
    total, count = 0.0, 0
    for centre in itertools.product(*centres):
        around = tuple(slice(max(c - reach, 0), c + reach + 1) for c in centre)
        f, m = (volume[around] - volume[around].mean() for volume in (fixed, moved))
        total += (f * m).sum() ** 2 / ((f**2).sum() * (m**2).sum() + epsilon)
        count += 1
    return total / count


@pytest.mark.parametrize("border", ["cut", "zeros"])
def test_lncc_and_its_gradient_equal_a_loop(border):
    fixed, noise = image(*SHAPE), image(*SHAPE, seed=1)
    moved = 0.5 * fixed**2 + 0.5 * noise
    windows = (3, 5, 9)  # the last is larger than the volume
    every = lambda fixed, moved: [losses.lncc(fixed, moved, window, border=border) for window in windows]
    slopes = lambda fixed, moved: jax.grad(
        lambda fixed, moved: losses.lncc(fixed, moved, 3, border=border, epsilon=0.01), (0, 1)
    )(fixed, moved)
    values, (to_fixed, to_moved) = compiled(
        lambda f, m: (every(f, m), slopes(f, m)), fixed[..., None], moved[..., None]
    )
    for window, value in zip(windows, values, strict=True):
        expected = lncc_by_loop(fixed, moved, window, border)
        assert 0.05 < expected < 0.9
        assert value == pytest.approx(expected, abs=1e-5), window
    for voxel in ((0, 0, 0), (3, 2, 1), (6, 5, 4), (0, 3, 4), (2, 5, 2), (4, 4, 3)):
        step = np.zeros(SHAPE)
        step[voxel] = 1e-5
        by_loop = lambda f, m: lncc_by_loop(f, m, 3, border, 0.01)
        for gradient, rise in (
            (to_fixed, by_loop(fixed + step, moved) - by_loop(fixed - step, moved)),
            (to_moved, by_loop(fixed, moved + step) - by_loop(fixed, moved - step)),
        ):
            assert gradient[(*voxel, 0)] == pytest.approx(rise / 2e-5, abs=2e-5), voxel


def test_lncc_is_one_of_an_image_with_itself_and_blind_to_scale_and_offset():
    fixed, moved = image(2, *SHAPE, 1), image(2, *SHAPE, 1, seed=1)
    alike = lambda f, m: losses.lncc(f, m, 3)
    itself, negative, pair, swapped, brighter, darker = compiled(
        lambda f, m: [
            alike(f, f),
            alike(f, 1 - f),
            alike(f, m),
            alike(m, f),
            alike(f, 3 * m + 2),
            alike(2 - 4 * f, m),
        ],
        fixed,
        moved,
    )
    np.testing.assert_allclose([itself, negative], 1, atol=1e-4)
    assert pair < 0.2
    np.testing.assert_allclose([swapped, brighter, darker], pair, atol=1e-4)
    # The mean over the batch.
    assert pair == pytest.approx(
        np.mean([lncc_by_loop(fixed[b, ..., 0], moved[b, ..., 0], 3, "cut") for b in range(2)]), abs=1e-4
    )


@pytest.mark.parametrize("border", ["cut", "zeros"])
def test_lncc_survives_a_large_offset(border):
    """Uncentred, window sums of squares near a million would leave nothing of a variance of 1."""
    near = image(12, 13, 14), image(12, 13, 14, seed=1)
    near = near[0], 0.5 * near[0] + 0.5 * near[1]
    # As float32 holds them, for the loop as well.
    far = tuple(np.asarray(x + 1000, np.float32).astype(np.float64) for x in near)
    every = lambda f, m: [losses.lncc(f, m, window, border=border) for window in (5, 9)]
    slope = lambda f, m: jax.grad(lambda m: losses.lncc(f, m, 5, border=border))(m)
    values, gradient = compiled(lambda f, m: (every(f, m), slope(f, m)), *(x[..., None] for x in far))
    for window, value in zip((5, 9), values, strict=True):
        expected = lncc_by_loop(far[0], far[1], window, border)
        assert value == pytest.approx(expected, abs=1e-4 * expected), window
    if border == "cut":
        unmoved = compiled(lambda f, m: (losses.lncc(f, m, 5), slope(f, m)), *(x[..., None] for x in near))
        assert values[0] == pytest.approx(unmoved[0], abs=1e-3)
        np.testing.assert_allclose(gradient, unmoved[1], atol=2e-3 * np.abs(unmoved[1]).max())


def test_lncc_of_what_is_no_number_is_none():
    """It counts for nothing where an image is constant, which must not hide a run that has gone astray."""
    image = np.random.default_rng(0).random((1, 6, 6, 6, 1)).astype(np.float32)
    for wrong in (np.nan, np.inf):
        astray = image.copy()
        astray[0, 2, 3, 4, 0] = wrong
        whole, other = jnp.asarray(image), jnp.asarray(astray)
        assert np.isnan(losses.lncc(whole, other, 3)) and np.isnan(losses.lncc(other, whole, 3))


def test_lncc_of_constant_images_is_zero_with_a_finite_gradient():
    textured, black = image(*SHAPE, 1), np.zeros((*SHAPE, 1))
    pairs = [(black, black), (black + 0.7, textured), (textured, black + 0.7), (black + 0.3, black + 0.9)]
    each = jax.vmap(jax.value_and_grad(lambda f, m: losses.lncc(f, m, 3), (0, 1)))
    values, gradients = compiled(each, *(np.stack(images) for images in zip(*pairs, strict=True)))
    assert ((values >= 0) & (values < 1e-6)).all(), values
    assert np.isfinite(gradients[0]).all() and np.isfinite(gradients[1]).all()
    # A brain in a black background: only its own windows count.
    brain = np.zeros((12, 12, 12, 1))
    brain[4:8, 4:8, 4:8] = image(4, 4, 4, 1)
    value, gradient = compiled(jax.value_and_grad(lambda m: losses.lncc(m, m, 3)), brain)
    assert value == pytest.approx(lncc_by_loop(brain[..., 0], brain[..., 0], 3, "cut"), abs=1e-4)
    assert value < (6 / 12) ** 3
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("border", ["cut", "zeros"])
def test_lncc_does_not_take_rounding_for_structure(border):
    """In intensities of thousands the rounding of a constant window's variance is far above epsilon."""
    brain = np.full((24, 24, 24, 1), 0.2)
    brain[8:16, 8:16, 8:16] += image(8, 8, 8, 1)
    moved = 0.9 * np.roll(brain, 1, 0)
    small, large, thousands = compiled(
        lambda f, m: [losses.lncc(scale * f, scale * m, 9, border=border) for scale in (1.0, 255.0, 4000.0)],
        brain,
        moved,
    )
    assert small == pytest.approx(lncc_by_loop(brain[..., 0], moved[..., 0], 9, border), abs=1e-4)
    np.testing.assert_allclose([large, thousands], small, atol=1e-3)


@pytest.mark.parametrize(("radius", "distance"), [(1, 1), (0, 2)])
def test_self_similarity_is_that_of_a_loop(radius, distance):
    """Patch by patch, in float64, the twelve pairs in any order: each of ours is one of the loop's."""
    volume = image(5, 4, 6) + np.indices((5, 4, 6))[0]  # noisy below, and sloped
    reach = radius + distance
    wide = np.pad(volume, reach, mode="edge")
    sides = [sign * distance * axis for axis in np.eye(3, dtype=int) for sign in (-1, 1)]
    pairs = [(a, b) for a, b in itertools.combinations(sides, 2) if a @ b == 0]

    def patch(centre):
        return wide[tuple(slice(c + reach - radius, c + reach + radius + 1) for c in centre)]

    apart = np.array([
        [((patch(voxel + a) - patch(voxel + b)) ** 2).mean() for a, b in pairs] for voxel in np.ndindex(volume.shape)
    ])  # fmt: skip
    noise = apart.mean(1, keepdims=True)
    noise = np.clip(noise, 1e-3 * noise.mean(), 1e3 * noise.mean())
    expected = np.exp(-(apart - apart.min(1, keepdims=True)) / noise).reshape(*volume.shape, 12)
    every = lambda x: [losses.self_similarity(scale * x, radius=radius, distance=distance) for scale in (1.0, 700.0)]
    found, brighter = compiled(every, np.stack([volume, volume[::-1]])[..., None])
    order = [np.abs(expected - found[0, ..., i : i + 1]).max((0, 1, 2)).argmin() for i in range(12)]
    assert sorted(order) == list(range(12))
    np.testing.assert_allclose(found[0], expected[..., order], atol=1e-5)
    np.testing.assert_allclose(brighter, found, atol=1e-4)
    np.testing.assert_allclose(np.sort(found[1]), np.sort(found[0, ::-1]), atol=1e-5)


def test_mind_is_blind_to_what_is_dark_and_what_is_bright():
    fixed = ndimage.gaussian_filter(image(12, 13, 14), 1)
    moved = np.roll(fixed, 2, 0)
    negative, constant, aside, difference = compiled(
        lambda f, m: [
            losses.mind(f, 1 - 3 * f),
            losses.mind(0 * f, 0 * f + 1),
            losses.mind(f, m),
            ((losses.self_similarity(f) - losses.self_similarity(m)) ** 2).mean(),
        ],
        fixed[..., None],
        moved[..., None],
    )
    assert negative == pytest.approx(0, abs=1e-6) and constant == 0
    assert aside == pytest.approx(difference, rel=1e-5) and aside > 0.02


def test_mse():
    fixed, moved = image(2, *SHAPE, 2), image(2, *SHAPE, 2, seed=1)
    value, apart, gradient = compiled(
        lambda f, m: [losses.mse(f, m), losses.mse(f, f - 3), jax.grad(losses.mse)(f, m)], fixed, moved
    )
    assert value == pytest.approx(((fixed - moved) ** 2).mean(), rel=1e-5)
    assert apart == pytest.approx(9, rel=1e-5)
    np.testing.assert_allclose(gradient, 2 * (fixed - moved) / fixed.size, atol=1e-8)


def test_soft_dice_by_hand():
    """Label 0: 4 voxels and 2, both of them shared: 2·2 / (4 + 2). Label 1: half sure of 8 of 8. Label 2: apart."""
    fixed, moved = np.zeros((4, 4, 2, 3)), np.zeros((4, 4, 2, 3))
    fixed[0, :, 0, 0], moved[0, :2, 0, 0] = 1, 1
    fixed[1, :, :, 1], moved[1, :, :, 1] = 1, 0.5
    fixed[2, 0, 0, 2], moved[3, 0, 0, 2] = 1, 1
    dice = [2 * 2 / (4 + 2), 2 * 8 * 0.5 / (8 + 8 * 0.25), 0]
    one, batch = compiled(
        lambda f, m: [losses.soft_dice(f, m), losses.soft_dice(jnp.stack([f, f]), jnp.stack([m, f]))], fixed, moved
    )
    assert one == pytest.approx(np.mean(dice), abs=1e-5)
    assert batch == pytest.approx((np.mean(dice) + 1) / 2, abs=1e-5)


# --- smoothness ---

GRADIENT = np.array([[0.5, -0.2, 0.1], [0.0, 0.3, -0.4], [0.7, 0.0, 0.2]])
# u_i = x^T H_i x / 2: second derivatives are the entries of H_i.
HESSIANS = np.array([np.diag([0.1, -0.2, 0.3]), [[0, 0.2, 0], [0.2, 0, -0.1], [0, -0.1, 0]], 0.05 * np.ones((3, 3))])


def linear(shape: tuple[int, ...]) -> np.ndarray:
    return points(shape) @ GRADIENT.T + 2.0


def quadratic(shape: tuple[int, ...]) -> np.ndarray:
    x = points(shape)
    return np.einsum("...a,iab,...b->...i", x, HESSIANS, x) / 2


def test_diffusion_of_voxels_that_are_no_cubes():
    size = np.array([1.0, 2.0, 4.0])
    found = losses.diffusion(jnp.asarray(linear(SHAPE)), jnp.asarray(size, jnp.float32))
    assert found == pytest.approx(((GRADIENT * size[:, None] / size) ** 2).mean(), rel=1e-5)


def test_bending_of_voxels_that_are_no_cubes():
    size = np.array([1.0, 2.0, 4.0])
    found = losses.bending(jnp.asarray(quadratic(SHAPE)), jnp.asarray(size, jnp.float32))
    expected = (HESSIANS * size[:, None, None] / size[:, None] / size) ** 2
    assert found == pytest.approx(expected.sum((1, 2)).mean(), rel=1e-4)


def test_diffusion_of_known_fields():
    ramp, curve = linear(SHAPE), quadratic(SHAPE)
    still, sloped, batch, curved, noisy = compiled(
        lambda ramp, curve, noise: [
            losses.diffusion(jnp.full_like(ramp, 3)),
            losses.diffusion(ramp),
            losses.diffusion(jnp.stack([ramp, 3 * ramp])),
            losses.diffusion(curve),
            losses.diffusion(noise),
        ],
        ramp,
        curve,
        image(*SHAPE, 3),
    )
    assert still == 0
    # The mean over the nine components of the gradient.
    assert sloped == pytest.approx((GRADIENT**2).mean(), rel=1e-5)
    assert batch == pytest.approx(5 * (GRADIENT**2).mean(), rel=1e-5)
    # Forward differences of the parabola: its slope halfway to the next voxel, h (x + 1/2).
    halfway = 0.0
    for axis in range(3):
        inner = points(SHAPE)[tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))]
        inner = inner + 0.5 * np.eye(3)[axis]
        halfway += (np.einsum("ib,...b->...i", HESSIANS[:, axis], inner) ** 2).mean() / 3
    assert curved == pytest.approx(halfway, rel=1e-4)
    assert noisy == pytest.approx(
        np.mean([(np.diff(image(*SHAPE, 3), axis=a) ** 2).mean() for a in range(3)]), rel=1e-5
    )


def test_bending_of_known_fields():
    straight, curved, batch, gradient = compiled(
        lambda ramp, curve: [
            losses.bending(ramp),
            losses.bending(curve),
            losses.bending(jnp.stack([ramp, 2 * curve])),
            jax.grad(losses.bending)(ramp),
        ],
        linear(SHAPE),
        quadratic(SHAPE),
    )
    # Σ over a, b of (d²u / da db)², mixed ones twice, the mean over the three components.
    expected = (HESSIANS**2).sum((1, 2)).mean()
    assert straight == pytest.approx(0, abs=1e-8)
    assert curved == pytest.approx(expected, rel=1e-4)
    assert batch == pytest.approx(2 * expected, rel=1e-4)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_bending_looks_no_further_than_the_neighbours():
    """One voxel moved by 1, far from the faces: 1, -2, 1 along each axis and ±1/4 at the corners of each plane."""
    u = np.zeros((9, 9, 9, 3))
    u[4, 4, 4, 1] = 1
    expected = (3 * (1 + 4 + 1) + 2 * 3 * 4 / 16) / (7**3 * 3)
    assert compiled(losses.bending, u) == pytest.approx(expected, rel=1e-5)


# --- the loss of a pyramid ---


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


def test_regularisers_refuse_an_axis_too_short_to_differ_along(unchecked):
    with pytest.raises(ValueError, match="two voxels an axis"):
        losses.diffusion(jnp.ones((4, 1, 4, 3)))
    with pytest.raises(ValueError, match="three voxels an axis"):
        losses.bending(jnp.ones((4, 4, 2, 3)))


def test_losses_of_bfloat16_are_computed_in_float32():
    maps, u = image(2, *SHAPE, 1), np.random.default_rng(2).normal(size=(2, *SHAPE, 3))
    every = lambda f, m, u: [
        losses.lncc(f, m, 3),
        losses.mse(f, m),
        losses.soft_dice(f, m),
        losses.diffusion(u),
        losses.bending(u),
    ]
    coarse = [jnp.asarray(x, jnp.bfloat16) for x in (maps, image(2, *SHAPE, 1, seed=1), u)]
    fine = [x.astype(jnp.float32) for x in coarse]
    values, expected = jax.jit(lambda coarse, fine: (every(*coarse), every(*fine)))(coarse, fine)
    assert all(value.dtype == jnp.float32 for value in values)
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_losses_refuse_unknown_options(unchecked):
    pair = (jnp.zeros((1, 4, 4, 4, 1)),) * 2
    with pytest.raises(ValueError, match="got 4"):
        losses.lncc(*pair, 4)
    for wrong in ({"radius": -1}, {"distance": 0}):
        with pytest.raises(ValueError, match="Patches have a radius of 0 or more"):
            losses.self_similarity(pair[0], **wrong)
    with pytest.raises(ValueError, match="got 'mirror'"):
        losses.lncc(*pair, 3, border="mirror")
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
