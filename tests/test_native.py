"""Registration in native space: what the grids of the files may not change, and where everything lies afterwards."""

import dataclasses
import itertools
from pathlib import Path

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from toys import Constant, predictor

from dilformer_jax.data.phantoms import phantom
from dilformer_jax.io.geometry import apply_affine
from dilformer_jax.io.transforms import carried
from dilformer_jax.io.volumes import BadInput, Volume, read_image, read_labels
from dilformer_jax.ops import spatial
from dilformer_jax.registration import grids, pipeline
from dilformer_jax.registration.pipeline import register
from dilformer_jax.registration.refine import Refinement
from dilformer_jax.registration.warps import warped

SHORT = Refinement(steps=8)


def volume(array: np.ndarray, affine: np.ndarray | None = None, name: str = "a") -> Volume:
    return Volume(array, np.diag([2.0, 2, 2, 1]) if affine is None else affine, Path(f"{name}.nii"), nib.Nifti1Header())


def padded(v: Volume, margins: list[tuple[int, int]]) -> Volume:
    affine = v.affine.copy()
    affine[:3, 3] = apply_affine(v.affine, np.array([-float(before) for before, _ in margins]))
    return dataclasses.replace(v, array=np.pad(v.array, margins), affine=affine)


@pytest.fixture(scope="module")
def pair() -> dict[str, Volume]:
    found = {}
    for role, seed in (("fixed", 1), ("moving", 2)):
        image, labels = phantom(seed, (32, 32, 32))
        image, labels = (np.pad(x, 4) for x in (image * (labels > 0), labels))
        found[role] = volume(image.astype(np.float32), name=role)
        found[f"{role}_labels"] = volume(labels.astype(np.int32), name=f"{role}_labels")
    return found


@pytest.fixture(scope="module")
def plain(pair: dict[str, Volume]) -> pipeline.Registration:
    return register(
        pair["fixed"], pair["moving"], None, pair["fixed_labels"], pair["moving_labels"], SHORT, affine="none"
    )


def again(pair: dict[str, Volume], fixed: Volume | None = None, moving: Volume | None = None) -> np.ndarray:
    found = register(fixed or pair["fixed"], moving or pair["moving"], None, refinement=SHORT, affine="none")
    return found.moved


def test_it_registers(plain):
    found = plain.metrics
    assert found["dice"] > found["dice_before"] + 0.03 and found["dice_before"] == found["dice_affine"]
    assert found["correlation"] > found["correlation_before"] + 0.03
    assert found["outside_grid_percent"] == 0


def test_where_the_world_has_its_origin_changes_nothing(pair, plain):
    shifted = {}
    for role in ("fixed", "moving"):
        affine = pair[role].affine.copy()
        affine[:3, 3] += (370.3, -1200.7, 8.1)
        shifted[role] = dataclasses.replace(pair[role], affine=affine)
    np.testing.assert_allclose(again(pair, **shifted), plain.moved, atol=1e-5)


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_the_size_of_the_world_changes_nothing(pair, plain, scale):
    scaled = {
        role: dataclasses.replace(pair[role], affine=np.diag([scale, scale, scale, 1]) @ pair[role].affine)
        for role in ("fixed", "moving")
    }
    np.testing.assert_allclose(again(pair, **scaled), plain.moved, atol=1e-5)


def test_padding_with_zeros_changes_no_interior(pair, plain):
    fixed = padded(pair["fixed"], [(3, 0), (0, 7), (2, 5)])
    moved = again(pair, fixed, padded(pair["moving"], [(1, 2), (9, 0), (0, 3)]))
    np.testing.assert_allclose(moved[3:, :-7, 2:-5], plain.moved, atol=1e-5)
    assert not moved[:3].any()


