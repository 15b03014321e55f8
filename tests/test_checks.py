"""Verdicts at, below and beyond the stated thresholds."""

import math

import pytest

from dilformer_jax.registration.checks import Check, checks, verdict

GOOD = {
    "affine_overlap": 0.9,
    "correlation_before": 0.2,
    "correlation_affine": 0.7,
    "correlation": 0.9,
    "dice_before": 0.1,
    "dice_affine": 0.5,
    "dice": 0.7,
    "outside_grid_percent": 0.0,
    "folding_percent": 0.01,
    "inverse_mean_mm": 0.05,
    "inverse_p99_mm": 0.3,
    "inverse_unconverged_percent": 0.0,
    "displacement_p95_mm": 8.0,
    "extent_mm": 160.0,
    "sdlogj": 0.1,
}


def found(**metrics) -> dict[str, Check]:
    return {check.name: check for check in checks(metrics)}


def test_a_good_registration_passes_every_check():
    assert {check.verdict for check in checks(GOOD)} == {"pass"} and len(checks(GOOD)) == 10
    assert verdict(checks(GOOD)) == "pass"


@pytest.mark.parametrize(
    ("metric", "name", "warning", "failing"),
    [
        ("folding_percent", "folding", 0.2, 1.5),
        ("inverse_mean_mm", "inverse error, mean", 0.6, 2.1),
        ("inverse_p99_mm", "inverse error, 99th percentile", 3, 6),
        ("inverse_unconverged_percent", "inverse not converged", 0.2, 2),
        ("affine_overlap", "affine overlap", 0.4, 0.1),
        ("outside_grid_percent", "fixed content outside the model grid", 2, 20),
        ("displacement_p95_mm", "displacement against size", 20, 50),
        ("correlation", "gain in correlation", 0.68, 0.6),
        ("dice", "gain in Dice", 0.49, 0.4),
    ],
)
def test_a_metric_beyond_its_thresholds_warns_and_fails(metric, name, warning, failing):
    for value, expected in ((warning, "warn"), (failing, "fail"), (math.nan, "fail")):
        results = checks({**GOOD, metric: value})
        assert {check.name: check.verdict for check in results if check.verdict != "pass"} == {name: expected}
        assert verdict(results) == expected


def test_thresholds_themselves_pass():
    assert found(folding_percent=0.1)["folding"].verdict == "pass"
    assert found(folding_percent=1.0)["folding"].verdict == "warn"
    assert found(affine_overlap=0.5)["affine overlap"].verdict == "pass"
    assert found(dice_before=0.5, dice=0.5)["gain in Dice"].verdict == "pass"


def test_the_gain_is_over_the_better_start():
    gain = found(dice_before=0.4, dice_affine=0.3, dice=0.6)["gain in Dice"]
    assert gain.value == pytest.approx(0.2)
    assert found(correlation_before=-0.1, correlation=0.6)["gain in correlation"].value == pytest.approx(0.7)
    relative = found(displacement_p95_mm=17.0, extent_mm=170.0)["displacement against size"]
    assert (relative.value, relative.unit) == (pytest.approx(10), "%")


def test_a_poor_correlation_between_contrasts_warns_at_worst():
    assert found(correlation_affine=-0.9)["similarity after the affine"].verdict == "warn"


def test_what_was_not_measured_is_not_checked():
    assert checks({}) == () and verdict(()) == "warn"
    assert list(found(dice=0.7, folding_percent=0.0)) == ["folding"]
    assert not found(dice_before=math.nan, dice=math.nan)
    assert not found(displacement_p95_mm=8.0)


def test_thresholds_are_stated():
    assert found(folding_percent=0.0)["folding"].thresholds == "warn > 0.1, fail > 1"
    assert found(affine_overlap=0.0)["affine overlap"].thresholds == "warn < 0.5, fail < 0.2"
    assert found(correlation_affine=0.0)["similarity after the affine"].thresholds == "warn < 0.3"
    assert all(check.meaning for check in checks(GOOD))
