"""Measures against hand-made answers, naive loops, SciPy's distance transform and SimpleITK."""

import itertools
import time

import jaxtyping
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from dilformer_jax.ops import metrics

LPBA40 = [*range(21, 35), *range(41, 51), *range(61, 69), *range(81, 93), 101, 102, 121, 122, *range(161, 167)]


@pytest.fixture
def unchecked():
    """The functions as users have them, without the test run's shape checks in front of their own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def cube(shape: tuple[int, int, int], start: tuple[int, int, int], size: tuple[int, int, int], label: int = 1):
    volume = np.zeros(shape, np.int32)
    volume[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = label
    return volume


def blobs(seed: int, shape: tuple[int, int, int] = (13, 15, 11)) -> np.ndarray:
    """Ragged regions 0..3 that touch one another and the faces of the volume."""
    noise = np.random.default_rng(seed).normal(size=(4, *shape))
    return np.argmax([ndimage.gaussian_filter(n, 1.5) for n in noise], axis=0).astype(np.int32)


def affine_displacement(matrix: np.ndarray, shape: tuple[int, int, int] = (6, 7, 8)) -> np.ndarray:
    """u with x + u(x) = matrix @ x."""
    points = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float64) for n in shape), indexing="ij"), axis=-1)
    return (points @ (matrix - np.eye(3)).T).astype(np.float32)


def naive_surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    def inside(voxel: tuple[int, ...]) -> bool:
        return all(0 <= i < n for i, n in zip(voxel, mask.shape, strict=True)) and bool(mask[voxel])

    steps = [step for step in itertools.product((-1, 0, 1), repeat=3) if np.abs(step).sum() == 1]
    voxels = [tuple(int(i) for i in voxel) for voxel in np.argwhere(mask)]
    return [v for v in voxels if not all(inside((v[0] + a, v[1] + b, v[2] + c)) for a, b, c in steps)]


def naive_hausdorff(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> tuple[float, float]:
    first, second = naive_surface(a), naive_surface(b)

    def directed(these, those):
        return [
            min(sum(((p - q) * s) ** 2 for p, q, s in zip(x, y, spacing, strict=True)) ** 0.5 for y in those)
            for x in these
        ]

    forth, back = directed(first, second), directed(second, first)
    return (
        float(np.percentile(forth + back, 95)),
        max(float(np.percentile(forth, 95)), float(np.percentile(back, 95))),
    )


def medpy_hd95(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> float:
    """MedPy's definition in SciPy's own words: the surface by erosion, the distance by a transform."""
    surface_a, surface_b = (m ^ ndimage.binary_erosion(m, ndimage.generate_binary_structure(3, 1)) for m in (a, b))
    to_a, to_b = (ndimage.distance_transform_edt(~s, sampling=spacing) for s in (surface_a, surface_b))
    return float(np.percentile(np.hstack([to_b[surface_a], to_a[surface_b]]), 95))


def test_dice_of_cubes_is_counted_by_hand():
    fixed = cube((10, 10, 10), (1, 1, 1), (4, 4, 4)) + cube((10, 10, 10), (7, 7, 7), (2, 2, 2), label=5)
    moved = cube((10, 10, 10), (2, 1, 1), (4, 4, 4)) + cube((10, 10, 10), (7, 7, 7), (2, 2, 3), label=5)
    # 64 and 64 voxels share 48; 8 and 12 share 8.
    np.testing.assert_allclose(metrics.dice(fixed, moved, [1, 5]), [0.75, 0.8])
    np.testing.assert_allclose(metrics.dice(fixed, moved, [5, 1]), [0.8, 0.75])


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64])
def test_dice_agrees_with_simpleitk(kind):
    fixed, moved = blobs(0), blobs(1)
    peer = sitk.LabelOverlapMeasuresImageFilter()
    peer.Execute(sitk.GetImageFromArray(fixed.astype(np.uint8)), sitk.GetImageFromArray(moved.astype(np.uint8)))
    expected = [peer.GetDiceCoefficient(label) for label in (1, 2, 3)]
    np.testing.assert_allclose(metrics.dice(fixed.astype(kind), moved.astype(kind), [1, 2, 3]), expected)


def test_an_absent_structure_is_nan_and_a_vanished_one_scores_zero():
    shape = (8, 8, 8)
    everywhere = cube(shape, (0, 0, 0), (3, 3, 3), label=1)
    fixed = everywhere + cube(shape, (5, 5, 5), (2, 2, 2), label=2) + cube(shape, (5, 0, 0), (2, 2, 2), label=3)
    moving = everywhere + cube(shape, (5, 5, 5), (1, 1, 1), label=2) + cube(shape, (0, 5, 0), (2, 2, 2), label=4)
    moved = everywhere  # label 2 was one voxel, and no voxel of the fixed grid sampled it
    labels = [1, 2, 3, 4, 9]
    np.testing.assert_array_equal(metrics.dice(fixed, moved, labels, moving), [1, 0, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(metrics.dice(fixed, moved, labels), [1, np.nan, np.nan, np.nan, np.nan])
    for column in metrics.hausdorff(fixed, moved, labels, (1, 1, 1), moving):
        np.testing.assert_array_equal(column, [0, np.nan, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(metrics.present(fixed, labels), [True, True, True, False, False])


def test_the_moving_labels_may_live_on_another_grid():
    fixed = cube((6, 6, 6), (0, 0, 0), (2, 2, 2))
    assert metrics.dice(fixed, fixed, [1], cube((9, 4, 5), (1, 1, 1), (1, 1, 1)))[0] == 1.0
    assert np.isnan(metrics.dice(fixed, fixed, [1], np.zeros((9, 4, 5), np.int32))[0])


def test_labels_may_be_few_large_or_negative():
    fixed = cube((6, 6, 6), (0, 0, 0), (2, 2, 2), 12175) + cube((6, 6, 6), (3, 3, 3), (2, 2, 2), -7)
    np.testing.assert_array_equal(metrics.dice(fixed, fixed, [12175, -7, 11]), [1, 1, np.nan])
    assert metrics.dice(fixed, fixed, []).shape == (0,)
    assert metrics.hd95(fixed, fixed, [], (1, 1, 1)).shape == (0,)
    # Ids as large as those of an atlas of the mouse brain: one by one they would be counted in gigabytes.
    atlas = cube((6, 6, 6), (0, 0, 0), (2, 2, 2), 1) + cube((6, 6, 6), (3, 3, 3), (2, 2, 2), 2_000_000_000)
    shifted = np.roll(atlas, 1, axis=0)
    np.testing.assert_array_equal(metrics.dice(atlas, shifted, [2_000_000_000, 5, 1]), [0.5, np.nan, 0.5])
    np.testing.assert_array_equal(metrics.hd95(atlas, shifted, [2_000_000_000, 5, 1], (1, 1, 1)), [1, np.nan, 1])
    # An unsigned map holds no negative label, and asking for one must not wrap around.
    unsigned = np.full((3, 3, 3), 249, np.uint8)
    np.testing.assert_array_equal(metrics.dice(unsigned, unsigned, [-7, 249]), [np.nan, 1])
    np.testing.assert_array_equal(metrics.hd95(unsigned, unsigned, [-7, 249], (1, 1, 1)), [np.nan, 0])


def test_distance_between_two_voxels_is_in_millimetres():
    fixed, moved = cube((9, 9, 9), (1, 1, 1), (1, 1, 1)), cube((9, 9, 9), (3, 5, 2), (1, 1, 1))
    spacing = (3.0, 0.5, 1.2)
    expected = (6.0**2 + 2.0**2 + 1.2**2) ** 0.5
    np.testing.assert_allclose(metrics.hd95(fixed, moved, [1], spacing), [expected])
    np.testing.assert_allclose(metrics.hd95_max(fixed, moved, [1], spacing), [expected])


def test_pooled_and_larger_differ_as_they_should():
    # A 9x9 plate, and the same plate with a tail of nine voxels: only the tail, 9 of 90 voxels, is off, 1..9 away.
    fixed = cube((24, 12, 12), (2, 1, 1), (1, 9, 9))
    moved = fixed + cube((24, 12, 12), (3, 5, 5), (9, 1, 1))
    tail = np.arange(1.0, 10.0)
    back = np.concatenate([np.zeros(81), tail])
    pooled, larger = metrics.hausdorff(fixed, moved, [1], (1, 1, 1))
    np.testing.assert_allclose(pooled, [np.percentile(np.concatenate([np.zeros(81), back]), 95)])
    np.testing.assert_allclose(larger, [np.percentile(back, 95)])
    assert 0 < pooled[0] < larger[0] < 9
    swapped = metrics.hausdorff(moved, fixed, [1], (1, 1, 1))
    np.testing.assert_allclose(swapped, (pooled, larger))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 2.0, 1.3)])
def test_distances_agree_with_a_naive_loop_and_with_medpys_definition(spacing):
    fixed, moved = blobs(2), blobs(3)
    pooled, larger = metrics.hausdorff(fixed, moved, [1, 2, 3], spacing)
    for k, label in enumerate((1, 2, 3)):
        a, b = fixed == label, moved == label
        assert a[[0, -1]].any(), "the faces of the volume are to be tested too"
        np.testing.assert_allclose((pooled[k], larger[k]), naive_hausdorff(a, b, spacing))
        np.testing.assert_allclose(pooled[k], medpy_hd95(a, b, spacing))
    np.testing.assert_array_equal(pooled, metrics.hd95(fixed, moved, [1, 2, 3], spacing))
    np.testing.assert_array_equal(larger, metrics.hd95_max(fixed, moved, [1, 2, 3], spacing))


def test_the_full_hausdorff_distance_agrees_with_simpleitk():
    # SimpleITK measures from whole masks: the same figure while neither mask lies deep inside the other.
    spacing = (0.7, 2.0, 1.3)
    fixed = cube((14, 14, 14), (1, 2, 3), (3, 3, 4)) + cube((14, 14, 14), (9, 9, 9), (2, 1, 3))
    moved = cube((14, 14, 14), (4, 2, 1), (3, 4, 3))
    images = [sitk.GetImageFromArray(v.astype(np.uint8)) for v in (fixed, moved)]
    for image in images:
        image.SetSpacing(spacing[::-1])  # SimpleITK's axes are the reverse of the array's
    peer = sitk.HausdorffDistanceImageFilter()
    peer.Execute(*images)
    pooled, larger = metrics.hausdorff(fixed, moved, [1], spacing, percent=100)
    np.testing.assert_allclose((pooled[0], larger[0]), peer.GetHausdorffDistance(), rtol=1e-5)


def test_maps_of_different_shapes_are_refused():
    small, large = np.zeros((3, 4, 5), np.int32), np.zeros((3, 4, 6), np.int32)
    with pytest.raises(ValueError, match=r"\(3, 4, 5\).*\(3, 4, 6\)"):
        metrics.dice(small, large, [1])
    with pytest.raises(ValueError, match=r"\(3, 4, 5\).*\(3, 4, 6\)"):
        metrics.hd95(small, large, [1], (1, 1, 1))


MATRICES = {
    "shear and scale": np.array([[1.2, 0.3, -0.1], [0.05, 0.8, 0.2], [-0.3, 0.1, 1.1]]),
    "rotation": np.array([[np.cos(0.4), -np.sin(0.4), 0], [np.sin(0.4), np.cos(0.4), 0], [0, 0, 1]]),
    "reflection": np.diag([-0.5, 1.5, 1.0]),
}


@pytest.mark.parametrize("name", MATRICES)
def test_jacobian_of_an_affine_map_is_its_determinant(name):
    displacement = affine_displacement(MATRICES[name])
    determinant = metrics.jacobian_determinant(displacement)
    assert determinant.dtype == np.float32, "no silent copy in double precision"
    assert determinant.shape == (6, 7, 8)
    np.testing.assert_allclose(determinant, np.linalg.det(MATRICES[name]), atol=1e-5)
    assert metrics.folding_percent(displacement) == (100.0 if name == "reflection" else 0.0)
    assert metrics.sdlogj(affine_displacement(MATRICES[name])) == pytest.approx(0, abs=1e-5)


def test_jacobian_of_a_quadratic_field_has_its_closed_form():
    # u_0 = x²/20, u_1 = xy/10, u_2 = z/2: inside, det = (1 + x/10)(1 + x/10)(3/2); at the face x = 0 the one-sided
    # difference of x²/20 is 1/20, so the first factor is 1.05 there and 1 + (n - 1)/10 - 1/20 at the other face.
    n = 9
    x, y, z = np.meshgrid(*(np.arange(n, dtype=np.float64),) * 3, indexing="ij")
    displacement = np.stack([x**2 / 20, x * y / 10, z / 2], axis=-1)
    first = 1 + x / 10
    first[0] += 0.05
    first[-1] -= 0.05
    np.testing.assert_allclose(metrics.jacobian_determinant(displacement), first * (1 + x / 10) * 1.5)


def test_folding_counts_the_voxels_that_turn_over():
    # x + u runs 0 1 2 3 2 1 0 1 2 3: central differences are negative at four of ten planes (0 counts as folded too).
    run = np.array([0, 1, 2, 3, 2, 1, 0, 1, 2, 3], np.float32)
    displacement = np.zeros((10, 4, 5, 3), np.float32)
    displacement[..., 0] = (run - np.arange(10))[:, None, None]
    slope = np.array([1, 1, 1, 0, -1, -1, 0, 1, 1, 1])
    np.testing.assert_array_equal(metrics.jacobian_determinant(displacement)[:, 2, 3], slope)
    np.testing.assert_array_equal(metrics.folded(displacement)[:, 0, 0], slope <= 0)
    assert metrics.folding_percent(displacement) == pytest.approx(40)


def test_a_field_that_is_not_a_number_counts_as_folded():
    displacement = np.zeros((5, 5, 5, 3), np.float32)
    displacement[2, 2, 2, 0] = np.nan
    # Central differences see the voxel from its two neighbours on each axis, np.gradient's own voxel does not.
    assert metrics.folding_percent(displacement) == pytest.approx(100 * 6 / 125)


def test_sdlogj_is_learn2regs():
    displacement = np.random.default_rng(0).normal(size=(9, 8, 10, 3)).astype(np.float32) * 1.5
    logs = []
    for i, j, k in itertools.product(range(2, 7), range(2, 6), range(2, 8)):
        matrix = np.eye(3)
        for axis in range(3):
            step = np.eye(3, dtype=int)[axis]
            after, before = (displacement[tuple(np.array([i, j, k]) + s * step)] for s in (1, -1))
            matrix[:, axis] += (after.astype(np.float64) - before) / 2
        logs.append(np.log(np.clip(np.linalg.det(matrix) + 3, 1e-9, 1e9)))
    assert min(logs) < np.log(1e-8), "the clip is to be tested too"
    assert metrics.sdlogj(displacement) == pytest.approx(np.std(logs), rel=1e-5)


def test_a_known_determinant_is_not_computed_again():
    displacement = affine_displacement(np.eye(3))
    determinant = np.linspace(-1, 3, 6 * 7 * 8, dtype=np.float32).reshape(6, 7, 8)
    assert metrics.folding_percent(displacement, determinant=determinant) == pytest.approx(25, abs=0.3)
    expected = np.std(np.log(determinant[2:-2, 2:-2, 2:-2].astype(np.float64) + 3))
    assert metrics.sdlogj(displacement, determinant=determinant) == pytest.approx(expected, rel=1e-5)


def test_shapes_without_an_answer_are_refused(unchecked):
    with pytest.raises(ValueError, match=r"\(4, 4, 4, 2\)"):
        metrics.jacobian_determinant(np.zeros((4, 4, 4, 2), np.float32))
    with pytest.raises(ValueError, match=r"\(4, 1, 4, 3\)"):
        metrics.jacobian_determinant(np.zeros((4, 1, 4, 3), np.float32))
    with pytest.raises(ValueError, match=r"\(5, 4, 5\)"):
        metrics.sdlogj(np.zeros((5, 4, 5, 3), np.float32))


@pytest.mark.data
def test_real_brains_in_seconds(shared_data):
    import nibabel as nib

    fixed, moving = (
        np.asarray(nib.load(shared_data / "lpba40" / f"{name}_seg.nii.gz").dataobj) for name in ("S35", "S36")
    )
    start = time.monotonic()
    scores = metrics.dice(fixed, moving, LPBA40, moving)
    pooled, larger = metrics.hausdorff(fixed, moving, LPBA40, (1, 1, 1), moving)
    seconds = time.monotonic() - start
    for k in (0, 24, 53):
        a, b = fixed == LPBA40[k], moving == LPBA40[k]
        assert scores[k] == pytest.approx(2 * np.sum(a & b) / (a.sum() + b.sum()))
        assert pooled[k] == pytest.approx(medpy_hd95(*crop(a, b), (1, 1, 1)))
    assert np.all(larger >= pooled - 1e-9)
    assert seconds < 15, f"{seconds:.1f} s: on 2 cores it takes about 1.2"


def crop(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    (box,) = ndimage.find_objects((a | b).astype(np.uint8))
    return a[box], b[box]