def test_how_the_moving_image_is_stored_changes_nothing(pair, plain):
    moving = pair["moving"]
    for axes, flips in (((1, 2, 0), (0,)), ((2, 1, 0), (1, 2)), ((0, 1, 2), (0, 1, 2))):
        stored = np.flip(moving.array.transpose(axes), flips)
        steps = np.zeros((4, 4))  # from voxels as they are stored now to those as they were
        steps[3, 3] = 1
        for new, old in enumerate(axes):
            steps[old, new], steps[old, 3] = (-1, stored.shape[new] - 1) if new in flips else (1, 0)
        other = dataclasses.replace(moving, array=np.ascontiguousarray(stored), affine=moving.affine @ steps)
        np.testing.assert_allclose(again(pair, moving=other), plain.moved, atol=1e-5)


def test_renaming_labels_renames_their_scores(pair, plain):
    names = np.arange(22)
    names[1:] = np.random.default_rng(0).permutation(np.arange(1, 22))
    labels = [
        dataclasses.replace(pair[f"{r}_labels"], array=names[pair[f"{r}_labels"].array].astype(np.int32))
        for r in ("fixed", "moving")
    ]
    found = register(pair["fixed"], pair["moving"], None, *labels, SHORT, affine="none").metrics
    before = plain.metrics["dice_per_label"]
    assert len(before) > 15
    assert found["dice_per_label"] == {int(names[label]): dice for label, dice in before.items()}


def test_there_and_back(pair, plain):
    fixed = pair["fixed"]
    points = apply_affine(fixed.affine, np.argwhere(grids.content(fixed.array)))
    there = carried(points, plain.transform)
    assert np.linalg.norm(there - points, axis=1).mean() > 1
    # On the voxels of the grid, the fixed image's here, the way back is exact; elsewhere it is interpolated.
    back = carried(points, plain.inverse_transform)
    error = np.linalg.norm(carried(back, plain.transform) - points, axis=1)
    assert np.percentile(error, 99) < 0.01
    points += np.random.default_rng(7).uniform(-1, 1, points.shape)  # half a voxel
    back = carried(carried(points, plain.transform), plain.inverse_transform)
    error, found = np.linalg.norm(back - points, axis=1), plain.metrics
    assert found["inverse_mean_mm"] == pytest.approx(error.mean(), rel=0.1) and error.mean() > 0.1
    assert found["inverse_max_mm"] > found["inverse_p99_mm"] > found["inverse_mean_mm"]


def test_the_whole_is_the_affine_after_the_deformation():
    """By a network that moves everything by a constant, between grids that have nothing in common, in closed form."""
    rng = np.random.default_rng(3)
    blob = ndimage.gaussian_filter(rng.uniform(size=(20, 22, 18)), 2).astype(np.float32)
    fixed_affine, moving_affine = np.diag([2.0, -1.5, 1, 1]), np.diag([-1.0, 1.2, 1.4, 1])
    fixed_affine[:3, 3], moving_affine[:3, 3] = (-10, 20, 5), (15, -12, 0)
    matrix = np.eye(4)
    matrix[:3, :3] += rng.normal(size=(3, 3)) * 0.05
    matrix[:3, 3] = (3, -2, 4)
    fixed, moving = volume(blob, fixed_affine), volume(blob[::-1].copy(), moving_affine, "b")
    found = register(fixed, moving, predictor(Constant(), (0.5, 1.0, -0.25)), affine=matrix)
    # Constant is in voxels of half the resolution of its grid, which is the fixed one.
    points = rng.uniform(-5, 15, (50, 3))
    expected = apply_affine(matrix, points + fixed_affine[:3, :3] @ (1.0, 2.0, -0.5))
    np.testing.assert_allclose(carried(points, found.transform), expected, atol=1e-4)
    back = carried(expected, found.inverse_transform)
    np.testing.assert_allclose(back, points, atol=1e-4)
    voxels = np.moveaxis(np.indices(blob.shape), 0, -1)
    places = apply_affine(
        np.linalg.inv(moving_affine), carried(apply_affine(fixed_affine, voxels).reshape(-1, 3), found.transform)
    )
    inside = ((places >= 0) & (places <= np.array(blob.shape) - 1)).all(axis=1).reshape(blob.shape)
    expected = ndimage.map_coordinates(moving.array, places.T, order=1).reshape(blob.shape)
    assert 0.1 < inside.mean() < 0.9
    np.testing.assert_allclose(found.moved[inside], expected[inside], atol=1e-5)
    beyond = ((places < -0.51) | (places > np.array(blob.shape) - 0.49)).any(axis=1).reshape(blob.shape)
    assert not found.moved[beyond].any()


