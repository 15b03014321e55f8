"""Surface distances against closed forms, naive loops, SciPy's distance transform, SimpleITK and stored numbers."""

import itertools
import time

import numpy as np
import pytest
import SimpleITK as sitk
from label_maps import LPBA40, blobs, crop, cube
from scipy import ndimage

from dilformer_jax.ops import folding, overlap, surfaces, surfels
from dilformer_jax.ops.surfaces import surface_scores

KEYS = ("hd", "hd95", "assd", "hd95_max", "nsd")


def naive_surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    def inside(voxel: tuple[int, ...]) -> bool:
        return all(0 <= i < n for i, n in zip(voxel, mask.shape, strict=True)) and bool(mask[voxel])

    steps = [step for step in itertools.product((-1, 0, 1), repeat=3) if np.abs(step).sum() == 1]
    voxels = [tuple(int(i) for i in voxel) for voxel in np.argwhere(mask)]
    return [v for v in voxels if not all(inside((v[0] + a, v[1] + b, v[2] + c)) for a, b, c in steps)]


def naive_distances(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> list[float]:
    first, second = naive_surface(a), naive_surface(b)

    def directed(these, those):
        return [
            min(sum(((p - q) * s) ** 2 for p, q, s in zip(x, y, spacing, strict=True)) ** 0.5 for y in those)
            for x in these
        ]

    return directed(first, second) + directed(second, first)


def medpy_hd95(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> float:
    """MedPy's definition in SciPy's own words: the surface by erosion, the distance by a transform."""
    surface_a, surface_b = (m ^ ndimage.binary_erosion(m, ndimage.generate_binary_structure(3, 1)) for m in (a, b))
    to_a, to_b = (ndimage.distance_transform_edt(~s, sampling=spacing) for s in (surface_a, surface_b))
    return float(np.percentile(np.hstack([to_b[surface_a], to_a[surface_b]]), 95))


def score(key: str, fixed: np.ndarray, moved: np.ndarray, spacing=(1, 1, 1), **options) -> float:
    return float(surface_scores(fixed, moved, [1], spacing, only=[key], **options)[key][0])


def test_distance_between_two_voxels_is_in_millimetres():
    fixed, moved = cube((9, 9, 9), (1, 1, 1), (1, 1, 1)), cube((9, 9, 9), (3, 5, 2), (1, 1, 1))
    found = surface_scores(fixed, moved, [1], (3.0, 0.5, 1.2))
    expected = (6.0**2 + 2.0**2 + 1.2**2) ** 0.5
    np.testing.assert_allclose([found[key][0] for key in ("hd", "hd95", "assd")], expected)
    # Between corners, one axis of three is nearer by a voxel at half of them: of eight corners of equal area, one is
    # near in all three axes, and one far in all, which is as far as the centres are.
    np.testing.assert_allclose(found["hd95_max"], expected)
    near = (3.0**2 + 1.5**2 + 0) ** 0.5
    for tolerance, part in ((near - 1e-6, 0), (near + 1e-6, 1 / 8), (expected - 1e-6, 7 / 8), (expected + 1e-6, 1)):
        assert score("nsd", fixed, moved, (3.0, 0.5, 1.2), tolerance=tolerance) == pytest.approx(part)


def test_a_tail_shows_in_each_measure_as_it_should():
    # A 9x9 plate, and the same plate with a tail of nine voxels: only the tail, 9 of 90 voxels, is off, 1..9 away.
    fixed = cube((24, 12, 12), (2, 1, 1), (1, 9, 9))
    moved = fixed + cube((24, 12, 12), (3, 5, 5), (9, 1, 1))
    pooled = np.concatenate([np.zeros(162), np.arange(1.0, 10.0)])
    found = surface_scores(fixed, moved, [1], (1, 1, 1))
    np.testing.assert_allclose(found["hd95"], [np.percentile(pooled, 95)])
    assert found["hd"][0] == 9 and found["assd"][0] == pytest.approx(45 / 171)
    swapped = surface_scores(moved, fixed, [1], (1, 1, 1))
    np.testing.assert_allclose([swapped[key] for key in KEYS], [found[key] for key in KEYS])


def test_the_surface_distances_of_deepmind_weigh_by_area():
    # A cube of 3 voxels has 4 corners of area 1 in each face, 2 of area sqrt(1/2) in each edge and 8 of sqrt(3)/8. A
    # voxel apart has eight of the latter: 12.5 % of all corners, and less than 5 % of the area. Beside a cube of 2 it
    # is more. Its nearer corners are 5 voxels from the cube, along the axis that both lie on, and its farther ones 6.
    voxel = 8 * np.sqrt(3) / 8
    for size, expected in ((3, 0), (2, 5)):
        fixed = cube((14, 8, 8), (1, 1, 1), (size, size, size))
        moved = fixed + cube((14, 8, 8), (size + 6, 1, 1), (1, 1, 1))
        body = 6 * (size - 1) ** 2 + 12 * (size - 1) * np.sqrt(1 / 2) + voxel
        assert (voxel / (body + voxel) < 0.05) == (size == 3)
        assert score("hd95_max", fixed, moved) == expected
        assert score("nsd", fixed, moved) == pytest.approx(2 * body / (2 * body + voxel))
        assert score("nsd", fixed, moved, tolerance=5) == pytest.approx((2 * body + voxel / 2) / (2 * body + voxel))
        assert score("hd95", fixed, moved) < score("hd", fixed, moved) == 6


def test_plates_are_apart_by_their_distance():
    # Corners of plates one voxel thick lie in two layers: of each plate, one is 2 layers from the other plate, one 3.
    fixed, moved = (cube((12, 5, 6), (start, 0, 0), (1, 5, 6)) for start in (4, 7))
    assert score("hd95", fixed, moved, (1.5, 1, 1)) == 4.5 == score("hd95_max", fixed, moved, (1.5, 1, 1))
    for tolerance, part in ((2.9, 0), (3, 0.5), (4.4, 0.5), (4.5, 1)):
        assert score("nsd", fixed, moved, (1.5, 1, 1), tolerance=tolerance) == pytest.approx(part)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 2.0, 1.3)])
