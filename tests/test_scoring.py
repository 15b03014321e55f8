"""A pair's scores against what is known of boxes moved by whole voxels, and pairs that are kept and found again."""

import dataclasses
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from toys import affine, write

from dilformer_jax.data.subjects import Pair, Subject
from dilformer_jax.io.volumes import BadInput, Volume
from dilformer_jax.registration import evaluation, methods
from dilformer_jax.registration.scoring import DEFINITION, Case, Scoring, dice_of, row
from dilformer_jax.reporting import tables

SIDES = (1.0, 1.5, 2.0)  # mm a voxel
PAIR = Pair(Subject("a", Path("a.nii"), None), Subject("b", Path("b.nii"), None))


def volume(array: np.ndarray) -> Volume:
    return Volume(array.astype(np.float32), np.diag([*SIDES, 1.0]), Path("a.nii"), nib.Nifti1Header())


def boxes() -> np.ndarray:
    """Box 3 of 4x6x6 voxels, box 5 of 2x2x2, and box 9 that only the fixed subject has."""
    labels = np.zeros((14, 16, 15), np.int32)
    labels[2:6, 3:9, 3:9], labels[8:10, 8:10, 8:10], labels[11:13, 2:4, 2:4] = 3, 5, 9
    return labels


def case(u=(0.0, 0.0, 0.0), shift=1, backward=None) -> Case:
    fixed = boxes()
    moving = np.roll(np.where(fixed == 9, 0, fixed), shift, 0)
    image = np.where(fixed > 0, 100.0, 0.0)
    field = np.broadcast_to(np.float32(u), (*fixed.shape, 3)).copy()
    return Case(PAIR, volume(image), volume(image), fixed, moving, field, 0.25, backward)


def test_scores_of_boxes_moved_by_a_voxel():
    found = row(case(), Scoring((3, 5, 9)))
    assert found["dice_per_label"] == {3: 0.75, 5: 0.5, 9: pytest.approx(np.nan, nan_ok=True)}
    assert found["dice"] == found["dice_before"] == found["dice_trilinear"] == 0.625
    assert found["dice_absent0"] == pytest.approx(1.25 / 3) and found["absent"] == [9]
    assert found["target_overlap"] == 0.625 and found["union_overlap_per_label"][3] == pytest.approx(3 / 5)
    # Klein's sums are of 144, 8 and 8 voxels in the fixed map, 144 and 8 in the moving one, 108 and 4 in both.
    assert found["total_target_overlap"] == pytest.approx(112 / 160)
    assert found["total_mean_overlap"] == pytest.approx(2 * 112 / (160 + 152))
    assert found["total_union_overlap"] == pytest.approx(112 / (160 + 152 - 112))
    assert found["hd"] == found["hd95"] == found["hd95_max"] == 1.0  # one voxel of 1 mm along axis 0
    assert 0 < found["assd"] < 1 and found["nsd"] == 1.0
    assert row(case(), Scoring((3, 5, 9), tolerance=0.9))["nsd"] < 1
    assert found["folding_percent"] == found["ndv_percent"] == found["sdlogj"] == 0 and found["seconds"] == 0.25


def test_the_displacement_takes_the_labels_back():
    found = row(case((1.0, 0, 0)), Scoring((3, 5)))
    assert found["dice"] == found["dice_trilinear"] == 1 and found["dice_before"] == 0.625
    assert found["hd95"] == 0 and found["hd95_before"] == 1.0
    # Between two voxels nearest takes the even one, and one-hot maps tie, which the smaller label wins.
    between = row(case((0.75, 0, 0), shift=1), Scoring((3, 5)))
    assert between["dice"] == 1 and between["dice_trilinear"] == 1
    assert dice_of(case((1.0, 0, 0)), (3, 5)) == {"dice_identity": 0.625, "dice": 1.0}


def test_what_warping_removes_counts_as_zero():
    found = row(case((-5.0, 0, 0)), Scoring((3, 5, 9)))
    assert found["vanished"] == [5] and found["dice_per_label"][5] == 0 and found["nsd_per_label"][5] == 0
    assert np.isnan(found["hd95_per_label"][5]) and found["absent"] == [9]


def test_groups_are_means_of_their_members_with_absent_ones_as_zero():
    found = row(case(), Scoring((3, 5, 9), {"one": (3,), "both": (5, 9)}))
    assert found["dice_groups"] == found["dice_trilinear_groups"] == pytest.approx((0.75 + 0.5 / 2) / 2)
    assert "dice_groups" not in row(case(), Scoring((3, 5, 9)))


def test_exchanged_images_should_give_the_inverse():
    back = np.broadcast_to(np.float32((-0.5, 1.0, 0.0)), (14, 16, 15, 3)).copy()
    found = row(case((1.0, 0, 0), backward=back), Scoring((3,)))
    assert found["inverse_consistency_mm"] == pytest.approx(np.hypot(0.5, 1.5), rel=1e-5)
    assert "inverse_consistency_mm" not in row(case(), Scoring((3,)))


def test_landmarks_are_where_the_displacement_takes_them(tmp_path):
    fixed = case((1.0, -2.0, 0.5))
    voxels = np.array([[3, 8, 4], [7.5, 9, 6.25]])
    known = dataclasses.replace(fixed, points=(voxels, voxels + [1.0, -2.0, 0.5 + 1.5]))
    found = row(known, Scoring((3,)))
    assert found["tre_mm"] == pytest.approx(1.5 * 2)  # voxels of 2 mm along axis 2
    assert found["tre_before_mm"] == pytest.approx(np.linalg.norm([1, 2 * 1.5, 2 * 2]))


