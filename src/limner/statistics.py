"""Intervals, paired comparisons and the few summaries that evaluation stands on. numpy and scipy only; every draw is seeded.

All intervals are at 95 %. Two models are compared on the same prompts and seeds, so differences and wins are always taken pair by pair:
what a prompt adds to both images then cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Z = float(stats.norm.ppf(0.975))  # half-width of a 95 % normal interval, in standard errors


class Interval(NamedTuple):
    """An estimate, its 95 % interval, and how many values (images, pairs, prompts) it rests on."""

    value: float
    low: float
    high: float
    n: int


def _vector(values: ArrayLike, name: str, least: int) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < least:
        raise ValueError(f"{name}: expected a list of at least {least} numbers, found shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: value {int(np.argmin(np.isfinite(array)))} is not finite")
    return array


def _pairs(ours: ArrayLike, base: ArrayLike, least: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = _vector(ours, "ours", least), _vector(base, "base", least)
    if len(a) != len(b):
        raise ValueError(f"ours has {len(a)} values and base {len(b)}; a paired comparison needs the same images in the same order")
    return a, b


def mean_interval(values: ArrayLike) -> Interval:
    """Mean of (n,) values with Student's t interval.

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    x = _vector(values, "values", 2)
    mean = float(x.mean())
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half, len(x))


def share_interval(successes: float, n: int) -> Interval:
    """A share in [0, 1] with Wilson's score interval, which keeps to [0, 1] and has width even when all or none succeed.

    Raises:
        ValueError: n < 1 or successes outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: expected 0 <= successes <= n and n >= 1")
    low, high = _wilson(successes / n, n)
    return Interval(successes / n, low, high, n)


def _wilson(p: float, n: float) -> tuple[float, float]:
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    # At p = 0 and 1 an end is p itself; rounding would put it a hair outside.
    return (0.0 if p == 0 else float(centre - half)), (1.0 if p == 1 else float(centre + half))


def paired_wins(ours: ArrayLike, base: ArrayLike, tie: float = 0.5) -> Interval:
    """Share of pairs that ours wins (higher value), a tie counting `tie` of a win; HG-DPO Table 6 gives such shares without intervals.

    Wilson's interval at the effective size n·p(1-p)/v, where v is the variance of the outcomes (1, tie, 0). Without ties v = p(1-p), and
    this is Wilson's interval; with ties the outcomes vary less and the interval narrows as a bootstrap's would, with no draws to seed.
    If all outcomes are equal v says nothing, and n itself is used.

    Raises:
        ValueError: different lengths, no pairs, or a value that is not finite.
    """
    a, b = _pairs(ours, base, 1)
    outcomes = np.where(a == b, tie, (a > b).astype(np.float64))
    p, v, n = float(outcomes.mean()), float(outcomes.var()), len(a)
    low, high = _wilson(p, n * p * (1 - p) / v if v > 0 else n)
    return Interval(p, low, high, n)


def sign_test(ours: ArrayLike, base: ArrayLike) -> float:
    """Two-sided p-value that ours and base win equally often; ties say nothing and are left out (all ties: 1)."""
    a, b = _pairs(ours, base, 1)
    wins, decided = int((a > b).sum()), int((a != b).sum())
    return float(stats.binomtest(wins, decided).pvalue) if decided else 1.0


def paired_difference(ours: ArrayLike, base: ArrayLike) -> Interval:
    """Mean of ours - base over (n,) pairs, with Student's t interval.

    Raises:
        ValueError: different lengths, fewer than two pairs, or a value that is not finite.
    """
    a, b = _pairs(ours, base, 2)
    return mean_interval(a - b)


def bootstrap(values: ArrayLike, statistic: Callable[[NDArray[np.float64]], float], seed: int = 0, n: int = 1000) -> Interval:
    """Percentile bootstrap of a statistic of (N, ...) values, resampled along the first axis.

    Args:
        statistic: resampled values (N, ...) to a number.
        n: draws.

    Raises:
        ValueError: fewer than two values.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim < 1 or len(x) < 2:
        raise ValueError(f"bootstrap: expected at least 2 values, found shape {x.shape}")
    rng = np.random.default_rng(seed)
    drawn = [statistic(x[rng.integers(len(x), size=len(x))]) for _ in range(n)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(statistic(x)), float(low), float(high), len(x))


