"""Intervals over subjects, tests and effect sizes, against simulations, naive loops and other programs."""

import itertools

import numpy as np
import pytest
from scipy import stats

from dilformer_jax.reporting import statistics

ORDERED = list(itertools.permutations("ABCDEFGH", 2))


def design(pairs):
    return statistics.design(*zip(*pairs, strict=True))


def crossed(pairs, replicates: int, atlas: bool = False) -> np.ndarray:
    """Values of (pairs, replicates) whose mean is 0.7, with an effect of each fixed and of each moving brain."""
    generator = np.random.default_rng(1)
    names = sorted({brain for pair in pairs for brain in pair})
    fixed, moving = (np.array([names.index(pair[k]) for pair in pairs]) for k in (0, 1))
    of_fixed, of_moving = generator.normal(0, [[[0.05]], [[0.03]]], (2, len(names), replicates))
    noise = generator.normal(0, 0.02, (len(pairs), replicates))
    return 0.7 + (0 if atlas else of_fixed[fixed]) + of_moving[moving] + noise


@pytest.mark.parametrize("kind", ["ordered", "atlas", "two sets"])
def test_intervals_cover_the_true_mean(kind):
    pairs = {
        "ordered": ORDERED,
        "atlas": [("atlas", f"S{k:02}") for k in range(10)],
        "two sets": [(f"F{j}", f"M{k}") for j in range(8) for k in range(12)],
    }[kind]
    values = crossed(pairs, replicates=400, atlas=kind == "atlas")
    of = design(pairs)
    low, high = statistics.interval(statistics.resampled_means(values, of, resamples=1000), of)
    covered = np.mean((low < 0.7) & (high > 0.7))
    assert 0.92 <= covered <= 0.99
    if kind == "ordered":  # what taking pairs for independent would claim
        half = stats.t.ppf(0.975, len(pairs) - 1) * values.std(axis=0, ddof=1) / np.sqrt(len(pairs))
        assert np.mean(np.abs(values.mean(axis=0) - 0.7) < half) < 0.6


def naive(pairs, values, drawn_fixed, drawn_moving) -> float:
    """The mean over the pairs of all brains that were drawn, each as often as it was."""
    where = {pair: value for pair, value in zip(pairs, values, strict=True) if np.isfinite(value)}
    found = [where[pair] for pair in itertools.product(drawn_fixed, drawn_moving) if pair in where]
    return float(np.mean(found)) if found else float("nan")


def test_resampling_ordered_pairs_is_a_loop_over_the_brains_drawn():
    pairs = list(itertools.permutations("ABCD", 2))
    values = np.random.default_rng(2).normal(size=(12, 3))
    values[3, 1] = values[7, 1] = np.nan
    means = statistics.resampled_means(values, design(pairs), resamples=60, seed=5)
    counts = np.random.default_rng(5).multinomial(4, [0.25] * 4, 60)
    order = list(dict.fromkeys(brain for pair in pairs for brain in pair))
    for mean, count in zip(means, counts, strict=True):
        drawn = [brain for brain, times in zip(order, count, strict=True) for _ in range(times)]
        expected = [naive(pairs, column, drawn, drawn) for column in values.T]
        np.testing.assert_allclose(mean, expected, rtol=1e-12)
    assert np.isnan(means).any() and np.isfinite(means).mean() > 0.9  # one brain four times has no pair


def test_resampling_two_sets_is_a_loop_over_both():
    pairs = [(fixed, moving) for fixed in "AB" for moving in "wxyz"]
    values = np.random.default_rng(3).normal(size=(8, 1))
    of = design(pairs)
    assert of.sizes == (2, 4) and of.units == 2
    means = statistics.resampled_means(values, of, resamples=50, seed=7)
    generator = np.random.default_rng(7)
    sides = [(b, generator.multinomial(len(b), [1 / len(b)] * len(b), 50)) for b in ("AB", "wxyz")]
    for k in range(50):
        drawn = ["".join(b * n for b, n in zip(brains, counts[k], strict=True)) for brains, counts in sides]
        assert means[k, 0] == pytest.approx(naive(pairs, values[:, 0], *drawn))


