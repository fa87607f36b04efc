from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from limner import statistics
from limner.evaluation.distances import frechet


def test_mean_interval_is_students() -> None:
    x = np.random.default_rng(0).normal(3, 2, 17)
    low, high = stats.t.interval(0.95, 16, loc=x.mean(), scale=stats.sem(x))
    assert statistics.mean_interval(x) == pytest.approx((x.mean(), low, high, 17))


@pytest.mark.parametrize("values", [[1.0], [], [1.0, math.nan], [[1.0, 2.0]]])
def test_mean_interval_refuses(values: list) -> None:
    with pytest.raises(ValueError, match="values: "):
        statistics.mean_interval(values)


def test_share_interval_known_numbers() -> None:
    # Newcombe 1998, Statistics in Medicine 17, Table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for successes, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]:
        found = statistics.share_interval(successes, n)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert statistics.share_interval(20, 20).high == 1.0
    with pytest.raises(ValueError, match="3 successes of 2"):
        statistics.share_interval(3, 2)


def test_paired_wins_without_ties_is_wilson() -> None:
    base = np.zeros(148)
    ours = np.where(np.arange(148) < 15, 1.0, -1.0)
    assert statistics.paired_wins(ours, base) == pytest.approx(statistics.share_interval(15, 148))


def test_paired_wins_counts_ties_and_narrows_as_a_bootstrap() -> None:
    ours = np.array([1.0] * 40 + [0.0] * 140 + [-1.0] * 20)
    found = statistics.paired_wins(ours, np.zeros(200))
    drawn = statistics.bootstrap((np.sign(ours) + 1) / 2, np.mean, seed=1, n=2000)
    assert found.value == pytest.approx((40 + 70) / 200)
    assert found[1:3] == pytest.approx(drawn[1:3], abs=0.008)
    assert statistics.paired_wins(ours, np.zeros(200), tie=0.0).value == pytest.approx(0.2)
    low, high = statistics.paired_wins(np.zeros(9), np.zeros(9))[1:3]  # nothing but ties: no certainty
    assert low < 0.3 < 0.7 < high


def test_paired_tests_need_pairs() -> None:
    for test in (statistics.paired_wins, statistics.sign_test, statistics.paired_difference):
        with pytest.raises(ValueError, match="3 values and base 2"):
            test([1, 2, 3], [1, 2])


def test_sign_test_by_hand() -> None:
    # 5 wins, 1 loss, 2 ties: 2 (C(6,0) + C(6,1)) / 2^6
    assert statistics.sign_test([1, 1, 1, 1, 1, -1, 0, 0], [0] * 8) == pytest.approx(14 / 64)
    assert statistics.sign_test([1, 2], [1, 2]) == 1.0


def test_paired_difference_cancels_what_the_prompt_adds() -> None:
    rng = np.random.default_rng(0)
    prompt = rng.normal(0, 100, 30)
    step = rng.normal(1, 0.1, 30)
    assert statistics.paired_difference(prompt + step, prompt) == pytest.approx(statistics.mean_interval(step))


def test_bootstrap_agrees_with_the_t_interval_and_is_seeded() -> None:
    x = np.random.default_rng(0).normal(size=400)
    found, t = statistics.bootstrap(x, np.mean, seed=3), statistics.mean_interval(x)
    assert found == pytest.approx(t, abs=0.02)
    assert found == statistics.bootstrap(x, np.mean, seed=3) != statistics.bootstrap(x, np.mean, seed=4)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12).filter(lambda p: len({label for _, label in p}) == 2))
def test_auc_counts_pairs(points: list[tuple[int, bool]]) -> None:
    wins = [(a > b) + 0.5 * (a == b) for a, yes in points if yes for b, no in points if not no]
    assert statistics.auc([s for s, _ in points], [label for _, label in points]) == pytest.approx(np.mean(wins))


def test_auc_needs_both_classes() -> None:
    with pytest.raises(ValueError, match="2 positive and 0 negative"):
        statistics.auc([1, 2], [1, 1])


def test_circular_mean() -> None:
    assert statistics.circular_mean([350, 20]) == pytest.approx(5)
    assert statistics.circular_mean([10, 340]) == pytest.approx(355)
    assert statistics.circular_mean([0, 90], [1, 0]) == pytest.approx(0)
    assert statistics.circular_mean([0, 90], [1, math.sqrt(3)]) == pytest.approx(60)
    assert math.isnan(statistics.circular_mean([0, 180]))
    assert 0 <= statistics.circular_mean([-1e-15]) < 360
    with pytest.raises(ValueError, match="weights"):
        statistics.circular_mean([1, 2], [1])


def test_half_subsampling_of_a_mean_has_its_standard_error() -> None:
    for n in (60, 61):
        x = np.random.default_rng(n).normal(size=n)
        found = statistics.half_subsample_interval(lambda i, x=x: float(x[i].mean()), n, seed=0, draws=3000)
        assert found.value == pytest.approx(x.mean())
        assert (found.high - found.low) / 2 == pytest.approx(1.96 * x.std(ddof=1) / math.sqrt(n), rel=0.05)
    with pytest.raises(ValueError, match="n = 3"):
        statistics.half_subsample_interval(lambda i: 0.0, 3)


def test_half_subsampling_covers_a_paired_frechet_ratio() -> None:
    """Two models that share a prompt's noise: the interval holds the ratio expected at this n in about 95 % of repetitions."""
    rng, n, intervals = np.random.default_rng(0), 120, []
    for repetition in range(80):
        prompt, own = rng.normal(size=(n, 3)), rng.normal(size=(n, 3))
        real = 0.6 * prompt + 0.8 * rng.normal(size=(n, 3))
        base = 0.6 * prompt + 0.64 * own + 0.48 * rng.normal(size=(n, 3)) + 0.6
        ours = 0.6 * prompt + 0.64 * own + 0.48 * rng.normal(size=(n, 3)) + 0.4

        def ratio(i: np.ndarray, ours: np.ndarray = ours, base: np.ndarray = base, real: np.ndarray = real) -> float:
            return frechet(ours[i], real[i]) / frechet(base[i], real[i])

        intervals.append(statistics.half_subsample_interval(ratio, n, seed=repetition, draws=40))
    expected = np.mean([i.value for i in intervals])
    covered = np.mean([i.low <= expected <= i.high for i in intervals])
    assert 0.4 < expected < 0.6  # (0.4 / 0.6)² = 0.444 and some bias towards 1
    assert 0.86 <= covered <= 1.0
    assert np.mean([i.high < 1 for i in intervals]) > 0.9