def test_distances_agree_with_a_naive_loop_and_with_medpys_definition(spacing):
    fixed, moved = blobs(2), blobs(3)
    found = surface_scores(fixed, moved, [1, 2, 3], spacing)
    for k, label in enumerate((1, 2, 3)):
        a, b = fixed == label, moved == label
        assert a[[0, -1]].any(), "the faces of the volume are to be tested too"
        naive = naive_distances(a, b, spacing)
        np.testing.assert_allclose(found["hd"][k], np.max(naive))
        np.testing.assert_allclose(found["hd95"][k], np.percentile(naive, 95))
        np.testing.assert_allclose(found["assd"][k], np.mean(naive))
        np.testing.assert_allclose(found["hd95"][k], medpy_hd95(a, b, spacing))


# MedPy 0.5.2 (hd, hd95, assd) and DeepMind's surface-distance 0.1 (compute_robust_hausdorff(..., 95) and
# compute_surface_dice_at_tolerance(..., 1.0)) of blobs(2) and blobs(3) at (0.7, 2.0, 1.3) mm, labels 1 to 3.
STORED = {
    1: (6.649060083951716, 4.601086828130937, 2.062918826270047, 4.199999999999999, 0.4463867740659019),
    2: (5.06951674225463, 3.906232255123174, 1.564594039307104, 3.9000000000000004, 0.5575474944398482),
    3: (7.632168761236874, 4.382921400162226, 1.9311917042048246, 4.382921400162226, 0.44536475731259884),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("label", STORED)
def test_the_measures_are_those_stored(label, workers):
    found = surface_scores(blobs(2), blobs(3), [label], (0.7, 2.0, 1.3), workers=workers)
    np.testing.assert_allclose([found[key][0] for key in KEYS], STORED[label], atol=1e-9)


def test_near_points_are_as_far_as_the_tree_says(monkeypatch):
    spacing = (0.7, 2.0, 1.3)
    found = surface_scores(blobs(2), blobs(3), [1, 2, 3], spacing)
    reach = surfaces.REACH * np.prod(spacing) ** (1 / 3)
    assert (found["assd"] < reach).all() and (found["hd"] > reach).all(), "both ways are to be tested"
    monkeypatch.setattr(surfaces, "_ball", lambda size: (np.zeros((1, 3), int), np.zeros(1)))
    by_tree = surface_scores(blobs(2), blobs(3), [1, 2, 3], spacing)
    for key in KEYS:
        np.testing.assert_array_equal(found[key], by_tree[key])


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
    assert score("hd", fixed, moved, spacing) == pytest.approx(peer.GetHausdorffDistance(), rel=1e-5)


def test_areas_of_the_marching_cubes():
    """The area of each of Lorensen and Cline's cases, from its picture, whichever of its corners it begins at."""
    corner, edge = np.sqrt(3) / 8, np.sqrt(1 / 2)
    cases = {
        (): 0,
        ("000",): corner,
        ("000", "001"): edge,
        ("000", "011"): 2 * corner,
        ("000", "111"): 2 * corner,
        ("000", "001", "010"): 1 / 2 + 3 * corner,  # half a plane and the corner between the two edges
        ("000", "001", "110"): edge + corner,
        ("001", "010", "100"): 3 * corner,
        ("000", "001", "010", "011"): 1,
        ("000", "001", "010", "100"): 6 * corner,  # a regular hexagon
        ("000", "001", "010", "111"): 1 / 2 + 4 * corner,
        ("000", "001", "110", "111"): 2 * edge,
        ("000", "001", "011", "111"): edge + 4 * corner,
        ("000", "011", "101", "110"): 4 * corner,
    }
    found = surfels.areas((1, 1, 1))
    seen = np.zeros(256, bool)
    for case, expected in cases.items():
        cells = np.zeros((2, 2, 2), bool)
        for place in case:
            cells[tuple(int(i) for i in place)] = True
        for axes in itertools.permutations(range(3)):
            for flips in itertools.product((1, -1), repeat=3):
                turned = cells.transpose(axes)[:: flips[0], :: flips[1], :: flips[2]]
                for mask in (turned, ~turned):
                    code = surfels.codes(mask)[1, 1, 1]
                    assert found[code] == pytest.approx(expected, abs=1e-12)
                    seen[code] = True
    assert seen.all()
    # Of the planes, at any spacing: as large as the corner's share of the grid.
    halves = [np.broadcast_to(np.array([True, False]).reshape(np.roll((2, 1, 1), k)), (2, 2, 2)) for k in range(3)]
    planes = [surfels.areas((0.5, 3.0, 2.0))[surfels.codes(half)[1, 1, 1]] for half in halves]
    np.testing.assert_allclose(planes, [3.0 * 2.0, 0.5 * 2.0, 0.5 * 3.0])


def test_absent_and_vanished_structures_and_labels_that_are_large_or_negative():
    shape = (8, 8, 8)
    everywhere = cube(shape, (0, 0, 0), (3, 3, 3), label=1)
    fixed = everywhere + cube(shape, (5, 5, 5), (2, 2, 2), label=2) + cube(shape, (5, 0, 0), (2, 2, 2), label=3)
    moving = everywhere + cube(shape, (5, 5, 5), (1, 1, 1), label=2) + cube(shape, (0, 5, 0), (2, 2, 2), label=4)
    moved = np.roll(everywhere, 1, axis=0)  # label 2 was one voxel, and no voxel of the fixed grid sampled it
    found = surface_scores(fixed, moved, [1, 2, 3, 4, 9], (2, 1, 1), moving)
    for key in KEYS:
        vanished = 0 if key == "nsd" else np.nan
        np.testing.assert_array_equal(found[key][1:], [vanished, np.nan, np.nan, np.nan])
        assert found[key][0] > 0
        alone = surface_scores(fixed, moved, [1, 2, 3, 4, 9], (2, 1, 1))[key]
        np.testing.assert_array_equal(alone[1:], np.nan)
    atlas = cube((6, 6, 6), (0, 0, 0), (2, 2, 2), 1) + cube((6, 6, 6), (3, 3, 3), (2, 2, 2), 2_000_000_000)
    hd95 = surface_scores(atlas, np.roll(atlas, 1, axis=0), [2_000_000_000, 5, 1], (1, 1, 1))["hd95"]
    np.testing.assert_array_equal(hd95, [1, np.nan, 1])
    unsigned = np.full((3, 3, 3), 249, np.uint8)
    np.testing.assert_array_equal(surface_scores(unsigned, unsigned, [-7, 249], (1, 1, 1))["hd95"], [np.nan, 0])
    assert all(values.shape == (0,) for values in surface_scores(fixed, fixed, [], (1, 1, 1)).values())


def test_only_what_is_asked_for_is_measured(monkeypatch):
    fixed, moved = blobs(2), blobs(3)
    whole = surface_scores(fixed, moved, [1, 2, 3], (0.7, 2.0, 1.3))
    assert [*whole] == [*KEYS]
    for key in KEYS:
        found = surface_scores(fixed, moved, [1, 2, 3], (0.7, 2.0, 1.3), only={key})
        assert [*found] == [key]
        np.testing.assert_array_equal(found[key], whole[key])
    monkeypatch.setattr(surfels, "codes", None)
    surface_scores(fixed, moved, [1, 2, 3], (0.7, 2.0, 1.3), only=("hd95", "hd"))
    with pytest.raises(ValueError, match="hd95_max, nsd, got hd95, hd96"):
        surface_scores(fixed, moved, [1], (1, 1, 1), only=("hd95", "hd96"))


def test_maps_of_different_shapes_are_refused():
    small, large = np.zeros((3, 4, 5), np.int32), np.zeros((3, 4, 6), np.int32)
    with pytest.raises(ValueError, match=r"\(3, 4, 5\).*\(3, 4, 6\)"):
        surface_scores(small, large, [1], (1, 1, 1))


@pytest.mark.data
def test_all_measures_of_two_real_brains_in_seconds(shared_data):
    import nibabel as nib

    fixed, moving = (
        np.asarray(nib.load(shared_data / "lpba40" / f"{name}_seg.nii.gz").dataobj) for name in ("S35", "S36")
    )
    noise = np.random.default_rng(0).normal(size=(20, 24, 20, 3)).astype(np.float32)
    u = np.ascontiguousarray(ndimage.zoom(noise, (8, 8, 8, 1), order=1))
    mask = fixed > 0
    surfels.areas((1, 1, 1))  # its table is made once
    start, used = time.perf_counter(), time.process_time()
    dice = overlap.dice(fixed, moving, LPBA40, moving)
    overlap.target_overlap(fixed, moving, LPBA40, moving)
    overlap.union_overlap(fixed, moving, LPBA40, moving)
    overlap.totals(fixed, moving, LPBA40)
    found = surface_scores(fixed, moving, LPBA40, (1, 1, 1), moving)
    determinant = folding.jacobian_determinant(u)
    folding.folding_percent(u, determinant=determinant)
    folding.folding_percent(u, determinant=determinant, mask=mask)
    folding.sdlogj(u, determinant=determinant)
    folding.ndv_percent(u)
    folding.ndv_percent(u, mask)
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    for k in (0, 24, 53):
        a, b = fixed == LPBA40[k], moving == LPBA40[k]
        assert dice[k] == pytest.approx(2 * np.sum(a & b) / (a.sum() + b.sum()))
        assert found["hd95"][k] == pytest.approx(medpy_hd95(*crop(a, b), (1, 1, 1)))
    assert cpu < 12, f"{cpu:.1f} s of CPU time: it takes about 3.4"
    assert seconds < 20, f"{seconds:.1f} s"