def test_labels_are_those_of_the_nearest_voxel(pair, plain):
    fixed, moving = pair["fixed"], pair["moving_labels"]
    voxels = np.moveaxis(np.indices(fixed.array.shape), 0, -1).reshape(-1, 3)
    places = apply_affine(np.linalg.inv(moving.affine), carried(apply_affine(fixed.affine, voxels), plain.transform))
    nearest = ndimage.map_coordinates(moving.array, places.T, order=0).reshape(fixed.array.shape)
    assert (nearest != plain.moved_labels).mean() < 1e-3  # halfway between two voxels
    assert len(np.unique(plain.moved_labels)) > 15


# --- Grids ---


def test_the_grid_of_weights_lies_around_the_brain():
    array = np.zeros((40, 30, 20), np.float32)
    array[10:21, 4:15, 8:13] = 1 + np.arange(11)[:, None, None]
    affine = np.diag([-1.0, 1, 2, 1])
    affine[:3, 3] = (30, -10, 7)
    declared = {"shape": [16, 24, 8], "spacing_mm": [2, 1, 2], "orientation": "SPR"}
    grid = grids.model_grid(volume(array, affine), declared)
    np.testing.assert_allclose(grid.affine[:3, :3], [[0, 0, 2], [0, -1, 0], [2, 0, 0]], atol=1e-12)
    middle = apply_affine(affine, np.array([15.0, 9, 10]))
    np.testing.assert_allclose(apply_affine(grid.affine, np.array([7.5, 11.5, 3.5])), middle, atol=1e-9)
    np.testing.assert_allclose(affine @ grid.voxels, grid.affine, atol=1e-9)


@pytest.mark.parametrize("shape", [(40, 30, 20), (44, 36, 20)])
def test_voxels_of_the_same_size_are_not_resampled(shape):
    array = np.random.default_rng(0).uniform(size=(40, 30, 20)).astype(np.float32)
    fixed = volume(array, np.diag([-1.0, -1, 1, 1]))
    declared = {"shape": list(shape), "spacing_mm": [1, 1, 1], "orientation": "LPS"}
    grid = grids.model_grid(fixed, declared)
    np.testing.assert_array_equal(grid.voxels[:3, :3], np.eye(3))
    margin = (np.array(shape) - array.shape) // 2
    np.testing.assert_array_equal(grid.voxels[:3, 3], -margin)
    (a, b, c), seen = margin, grids.on_grid(fixed, grid, np.eye(4))
    np.testing.assert_array_equal(seen[a : a + 40, b : b + 30, c : c + 20], array)
    mirrored = grids.model_grid(fixed, declared | {"orientation": "RPS"})
    (a, b, c), seen = margin, grids.on_grid(fixed, mirrored, np.eye(4))
    np.testing.assert_array_equal(seen[::-1][a : a + 40, b : b + 30, c : c + 20], array)