def auc(scores: ArrayLike, labels: Sequence[bool] | ArrayLike) -> float:
    """Chance that a positive scores above a negative, ties counting one half (Mann-Whitney by ranks).

    Raises:
        ValueError: different lengths, or only one class among the labels.
    """
    x, positive = _vector(scores, "scores", 2), np.asarray(labels).astype(bool)
    if positive.shape != x.shape:
        raise ValueError(f"{len(x)} scores but labels of shape {positive.shape}")
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        raise ValueError(f"auc needs both classes; found {ones} positive and {zeros} negative labels")
    return float((stats.rankdata(x)[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def circular_mean(angles_degrees: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Direction in [0, 360) of the weighted sum of unit vectors; nan where they cancel and no direction is left.

    Raises:
        ValueError: no angles, weights of another shape, negative, or all zero.
    """
    angles = np.radians(_vector(angles_degrees, "angles", 1))
    w = np.ones_like(angles) if weights is None else _vector(weights, "weights", 1)
    if w.shape != angles.shape or (w < 0).any() or w.sum() == 0:
        raise ValueError(f"weights: expected {len(angles)} numbers >= 0, not all zero")
    x, y = float(np.average(np.cos(angles), weights=w)), float(np.average(np.sin(angles), weights=w))
    if np.hypot(x, y) < 1e-12:
        return float("nan")
    degrees = float(np.degrees(np.arctan2(y, x))) % 360.0
    return degrees if degrees < 360.0 else 0.0  # -1e-17 % 360 is 360.0 in floating point


def half_subsample_interval(statistic: Callable[[NDArray[np.intp]], float], n: int, seed: int = 0, draws: int = 200) -> Interval:
    """Interval of a statistic of whole sets, such as a (ratio of) Fréchet distance(s), by random halves without replacement.

    A half of size m has variance s²(1/m - 1/n) around the full sample by the finite-population correction. At m = n/2 that is s²/n, the
    variance of the full sample itself, so the standard deviation of the halves is used as the standard error (odd n: scaled by √(m/(n-m))).
    A bootstrap would not do: repeated images shrink the covariances.

    The Fréchet distance is biased upward at small n, more so in halves. So the spread is taken around the halves' own mean, and the
    interval is centred on the full-sample value. What it covers is therefore the expected value at this n; for a ratio, bias common to
    both distances draws that towards 1, which understates a gain.

    Args:
        statistic: sorted indices into 0..n-1 to a number. To compare models, use the same indices for each of them.
        n: images.

    Raises:
        ValueError: n < 4 or fewer than 2 draws.
    """
    if n < 4 or draws < 2:
        raise ValueError(f"half_subsample_interval: n = {n}, draws = {draws}; expected n >= 4 and draws >= 2")
    rng, m = np.random.default_rng(seed), n // 2
    halves = [statistic(np.sort(rng.permutation(n)[:m])) for _ in range(draws)]
    error = float(np.std(halves, ddof=1)) * float(np.sqrt(m / (n - m)))
    value = float(statistic(np.arange(n)))
    return Interval(value, value - Z * error, value + Z * error, n)


def krippendorff(ratings: ArrayLike, metric: Literal["nominal", "interval"]) -> float:
    """Krippendorff's alpha: 1 = raters agree, 0 = as by chance, below = worse than chance (Krippendorff 2011, "Computing Krippendorff's
    Alpha-Reliability"). A unit that fewer than two raters answered says nothing and is left out.

    Args:
        ratings: (raters, units); nan where a rater did not answer.
        metric: nominal: answers are equal or not; interval: they differ by their squared difference.

    Returns:
        alpha; nan where nothing can be said: no unit with two answers, or one and the same answer everywhere.

    Raises:
        ValueError: another shape, an infinite value, or an unknown metric.
    """
    table = np.asarray(ratings, dtype=np.float64)
    if table.ndim != 2 or np.isinf(table).any():
        raise ValueError(f"ratings: expected finite (raters, units) with nan for no answer, found shape {table.shape}")
    if metric not in ("nominal", "interval"):
        raise ValueError(f"metric: {metric!r}; expected nominal or interval")
    answers = (~np.isnan(table)).sum(axis=0)
    table, answers = table[:, answers > 1], answers[answers > 1].astype(np.float64)
    flat = table[~np.isnan(table)]
    if not len(flat) or np.ptp(flat) == 0:
        return float("nan")

    def disagreement(values: NDArray[np.float64], n: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum over ordered pairs of answers of a unit, for each column of (answers, units)."""
        if metric == "nominal":
            counts = np.stack([(values == level).sum(axis=0) for level in np.unique(flat)])
            return n**2 - (counts.astype(np.float64) ** 2).sum(axis=0)
        centred = values - flat.mean()  # differences stay; large offsets would cancel badly
        return 2 * (n * np.nansum(centred**2, axis=0) - np.nansum(centred, axis=0) ** 2)

    total = np.array([float(len(flat))])
    observed = float((disagreement(table, answers) / (answers - 1)).sum())
    expected = float(disagreement(flat[:, None], total)[0]) / (len(flat) - 1)
    return 1 - observed / expected
