"""Label maps warped as one-hot maps, against SciPy and PyTorch doing it label by label."""

import jax
import numpy as np
import pytest
from scipy import ndimage
from warps import off_the_voxels, points

from dilformer_jax.ops import spatial

SHAPE = (6, 7, 5)
LABELS = np.random.default_rng(0).choice([0, 3, 4, 90], SHAPE).astype(np.int32)
U = off_the_voxels((5, 8, 6, 3), SHAPE)


def by_scipy(labels: np.ndarray, u: np.ndarray) -> np.ndarray:
    ids = np.unique(labels)
    places = np.moveaxis(points(u.shape[:3]) + u, -1, 0)
    maps = [ndimage.map_coordinates((labels == i).astype(float), places, order=1, mode="grid-constant") for i in ids]
    return ids[np.argmax(np.round(maps, 6), axis=0)]  # ties are ties, whatever the order of a sum


def test_it_is_the_largest_of_the_warped_one_hot_maps():
    expected = by_scipy(LABELS, U)
    got = jax.jit(spatial.warp_one_hot)(LABELS, U.astype(np.float32))
    assert got.dtype == np.int32 and len(np.unique(expected)) == 4
    np.testing.assert_array_equal(got, expected)
    nearest = spatial.warp(LABELS[..., None], U.astype(np.float32), order=0, padding="zeros")[..., 0]
    assert (np.asarray(nearest) != expected).mean() > 0.05, "the other way to warp labels gives another map"


def test_pytorch_does_the_same():
    torch = pytest.importorskip("torch")
    ids = np.unique(LABELS)
    maps = torch.nn.functional.one_hot(torch.tensor(np.searchsorted(ids, LABELS))).permute(3, 0, 1, 2)[None].double()
    span = torch.tensor([n - 1 for n in SHAPE], dtype=torch.float64)
    places = (2 * (torch.tensor(points(U.shape[:3])) + torch.tensor(U)) / span - 1).flip(-1)[None]
    warped = torch.nn.functional.grid_sample(maps, places, align_corners=True)[0]
    np.testing.assert_array_equal(ids[warped.argmax(0).numpy()], by_scipy(LABELS, U))


def test_ties_go_to_the_smaller_label_and_outside_is_nothing():
    labels = np.zeros((4, 1, 1), np.int32)
    labels[:, 0, 0] = 7, 7, 5, 5
    u = np.zeros((5, 1, 1, 3), np.float32)
    # Between 7 and 5; just beyond the middle; a quarter and three quarters beyond the last face; far away.
    u[:, 0, 0, 0] = np.array([1.5, 1.25, 3.25, 3.75, 9]) - np.arange(5)
    np.testing.assert_array_equal(np.ravel(spatial.warp_one_hot(labels, u)), [5, 7, 5, 5, 0])