def test_folding_is_told_of_the_whole_and_of_what_the_image_shows():
    folded = case()
    # x + u turns over at two planes of three voxels and more, all of them outside of the bright boxes.
    folded.displacement[:, 13:, :, 1] = -6.0
    found = row(folded, Scoring((3,)))
    turned = 14 * 2 * 15 / (14 * 16 * 15)  # central differences see it from the planes on either side
    assert found["folding_percent"] == pytest.approx(100 * turned) and found["folding_mask_percent"] == 0
    assert found["ndv_percent"] > 0


def test_every_metric_of_the_tables_is_defined():
    scoring = Scoring((3,), {"one": (3,)}, 2.0)
    assert set(tables.METRICS) <= set(scoring.definition)
    assert scoring.definition["nsd"].endswith("tolerance 2 mm")
    assert set(DEFINITION) - set(Scoring((3,)).definition) == {"dice_groups", "dice_trilinear_groups"}


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    subjects = []
    for number, name in enumerate("abc"):
        labels = np.roll(boxes(), number, 0).astype(np.uint8)
        image = write(tmp_path / f"{name}_t1.nii.gz", labels * 10.0, affine())
        subjects.append(Subject(name, image, write(tmp_path / f"{name}_seg.nii.gz", labels, affine())))
    return [Pair(subjects[0], subjects[1]), Pair(subjects[1], subjects[2]), Pair(subjects[2], subjects[0])]


def counting(calls: list[str]) -> methods.Method:
    def displacement(fixed: Volume, moving: Volume) -> np.ndarray:
        calls.append(moving.path.name[0])
        return np.zeros((*fixed.array.shape, 3), np.float32)

    return methods.Method("counting", displacement, parameters=12)


def test_landmarks_are_read_in_either_space(pairs, tmp_path):
    voxels = np.array([[3.0, 8, 4], [7.5, 9, 6.25]])
    moved = nib.affines.apply_affine(affine(), voxels + [1, 0, 0])
    for name, header, rows in (("a", "i,j,k", voxels), ("b", "x_ras,y_ras,z_ras", moved), ("c", "i,j,k", voxels[:1])):
        np.savetxt(tmp_path / f"{name}.csv", rows, delimiter=",", header=header, comments="")
    with_points = lambda name: dataclasses.replace(pairs[0], points=(tmp_path / "a.csv", tmp_path / f"{name}.csv"))
    kept = evaluation.Kept(tmp_path / "rows", [with_points("b")], {})
    (found,) = evaluation.scores([with_points("b")], methods.identity(), Scoring((3,)), kept)
    assert found["tre_mm"] == pytest.approx(1.0, abs=1e-4)  # voxels of 1 mm along axis 0
    with pytest.raises(BadInput, match=r"a.csv has 2 points and .*c.csv 1; give landmarks"):
        evaluation.registered(with_points("c"), methods.identity())


def test_scored_pairs_are_kept_and_found_again(pairs, tmp_path):
    calls: list[str] = []
    method, scoring, folder = counting(calls), Scoring((3, 5)), tmp_path / "rows"
    kept = evaluation.Kept(folder, pairs, {"a": (1, 2)})
    assert not folder.exists() and kept.row(pairs[0]) is None
    first = next(evaluation.scores(pairs, method, scoring, kept))
    assert first["name"] == "b_to_a" and first["dice_per_label"][3] == 0.75

    calls.clear()
    again = evaluation.Kept(folder, pairs, {"a": [1, 2]})
    assert again.row(pairs[0]) == first
    rest = list(evaluation.scores(pairs, method, scoring, again))
    assert [found["name"] for found in rest] == ["c_to_b", "a_to_c"] and calls == ["c", "a"]
    assert again.row(pairs[2]) == rest[1]

    assert evaluation.Kept(folder, pairs, {"a": [1, 3]}).row(pairs[0]) is None, "other settings, other scores"
    assert evaluation.Kept(folder, pairs[::-1], {"a": [1, 2]}).row(pairs[0]) is None, "another pair's row"
    os.utime(pairs[0].moving.labels, ns=(1, 1))
    assert again.row(pairs[0]) is None and again.row(pairs[2]) is not None, "a file has changed"
    (folder / "00002.json").write_text("{")
    assert again.row(pairs[2]) is None
    again.clear()
    assert not folder.exists()


def test_time_is_measured_apart_from_scoring_and_once(pairs, tmp_path):
    calls: list[str] = []
    kept = evaluation.Kept(tmp_path / "rows", pairs, {})
    found = kept.timing(pairs[1], counting(calls))
    assert len(calls) == 1 + evaluation.TIMED_RUNS == 1 + found["runs"]
    assert found["device"].endswith(f"{os.cpu_count()} cores") and len(found["device"]) > 12
    assert 0 < found["median_seconds"] < 0.1 and found["pair"] == "c_to_b" and found["parameters"] == 12
    assert kept.timing(pairs[1], counting(calls)) == found and len(calls) == 6
    assert json.loads((tmp_path / "rows" / "timing.json").read_text())["found"] == found


def test_a_method_that_does_not_warm_up_runs_once_where_it_is_slow(pairs, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(evaluation, "TIMED_SECONDS", 0.0)
    method = methods.Method("slow", counting(calls).displacement, warms_up=False)
    found = evaluation.timing(pairs[0], method)
    assert len(calls) == found["runs"] == 1 and found["compile_seconds"] == 0
