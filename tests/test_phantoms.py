"""Phantoms: reproducible, anatomically in order, and misaligned in the way that a registration is there to undo."""

import hashlib
import itertools
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy.ndimage import affine_transform, binary_dilation, label
from scipy.optimize import minimize

from dilformer_jax.data import phantoms
from dilformer_jax.data.phantoms import LABELS, phantom

SMALL = (32, 40, 32)


def overlap(fixed: np.ndarray, moved: np.ndarray) -> float:
    """Mean Dice over LABELS, from one joint histogram."""
    n = max(LABELS) + 1
    joint = np.bincount(fixed.ravel().astype(int) * n + moved.ravel(), minlength=n * n).reshape(n, n)
    dice = 2 * np.diag(joint) / np.maximum(joint.sum(0) + joint.sum(1), 1)
    return float(dice[list(LABELS)].mean())


def moved_by(matrix: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels under a 3 x 4 affine, given as its difference from the identity, about the middle of the grid."""
    linear, middle = np.eye(3) + matrix[:, :3], (np.array(labels.shape) - 1) / 2
    return affine_transform(labels, linear, middle + matrix[:, 3] - linear @ middle, order=0)


def best_affine_overlap(fixed: np.ndarray, moving: np.ndarray) -> float:
    """Dice after the affine that maximises that very Dice: no affine that sees the images only can expect more."""
    scale = np.array([[0.05, 0.05, 0.05, 1.0]] * 3)  # of one unit of search: 5 % of shear or scale, one voxel of shift

    def loss(x: np.ndarray) -> float:
        return -overlap(fixed, moved_by(x.reshape(3, 4) * scale, moving))

    return -minimize(loss, np.zeros(12), method="Powell", options={"maxiter": 3, "ftol": 1e-3, "xtol": 0.05}).fun


@pytest.fixture(scope="module")
def subjects() -> list[tuple[np.ndarray, np.ndarray]]:
    return [phantom(seed) for seed in range(8)]


@pytest.mark.parametrize("shape", [(64, 80, 64), (32, 33, 40)])
def test_arrays_are_as_promised(shape):
    image, labels = phantom(5, shape)
    assert image.shape == labels.shape == shape
    assert image.dtype == np.float32 and labels.dtype == np.uint8
    assert image.min() >= 0 and image.max() <= 1 and image.max() > 0.6
    assert set(np.unique(labels)) == {0, *LABELS}
    # Stripped of the skull: nothing labelled outside the brain, one body with a border of background around it.
    assert (image[labels > 0] > 0).all()
    assert 0.15 < (image > 0).mean() < 0.5
    sizes = np.bincount(label(image > 0, np.ones((3, 3, 3)))[0].ravel())[1:]
    assert sizes.max() > 0.995 * sizes.sum()
    for axis in range(3):
        assert not image.take([0, -1], axis).any()


def test_equal_seeds_are_bit_identical_in_any_order_and_process(subjects):
    image, labels = phantom(3)
    np.testing.assert_array_equal(image, subjects[3][0])
    np.testing.assert_array_equal(labels, subjects[3][1])
    np.random.seed(0)  # the global generator must not matter
    code = "import hashlib; from dilformer_jax.data.phantoms import phantom; i, l = phantom(3); \
print(hashlib.sha256(i.tobytes() + l.tobytes()).hexdigest())"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == hashlib.sha256(image.tobytes() + labels.tobytes()).hexdigest()


def test_different_seeds_are_different_brains(subjects):
    for (image, labels), (other_image, other_labels) in itertools.combinations(subjects, 2):
        assert overlap(labels, other_labels) < 0.7
        inside = (image > 0) & (other_image > 0)
        assert np.corrcoef(image[inside], other_image[inside])[0, 1] < 0.6


def test_overlap_before_registration_is_about_a_half(subjects):
    before = [overlap(a, b) for (_, a), (_, b) in itertools.combinations(subjects, 2)]
    assert 0.45 <= np.mean(before) <= 0.55
    assert min(before) > 0.35


def test_an_affine_recovers_little():
    labels = [phantom(seed, SMALL)[1] for seed in range(3)]
    gains = [best_affine_overlap(labels[a], labels[b]) - overlap(labels[a], labels[b]) for a, b in ((0, 1), (1, 2))]
    assert np.mean(gains) <= 0.05
    # The same search finds an affine where there is one.
    known = np.array([[0.06, 0.02, 0, 1.5], [0, -0.05, 0.03, -1], [0.02, 0, 0.04, 1]])
    away = moved_by(known, labels[0])
    assert best_affine_overlap(away, labels[0]) - overlap(away, labels[0]) > 0.15


def test_the_smooth_deformation_is_most_of_the_difference_and_the_folds_remain(subjects, monkeypatch):
    before = np.mean([overlap(subjects[a][1], subjects[b][1]) for a, b in ((0, 1), (2, 3), (4, 5))])
    monkeypatch.setattr(phantoms, "WARP_AMPLITUDE", 0.0)
    still = [phantom(seed) for seed in range(6)]
    undone = np.mean([overlap(still[a][1], still[b][1]) for a, b in ((0, 1), (2, 3), (4, 5))])
    assert undone - before > 0.2
    # Undeformed brains have the same outline but not the same folds: the fluid in their sulci rarely meets.
    sulci = [(image > 0) & (labels == 0) for image, labels in still]
    for a, b in ((0, 1), (2, 3), (4, 5)):
        np.testing.assert_array_equal(still[a][0] > 0, still[b][0] > 0)
        assert 2 * (sulci[a] & sulci[b]).sum() / (sulci[a].sum() + sulci[b].sum()) < 0.55


def test_tissues_look_as_in_t1(subjects):
    for image, labels in subjects:
        fluid = np.median(image[(labels == 11) | (labels == 12)])
        cortex = np.median(image[(labels > 0) & (labels <= 8)])
        deep = np.median(image[(labels >= 13) & (labels <= 18)])
        white = np.median(image[(labels == 9) | (labels == 10)])
        assert fluid + 0.15 < cortex < white - 0.15
        assert fluid + 0.15 < deep < white - 0.1


def test_anatomy_is_in_its_place(subjects):
    for _, labels in subjects:
        centre = {name: np.argwhere(labels == value).mean(0) for value, name in LABELS.items()}
        for name in (name for name in LABELS.values() if name.startswith("left ")):
            assert centre[name][0] < centre["right" + name[4:]][0]
        for side in ("left", "right"):
            assert centre[f"{side} frontal cortex"][1] > centre[f"{side} parietal cortex"][1]
            assert centre[f"{side} parietal cortex"][1] > centre[f"{side} occipital cortex"][1]
            assert centre[f"{side} frontal cortex"][2] > centre[f"{side} temporal cortex"][2]
            assert centre[f"{side} temporal cortex"][2] > centre[f"{side} cerebellum"][2]
        # The cortex is a band between the white matter and the outside or a sulcus: seldom does one touch the other.
        white, outside = (labels == 9) | (labels == 10), labels == 0
        touching = white & binary_dilation(outside)
        assert touching.sum() < 0.05 * white.sum()


def test_the_same_seed_is_the_same_brain_on_another_grid(subjects):
    # Every second voxel of a grid twice as fine lies half a fine voxel off the coarse one: close, not equal.
    same, other = (overlap(phantom(seed, SMALL)[1], subjects[2][1][::2, ::2, ::2]) for seed in (2, 3))
    assert same > 0.75 > other + 0.15


def test_generation_is_quick():
    start = time.process_time()
    phantom(9)
    assert time.process_time() - start < 2.5


def test_small_grids_are_refused():
    with pytest.raises(ValueError, match=r"at least 32 voxels, not \(64, 31, 64\)"):
        phantom(0, (64, 31, 64))
