"""Similarities against loops over windows in float64, and hand-made answers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_terms_by_hand import SHAPE, compiled, image, lncc_by_loop
from scipy import ndimage  # type: ignore[import-untyped]

from dilformer_jax.ops import similarities


@pytest.mark.parametrize("border", ["cut", "zeros"])
def test_lncc_and_its_gradient_equal_a_loop(border):
    fixed, noise = image(*SHAPE), image(*SHAPE, seed=1)
    moved = 0.5 * fixed**2 + 0.5 * noise
    windows = (3, 5, 9)  # the last is larger than the volume
    every = lambda fixed, moved: [similarities.lncc(fixed, moved, window, border=border) for window in windows]
    slopes = lambda fixed, moved: jax.grad(
        lambda fixed, moved: similarities.lncc(fixed, moved, 3, border=border, epsilon=0.01), (0, 1)
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


def test_the_slope_of_lncc_is_that_of_one_voxel_in_its_own_window():
    """By a loop: how cross² / (variance · variance + epsilon) of the window around a voxel changes with the difference
    of that voxel from the window's mean, for each of the window's voxels."""
    fixed, noise = (x - x.mean() for x in (image(*SHAPE), image(*SHAPE, seed=1)))
    moved = 0.5 * fixed + 0.5 * noise
    change, mean = compiled(
        lambda f, m: similarities.lncc_slope(f, 3, epsilon=0.01)(m), fixed[..., None], moved[..., None]
    )
    assert mean == pytest.approx(lncc_by_loop(fixed, moved, 3, "cut", 0.01), abs=1e-5)
    for voxel in ((0, 0, 0), (3, 2, 1), (6, 5, 4), (2, 5, 2)):
        window = tuple(slice(max(i - 1, 0), i + 2) for i in voxel)
        f, m = (x[window] - x[window].mean() for x in (fixed, moved))
        cross, by_f, by_m = (f * m).sum(), (f * f).sum(), (m * m).sum()
        f, m = (x[voxel] - x[window].mean() for x in (fixed, moved))
        product = by_f * by_m + 0.01
        expected = 2 * cross / product * f - cross**2 / product**2 * by_f * 2 * m
        expected *= fixed[window].size
        assert change[(*voxel, 0)] == pytest.approx(expected, abs=1e-4), voxel


def test_the_slope_of_lncc_points_where_the_exact_gradient_does():
    fixed, noise = (ndimage.gaussian_filter(image(20, 20, 20, seed=s), 1.5) for s in (0, 1))
    fixed, moved = ((x - x.mean()) / x.std() for x in (fixed, fixed + 0.5 * noise))
    change, exact = compiled(
        lambda f, m: (
            similarities.lncc_slope(f, 5)(m)[0],
            f.size * jax.grad(lambda m: similarities.lncc(f, m, 5))(m),
        ),
        fixed[..., None],
        moved[..., None],
    )
    inner = (slice(4, -4),) * 3
    assert np.corrcoef(change[inner].ravel(), exact[inner].ravel())[0, 1] > 0.8


def test_lncc_is_one_of_an_image_with_itself_and_blind_to_scale_and_offset():
    fixed, moved = image(2, *SHAPE, 1), image(2, *SHAPE, 1, seed=1)
    alike = lambda f, m: similarities.lncc(f, m, 3)
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
    every = lambda f, m: [similarities.lncc(f, m, window, border=border) for window in (5, 9)]
    slope = lambda f, m: jax.grad(lambda m: similarities.lncc(f, m, 5, border=border))(m)
    values, gradient = compiled(lambda f, m: (every(f, m), slope(f, m)), *(x[..., None] for x in far))
    for window, value in zip((5, 9), values, strict=True):
        expected = lncc_by_loop(far[0], far[1], window, border)
        assert value == pytest.approx(expected, abs=1e-4 * expected), window
    if border == "cut":
        unmoved = compiled(lambda f, m: (similarities.lncc(f, m, 5), slope(f, m)), *(x[..., None] for x in near))
        assert values[0] == pytest.approx(unmoved[0], abs=1e-3)
        np.testing.assert_allclose(gradient, unmoved[1], atol=2e-3 * np.abs(unmoved[1]).max())


def test_lncc_of_what_is_no_number_is_none():
    """It counts for nothing where an image is constant, which must not hide a run that has gone astray."""
    image = np.random.default_rng(0).random((1, 6, 6, 6, 1)).astype(np.float32)
    for wrong in (np.nan, np.inf):
        astray = image.copy()
        astray[0, 2, 3, 4, 0] = wrong
        whole, other = jnp.asarray(image), jnp.asarray(astray)
        assert np.isnan(similarities.lncc(whole, other, 3)) and np.isnan(similarities.lncc(other, whole, 3))


def test_lncc_of_constant_images_is_zero_with_a_finite_gradient():
    textured, black = image(*SHAPE, 1), np.zeros((*SHAPE, 1))
    pairs = [(black, black), (black + 0.7, textured), (textured, black + 0.7), (black + 0.3, black + 0.9)]
    each = jax.vmap(jax.value_and_grad(lambda f, m: similarities.lncc(f, m, 3), (0, 1)))
    values, gradients = compiled(each, *(np.stack(images) for images in zip(*pairs, strict=True)))
    assert ((values >= 0) & (values < 1e-6)).all(), values
    assert np.isfinite(gradients[0]).all() and np.isfinite(gradients[1]).all()
    # A brain in a black background: only its own windows count.
    brain = np.zeros((12, 12, 12, 1))
    brain[4:8, 4:8, 4:8] = image(4, 4, 4, 1)
    value, gradient = compiled(jax.value_and_grad(lambda m: similarities.lncc(m, m, 3)), brain)
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
        lambda f, m: [similarities.lncc(scale * f, scale * m, 9, border=border) for scale in (1.0, 255.0, 4000.0)],
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
    every = lambda x: [
        similarities.self_similarity(scale * x, radius=radius, distance=distance) for scale in (1.0, 700.0)
    ]
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
            similarities.mind(f, 1 - 3 * f),
            similarities.mind(0 * f, 0 * f + 1),
            similarities.mind(f, m),
            ((similarities.self_similarity(f) - similarities.self_similarity(m)) ** 2).mean(),
        ],
        fixed[..., None],
        moved[..., None],
    )
    assert negative == pytest.approx(0, abs=1e-6) and constant == 0
    assert aside == pytest.approx(difference, rel=1e-5) and aside > 0.02


def test_mse():
    fixed, moved = image(2, *SHAPE, 2), image(2, *SHAPE, 2, seed=1)
    value, apart, gradient = compiled(
        lambda f, m: [similarities.mse(f, m), similarities.mse(f, f - 3), jax.grad(similarities.mse)(f, m)],
        fixed,
        moved,
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
        lambda f, m: [similarities.soft_dice(f, m), similarities.soft_dice(jnp.stack([f, f]), jnp.stack([m, f]))],
        fixed,
        moved,
    )
    assert one == pytest.approx(np.mean(dice), abs=1e-5)
    assert batch == pytest.approx((np.mean(dice) + 1) / 2, abs=1e-5)


def test_similarities_refuse_unknown_options(unchecked):
    pair = (jnp.zeros((1, 4, 4, 4, 1)),) * 2
    with pytest.raises(ValueError, match="got 4"):
        similarities.lncc(*pair, 4)
    for wrong in ({"radius": -1}, {"distance": 0}):
        with pytest.raises(ValueError, match="Patches have a radius of 0 or more"):
            similarities.self_similarity(pair[0], **wrong)
    with pytest.raises(ValueError, match="got 'mirror'"):
        similarities.lncc(*pair, 3, border="mirror")
