"""Mutual information against histograms in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import BSpline

from dilformer_jax.ops import information


def by_hand(fixed, moved, bins, weights=None):
    """Sample by sample in float64, with SciPy's B-spline."""
    spline = BSpline.basis_element(np.arange(-2.0, 3.0), extrapolate=False)
    window = lambda x: np.nan_to_num(spline(1 + min(max(float(x), 0), 1) * (bins - 3) - np.arange(bins)))
    joint = np.zeros((bins, bins))
    fixed, moved, weights = (np.float64(x) for x in (fixed, moved, np.ones(len(fixed)) if weights is None else weights))
    for f, m, weight in zip(fixed, moved, weights, strict=True):
        joint += weight * np.outer(window(f), window(m))
    joint /= joint.sum()
    entropy = lambda p: -sum(x * np.log(x) for x in p.ravel() if x > 0)
    return (entropy(joint.sum(0)) + entropy(joint.sum(1))) / entropy(joint)


@pytest.fixture(scope="module")
def samples():
    draw = np.random.default_rng(0)
    fixed = draw.uniform(-0.1, 1.1, 300).astype(np.float32)  # also beyond the range
    moved = np.abs(fixed - 0.4) + 0.05 * draw.normal(size=300)
    return [jnp.asarray(x, jnp.float32) for x in (fixed, moved, draw.uniform(0, 2, 300))]


def test_it_is_that_of_a_histogram_by_hand(samples):
    fixed, moved, weights = samples
    for bins in (8, 32):
        np.testing.assert_allclose(information.nmi(fixed, moved, bins=bins), by_hand(fixed, moved, bins), rtol=1e-5)
    found = information.nmi(fixed.reshape(3, 100), moved.reshape(3, 100), weights=weights.reshape(3, 100))
    np.testing.assert_allclose(found, by_hand(fixed, moved, 32, weights), rtol=1e-5)


def test_chunks_change_neither_value_nor_gradient(samples, monkeypatch):
    fixed, moved, weights = samples
    whole = jax.value_and_grad(lambda x: information.nmi(fixed, x, weights=weights))(moved)
    monkeypatch.setattr(information, "CHUNK", 77)
    parts = jax.value_and_grad(lambda x: information.nmi(fixed, x, weights=weights))(moved)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-3, atol=1e-6)


def test_gradient_is_that_of_finite_differences(samples):
    fixed, moved, weights = samples
    direction = np.sin(np.arange(300.0))
    slope = jnp.vdot(jax.grad(lambda x: information.nmi(fixed, x, bins=8, weights=weights))(moved), direction)
    ahead, behind = (by_hand(fixed, np.float64(moved) + step * direction, 8, weights) for step in (1e-5, -1e-5))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-3)


def test_it_tells_related_from_unrelated(samples):
    fixed, moved, _ = samples
    fixed = fixed.clip(0, 1)
    alike = float(information.nmi(fixed, 1 - fixed))
    assert float(information.nmi(fixed, moved)) < alike < 2
    np.testing.assert_allclose(alike, information.nmi(fixed, fixed), rtol=1e-5)
    # A constant tells nothing, and neither do no samples.
    np.testing.assert_allclose(information.nmi(fixed, jnp.full_like(fixed, 0.3)), 1, rtol=1e-5)
    nothing = jax.value_and_grad(lambda x: information.nmi(fixed, x, weights=jnp.zeros(300)))(fixed)
    assert nothing[0] == 1 and not nothing[1].any()
    assert np.isnan(information.nmi(fixed, jnp.where(fixed > 0.5, jnp.nan, fixed)))


def test_few_bins_are_refused(samples):
    with pytest.raises(ValueError, match="four bins or more, got 3"):
        information.nmi(*samples[:2], bins=3)
