"""Overlaps of label maps against hand-made answers and SimpleITK."""

import numpy as np
import pytest
import SimpleITK as sitk
from label_maps import blobs, cube

from dilformer_jax.ops import overlap


def simpleitk(fixed: np.ndarray, moved: np.ndarray) -> sitk.LabelOverlapMeasuresImageFilter:
    peer = sitk.LabelOverlapMeasuresImageFilter()
    # Source and target: its false negatives are those of the second.
    peer.Execute(*(sitk.GetImageFromArray(volume.astype(np.uint8)) for volume in (moved, fixed)))
    return peer


def test_dice_of_cubes_is_counted_by_hand():
    fixed = cube((10, 10, 10), (1, 1, 1), (4, 4, 4)) + cube((10, 10, 10), (7, 7, 7), (2, 2, 2), label=5)
    moved = cube((10, 10, 10), (2, 1, 1), (4, 4, 4)) + cube((10, 10, 10), (7, 7, 7), (2, 2, 3), label=5)
    # 64 and 64 voxels share 48; 8 and 12 share 8.
    np.testing.assert_allclose(overlap.dice(fixed, moved, [1, 5]), [0.75, 0.8])
    np.testing.assert_allclose(overlap.dice(fixed, moved, [5, 1]), [0.8, 0.75])
    np.testing.assert_allclose(overlap.target_overlap(fixed, moved, [1, 5]), [48 / 64, 1])
    np.testing.assert_allclose(overlap.target_overlap(moved, fixed, [1, 5]), [48 / 64, 8 / 12])
    np.testing.assert_allclose(overlap.union_overlap(fixed, moved, [1, 5]), [48 / 80, 8 / 12])
    sums = overlap.totals(fixed, moved, [1, 5])
    assert sums == pytest.approx({"target": 56 / 72, "mean": 2 * 56 / 148, "union": 56 / 92})


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_overlaps_agree_with_simpleitk(kind, order):
    fixed, moved = blobs(0), blobs(1)
    peer = simpleitk(fixed, moved)
    labels = (1, 2, 3)
    fixed, moved = np.asarray(fixed.astype(kind), order=order), moved.astype(kind)
    for ours, theirs in (
        (overlap.dice, peer.GetDiceCoefficient),
        (overlap.target_overlap, lambda label: 1 - peer.GetFalseNegativeError(label)),
        (overlap.union_overlap, peer.GetJaccardCoefficient),
    ):
        np.testing.assert_allclose(ours(fixed, moved, [*labels]), [theirs(label) for label in labels], atol=1e-12)
    # SimpleITK's figures without a label are sums over all labels, 0 apart.
    sums = overlap.totals(fixed, moved, [*labels])
    expected = (1 - peer.GetFalseNegativeError(), peer.GetDiceCoefficient(), peer.GetJaccardCoefficient())
    assert [sums[name] for name in ("target", "mean", "union")] == pytest.approx(expected, abs=1e-12)