def test_voxels_that_are_no_cubes_become_cubes():
    array = np.zeros((30, 40, 10), np.float32)
    array[5:25, 5:35, 2:8] = 1 + np.random.default_rng(0).uniform(size=(20, 30, 6))
    sheared = np.array([[1.0, 0.1, 0, 4], [0, 1, 0.2, 0], [0, 0, 4, 0], [0, 0, 0, 1]])
    grid = grids.content_grid(volume(array, sheared), volume(array, sheared, "b"), np.eye(4))
    sides = grid.affine[:3, :3]
    np.testing.assert_allclose(sides.T @ sides, np.eye(3) * (sides**2).sum() / 3, atol=1e-9)
    assert abs(np.linalg.det(sides)) == pytest.approx(4.0, rel=0.06)
    ends = apply_affine(
        np.linalg.inv(grid.affine) @ sheared, np.array(list(itertools.product((5, 24), (5, 34), (2, 7))))
    )
    assert (ends > 0).all() and (ends < np.array(grid.shape) - 1).all()


def test_what_is_far_away_does_not_widen_the_grid(pair):
    affine = pair["moving"].affine.copy()
    affine[0, 3] += 500
    near = grids.content_grid(pair["fixed"], pair["moving"], np.eye(4))
    far = grids.content_grid(pair["fixed"], dataclasses.replace(pair["moving"], affine=affine), np.eye(4))
    assert far.shape[0] <= 1.5 * near.shape[0] + 16


def test_a_brain_of_impossible_size_is_refused(pair):
    declared = {"shape": [32, 36, 32], "spacing_mm": [2, 2, 2], "orientation": "RAS"}
    network = dataclasses.replace(predictor(Constant()), grid=declared)
    large = dataclasses.replace(pair["moving"], affine=np.diag([2000.0, 2000, 2000, 1]))
    with pytest.raises(
        BadInput, match=r"moving.nii shows something 5.*e\+04 mm across, where the weights' grid is 72 mm"
    ):
        register(pair["fixed"], large, network, affine="none")


def test_an_inverse_integrated_backwards_is_brought_nearer():
    """What interpolation has left of a velocity's inverse, half steps take away; from a wild start nothing is lost."""
    shape = (14, 16, 12)
    controls = 2 * np.random.default_rng(2).standard_normal((4, 4, 4, 3)).astype(np.float32)
    velocity = spatial.resize(jnp.asarray(controls), shape)
    u, back = spatial.integrate(velocity), spatial.integrate(-velocity)
    off = lambda v: np.linalg.norm(spatial.compose(u, v), axis=-1)
    found = pipeline._inverse(u, back)
    assert (off(found) <= off(back)).all()
    assert 1e-4 < off(found).mean() < 0.5 * off(back).mean()
    wild = pipeline._inverse(u, back + 50)
    assert (off(wild) <= off(back + 50)).all()


def test_masks_hide_all_else_from_the_registration_and_nothing_from_the_result(pair, plain):
    noise = np.random.default_rng(5).uniform(0.2, 1, pair["moving"].array.shape).astype(np.float32)
    masks = {role: pair[f"{role}_labels"].array > 0 for role in ("fixed", "moving")}
    dirty = {
        role: dataclasses.replace(pair[role], array=np.where(masks[role], pair[role].array, noise)) for role in masks
    }
    found = register(
        *dirty.values(), None, refinement=SHORT, affine="none", fixed_mask=masks["fixed"], moving_mask=masks["moving"]
    )
    np.testing.assert_allclose(found.displacement, plain.displacement, atol=1e-5)
    assert np.abs(found.moved - plain.moved).max() > 0.3
    everything = warped(dirty["moving"], found.transform, noise.shape, pair["fixed"].affine)
    np.testing.assert_array_equal(found.moved, everything)


@pytest.mark.data
def test_whole_heads_are_told_from_brains(shared_data):
    path = sorted((shared_data / "ixi_2mm_native").glob("*_T1.nii.gz"))[0]
    head, labels = read_image(path), read_labels(path.with_name(path.name.replace("_T1", "_T1_DLMUSE")))
    assert grids.is_head(head)
    assert not grids.is_head(dataclasses.replace(head, array=np.where(labels.array > 0, head.array, 0)))
    assert not grids.is_head(read_image(shared_data / "lpba40" / "S35_t1.nii.gz"))