def test_what_is_drawn_depends_on_how_the_pairs_share_brains():
    assert design(ORDERED).sizes == (8,)
    assert design([("atlas", s) for s in "ABC"]).sizes == (3,)  # the atlas is in every pair
    assert design([(s, "atlas") for s in "ABC"]).sizes == (3,)
    assert design([("A", "B"), ("B", "C"), ("C", "D")]).sizes == (4,)
    assert design([("A", "a"), ("B", "b"), ("C", "c")]).sizes == (3,)  # pairs of their own brains: pairs are drawn
    assert design([("A", "a"), ("a", "A"), ("B", "b"), ("b", "B")]).sizes == (2,)
    two = design([("A", "B"), ("B", "A")])
    assert two.sizes == () and two.units == 0
    assert np.isnan(statistics.interval(statistics.resampled_means(np.array([[0.1], [0.2]]), two, 100), two)).all()


def test_pairs_of_their_own_brains_are_drawn_as_pairs():
    values = np.arange(6.0)[:, None]
    of = design([(f"F{k}", f"M{k}") for k in range(6)])
    weights = statistics.weights(of, 6, 200, np.random.default_rng(0))
    np.testing.assert_array_equal(weights.sum(axis=1), 6)
    means = statistics.resampled_means(values, of, 20_000)
    assert means.std() == pytest.approx(values.std() / np.sqrt(6), rel=0.02)


def test_the_interval_of_few_subjects_is_as_wide_as_students():
    values = np.random.default_rng(4).normal(size=(9, 1))
    of = design([("atlas", f"S{k}") for k in range(9)])
    low, high = statistics.interval(statistics.resampled_means(values, of, 40_000), of)
    student = stats.ttest_1samp(values[:, 0], 0).confidence_interval(0.95)
    assert high[0] - low[0] == pytest.approx(student.high - student.low, rel=0.08)


def test_a_seed_decides_and_columns_share_the_resamples():
    values = np.random.default_rng(6).normal(size=(56, 2))
    of = design(ORDERED)
    both = statistics.resampled_means(values, of, 1500)
    np.testing.assert_array_equal(both, statistics.resampled_means(values, of, 1500))
    assert not np.array_equal(both, statistics.resampled_means(values, of, 1500, seed=1))
    difference = statistics.resampled_means(values[:, :1] - values[:, 1:], of, 1500)
    np.testing.assert_allclose(difference[:, 0], both[:, 0] - both[:, 1], atol=1e-12)


def test_holm():
    p = np.array([0.01, 0.04, 0.03, np.nan, 0.005])
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04, which may not be less than what stands before it
    np.testing.assert_allclose(statistics.holm(p), [0.03, 0.06, 0.06, np.nan, 0.02])
    np.testing.assert_allclose(statistics.holm(np.array([0.6, 0.5])), [1, 1])
    assert np.isnan(statistics.holm(np.array([np.nan]))).all()


def test_holm_as_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(8).uniform(size=20) ** 3
    np.testing.assert_allclose(statistics.holm(p), multitest.multipletests(p, method="holm")[1])


def test_wilcoxon():
    assert statistics.wilcoxon(np.array([0.1, 0.3, 0.2, np.nan, 0.6, 0.4, 0.5])) == 2 / 2**6
    differences = np.random.default_rng(9).normal(0.3, 1, 80)
    expected = stats.wilcoxon(differences + 1, np.ones(80)).pvalue
    assert statistics.wilcoxon(differences) == pytest.approx(expected) and 0 < expected < 0.5
    assert statistics.wilcoxon(np.zeros(5)) == 1
    assert np.isnan(statistics.wilcoxon(np.full(3, np.nan)))


def test_rank_biserial_is_what_wilcoxons_statistic_says():
    assert statistics.rank_biserial(np.array([0.1, 0.2, 0.3, -0.4, 0.0, np.nan])) == pytest.approx((6 - 4) / 10)
    assert statistics.rank_biserial(np.array([1.0, 1.0, -2.0])) == pytest.approx((1.5 + 1.5 - 3) / 6)
    differences = np.random.default_rng(10).normal(-0.4, 1, 30)
    smaller = stats.wilcoxon(differences).statistic
    assert statistics.rank_biserial(differences) == pytest.approx(-(1 - 4 * smaller / (30 * 31)))
    assert np.isnan(statistics.rank_biserial(np.zeros(4)))


def test_cohens_dz_is_students_t_by_the_root_of_n():
    one, other = np.random.default_rng(11).normal([[0.2], [0.0]], 1, (2, 25))
    assert statistics.cohen_dz(one - other) == pytest.approx(stats.ttest_rel(one, other).statistic / 5)
    assert statistics.cohen_dz(np.array([0.1, np.nan, 0.3])) == pytest.approx(0.2 / np.sqrt(0.02))
    assert np.isnan(statistics.cohen_dz(np.array([0.1]))) and np.isnan(statistics.cohen_dz(np.full(4, 0.5)))
