"""Tests the detection of one contrast on images whose intensities are related in known ways."""

import numpy as np
import pytest
from scipy import ndimage

from dilformer_jax.data.phantoms import phantom
from dilformer_jax.registration import contrasts


@pytest.fixture(scope="module")
def brain() -> np.ndarray:
    image = phantom(3, (32, 40, 32))[0].astype(np.float32)
    return np.clip(image / np.percentile(image, 99), 0, 1)


def shifted(image: np.ndarray, by: float) -> np.ndarray:
    return ndimage.shift(image, (by, 0, 0), order=1, mode="nearest")


def test_a_line_is_all_that_one_image_tells_of_the_other(brain):
    assert contrasts.linear_share(brain, brain) == pytest.approx(1, abs=0.02)
    dimmed = np.where(brain > 0, 0.2 + 0.5 * brain, 0)
    assert contrasts.linear_share(brain, dimmed) == pytest.approx(1, abs=0.02)
    assert contrasts.linear_share(brain, np.where(brain > 0, 1.1 - brain, 0)) == pytest.approx(-1, abs=0.02)


def test_of_a_parabola_no_line_tells_anything():
    f = np.random.default_rng(0).uniform(0.1, 0.9, (40, 40, 40)).astype(np.float32)
    assert abs(contrasts.linear_share(f, 0.2 + 4 * (f - 0.5) ** 2)) < 0.05


@pytest.mark.parametrize("by", [0.0, 1.0, 2.0])
def test_misalignment_does_not_change_the_verdict(brain, by):
    assert contrasts.one_contrast(brain, shifted(brain, by))
    assert not contrasts.one_contrast(brain, shifted(np.where(brain > 0, 1.1 - brain, 0), by))


def test_where_nothing_can_be_told():
    blank = np.zeros((8, 8, 8), np.float32)
    for pair in ((blank, blank), (blank + 0.5, blank + 0.5)):
        assert np.isnan(contrasts.linear_share(*pair)) and contrasts.one_contrast(*pair)
