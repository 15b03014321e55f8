"""Statistics of methods that were scored on the same pairs: intervals over subjects, tests, effect sizes.

Pairs of few brains are not independent: with ten brains, each is in 18 of the 90 ordered pairs. What varies from one
study to the next is the brains, so these are what is drawn anew, and a pair counts as often as both of its brains were
drawn: McCullagh (2000) and Owen (2007, "The pigeonhole bootstrap") for rows and columns of their own kinds, Davezies,
D'Haultfoeuille and Guyonvarch (2021) for pairs within one set of units, Field and Welsh (2007) for clustered data.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

SEED, RESAMPLES, LEVEL = 0, 10_000, 0.95
CHUNK = 1000  # resamples whose weights are in memory at once


@dataclass(frozen=True, eq=False)
class Design:
    """Which brains are drawn anew, and which pairs they are in.

    `sizes` has the number of units of each set that is drawn by itself; `factors` are (set, the unit of each pair, or
    -1 for one that is not drawn). A pair's weight is the product over the factors of how often its unit was drawn.
    """

    sizes: tuple[int, ...]
    factors: tuple[tuple[int, Int[np.ndarray, " pairs"]], ...]

    @property
    def units(self) -> int:
        """How many brains the interval rests on: of the smaller set, where there are two; 0 where none varies."""
        return min(self.sizes, default=0)

    @property
    def both_roles(self) -> bool:
        """Whether one set of brains is drawn for both sides of the pairs."""
        return len(self.factors) == 2 and len(self.sizes) == 1 and bool((self.factors[1][1] >= 0).any())


def design(fixed: Sequence[str], moving: Sequence[str]) -> Design:
    """How the brains of these pairs are drawn anew.

    A brain that is in every pair, such as an atlas, stays. Brains whose pairs are the same ones are one unit: where
    each pair has brains of its own, pairs are drawn. Where some brain is fixed in one pair and moving in another, all
    are drawn as one set, with the same count in either role; else the fixed ones and the moving ones are two sets.
    """
    where: dict[str, set[int]] = {}
    for k, brains in enumerate(zip(fixed, moving, strict=True)):
        for brain in brains:
            where.setdefault(brain, set()).add(k)
    kinds = list(dict.fromkeys(frozenset(pairs) for pairs in where.values() if len(pairs) < len(fixed)))
    unit = {brain: kinds.index(frozenset(pairs)) if len(pairs) < len(fixed) else -1 for brain, pairs in where.items()}
    one, other = (np.array([unit[brain] for brain in brains], int) for brains in (fixed, moving))
    other = np.where(one == other, -1, other)
    if ({unit[brain] for brain in fixed} & {unit[brain] for brain in moving}) - {-1}:
        return Design((len(kinds),), ((0, one), (0, other)))
    sizes: list[int] = []
    factors: list[tuple[int, Int[np.ndarray, " pairs"]]] = []
    for units in (one, other):
        present, numbers = np.unique(units[units >= 0], return_inverse=True)
        if len(present):
            factors.append((len(sizes), _filled(units, numbers)))
            sizes.append(len(present))
    return Design(tuple(sizes), tuple(factors))


def resampled_means(
    values: Float[np.ndarray, "pairs columns"], of: Design, resamples: int = RESAMPLES, seed: int = SEED
) -> Float[np.ndarray, "resamples columns"]:
    """The mean of each column in each resample, over the pairs that have a value (NaN is none).

    All columns see the same resamples. NaN where a resample drew no pair that has a value, as when all that was drawn
    is one brain.
    """
    generator = np.random.default_rng(seed)
    known = np.isfinite(values)
    table = np.concatenate([np.where(known, values, 0.0), known], axis=1)
    parts = []
    for first in range(0, resamples, CHUNK):
        sums = weights(of, len(values), min(CHUNK, resamples - first), generator) @ table
        total, count = np.split(sums, 2, axis=1)
        parts.append(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0))
    return np.concatenate(parts)


def weights(of: Design, pairs: int, resamples: int, generator: np.random.Generator) -> Float[np.ndarray, "resamples _"]:
    """How often each pair is in each resample: as many brains are drawn, with replacement, as there are."""
    counts = []
    for size in of.sizes:
        drawn = generator.multinomial(size, np.full(size, 1 / size), resamples)
        counts.append(np.concatenate([drawn, np.ones((resamples, 1), int)], axis=1))  # -1 finds the one
    found = np.ones((resamples, pairs))
    for group, units in of.factors:
        found *= counts[group][:, units]
    return found


def interval(
    resampled: Float[np.ndarray, "resamples columns"], of: Design, level: float = LEVEL
) -> Float[np.ndarray, "2 columns"]:
    """The lower and upper end of each column's interval; NaN with fewer than two units.

    By percentiles, expanded for n units as Hesterberg (2015, "What teachers should know about the bootstrap") proposes:
    plain ones are those of a normal distribution whose variance is too small by (n - 1) / n, these reach as far as
    Student's t with n - 1 degrees of freedom. Where one set of brains is drawn for both sides, a brain drawn w times
    has no pairs with itself: it counts as w (n - w), which varies by (n - 2) / (n - 1) of what w does, and the reach
    makes up for that too. With fewer than six brains no resample is far enough out, and the interval is too narrow.
    """
    from scipy import stats  # type: ignore[import-untyped]  # takes long to import

    n = of.units
    if n < 2:
        return np.full((2, resampled.shape[1]), np.nan)
    reach = np.sqrt(n / (n - 1)) * stats.t.ppf((1 + level) / 2, n - 1)
    if of.both_roles and n > 2:
        reach *= (n - 1) / (n - 2)
    tail = float(stats.norm.sf(reach))
    ends = np.full((2, resampled.shape[1]), np.nan)
    known = np.isfinite(resampled)
    for k in np.flatnonzero(known.any(axis=0)):
        ends[:, k] = np.quantile(resampled[known[:, k], k], [tail, 1 - tail])
    return ends


def wilcoxon(differences: Float[np.ndarray, " pairs"]) -> float:
    """The two-sided p of Wilcoxon's signed-rank test, pairs without a difference left out; NaN where there is no pair,
    1 where no pair differs. It takes the pairs for independent."""
    from scipy import stats

    known = differences[np.isfinite(differences)]
    if not len(known):
        return float("nan")
    return float(stats.wilcoxon(known).pvalue) if known.any() else 1.0


def holm(p: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """Adjusted p of each test, by which the chance of any false rejection stays below the level (Holm, 1979).

    A test that was not made (NaN) stays NaN and does not count.
    """
    adjusted = np.full(p.shape, np.nan)
    made = np.flatnonzero(np.isfinite(p))
    order = made[np.argsort(p[made], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.fromiter(itertools.accumulate(steps, max), float), 1)
    return adjusted


def rank_biserial(differences: Float[np.ndarray, " pairs"]) -> float:
    """The matched-pairs rank-biserial correlation (Kerby, 2014): of the ranks of the absolute differences, the share
    with a positive sign less that with a negative one. 1 where every pair is greater; NaN where no pair differs."""
    from scipy import stats

    known = differences[np.isfinite(differences) & (differences != 0)]
    if not len(known):
        return float("nan")
    ranks = stats.rankdata(np.abs(known))
    return float(np.sum(np.sign(known) * ranks) / ranks.sum())


def cohen_dz(differences: Float[np.ndarray, " pairs"]) -> float:
    """Cohen's d of paired differences: their mean over their sample standard deviation; NaN where that is 0."""
    known = differences[np.isfinite(differences)]
    spread = float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
    return float(known.mean()) / spread if spread > 0 else float("nan")


def _filled(units: Int[np.ndarray, " pairs"], numbers: Int[np.ndarray, " drawn"]) -> Int[np.ndarray, " pairs"]:
    found = units.copy()
    found[units >= 0] = numbers
    return found