def test_an_absent_structure_is_nan_and_a_vanished_one_scores_zero():
    shape = (8, 8, 8)
    everywhere = cube(shape, (0, 0, 0), (3, 3, 3), label=1)
    fixed = everywhere + cube(shape, (5, 5, 5), (2, 2, 2), label=2) + cube(shape, (5, 0, 0), (2, 2, 2), label=3)
    moving = everywhere + cube(shape, (5, 5, 5), (1, 1, 1), label=2) + cube(shape, (0, 5, 0), (2, 2, 2), label=4)
    moved = everywhere  # label 2 was one voxel, and no voxel of the fixed grid sampled it
    labels = [1, 2, 3, 4, 9]
    for measure in (overlap.dice, overlap.target_overlap, overlap.union_overlap):
        np.testing.assert_array_equal(measure(fixed, moved, labels, moving), [1, 0, np.nan, np.nan, np.nan])
        np.testing.assert_array_equal(measure(fixed, moved, labels), [1, np.nan, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(overlap.present(fixed, labels), [True, True, True, False, False])
    # 27 voxels in both; labels 2 and 3 have 8 each in the fixed map alone.
    assert overlap.totals(fixed, moved, labels) == pytest.approx({"target": 27 / 43, "mean": 54 / 70, "union": 27 / 43})
    assert np.isnan([*overlap.totals(fixed, moved, [9]).values()]).all()


def test_means_leave_out_the_absent_or_count_them_as_zero():
    values = np.array([0.5, np.nan, 0.0, 1.0])
    assert overlap.mean_present(values) == pytest.approx(0.5)
    assert overlap.mean_absent_zero(values) == pytest.approx(0.375)
    assert np.isnan(overlap.mean_present(np.full(2, np.nan))) and np.isnan(overlap.mean_present(np.zeros(0)))
    assert overlap.mean_absent_zero(np.full(2, np.nan)) == 0 and np.isnan(overlap.mean_absent_zero(np.zeros(0)))


def test_the_moving_labels_may_live_on_another_grid():
    fixed = cube((6, 6, 6), (0, 0, 0), (2, 2, 2))
    assert overlap.dice(fixed, fixed, [1], cube((9, 4, 5), (1, 1, 1), (1, 1, 1)))[0] == 1.0
    assert np.isnan(overlap.dice(fixed, fixed, [1], np.zeros((9, 4, 5), np.int32))[0])


def test_labels_may_be_few_large_or_negative():
    fixed = cube((6, 6, 6), (0, 0, 0), (2, 2, 2), 12175) + cube((6, 6, 6), (3, 3, 3), (2, 2, 2), -7)
    np.testing.assert_array_equal(overlap.dice(fixed, fixed, [12175, -7, 11]), [1, 1, np.nan])
    assert overlap.dice(fixed, fixed, []).shape == (0,)
    # Ids as large as those of an atlas of the mouse brain: one by one they would be counted in gigabytes.
    atlas = cube((6, 6, 6), (0, 0, 0), (2, 2, 2), 1) + cube((6, 6, 6), (3, 3, 3), (2, 2, 2), 2_000_000_000)
    shifted = np.roll(atlas, 1, axis=0)
    np.testing.assert_array_equal(overlap.dice(atlas, shifted, [2_000_000_000, 5, 1]), [0.5, np.nan, 0.5])
    # A label named twice is scored twice.
    np.testing.assert_array_equal(overlap.dice(atlas, shifted, [1, 1]), [0.5, 0.5])
    with pytest.raises(ValueError, match=r"named twice: \[1, 1\]"):
        overlap.totals(atlas, shifted, [1, 1])
    # An unsigned map holds no negative label, and asking for one must not wrap around.
    unsigned = np.full((3, 3, 3), 249, np.uint8)
    np.testing.assert_array_equal(overlap.dice(unsigned, unsigned, [-7, 249]), [np.nan, 1])


@pytest.mark.parametrize("labels", [300, 70_000])
def test_labels_may_be_many(labels):
    # Every number 1, 2, 3 ... in turn, and the same one label further; of the last there is then none at the end.
    fixed = np.resize(np.arange(labels), (40, 50, 60)).astype(np.int32)
    moved = np.where(fixed % 3 == 0, fixed, 0)
    ids = [*range(1, labels)]
    expected = np.where(np.array(ids) % 3 == 0, 1.0, 0.0)
    np.testing.assert_array_equal(overlap.dice(fixed, moved, ids, fixed), expected)


def test_maps_of_different_shapes_are_refused():
    small, large = np.zeros((3, 4, 5), np.int32), np.zeros((3, 4, 6), np.int32)
    for measure in (overlap.dice, overlap.target_overlap, overlap.union_overlap, overlap.totals):
        with pytest.raises(ValueError, match=r"\(3, 4, 5\).*\(3, 4, 6\)"):
            measure(small, large, [1])
