"""Losses of choices: numbers by hand, a second way of computing, and what must hold for all scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from limner.scorers import losses

SCORES = st.floats(-8, 8)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_choice_among_by_hand():
    """Scores log 1, log 2, log 5, second chosen: -log(2 / 8) = log 4. Without the third: -log(2 / 3)."""
    scores = t(0, math.log(2), math.log(5))[None]
    chosen = t(0, 1, 0)[None]
    assert losses.choice_among(scores, chosen).item() == pytest.approx(math.log(4))
    there = torch.tensor([[True, True, False]])
    assert losses.choice_among(scores, chosen, there=there).item() == pytest.approx(math.log(1.5))
    assert losses.choice_among(scores, t(0.5, 0.5, 0)[None]).item() == pytest.approx((math.log(8) + math.log(4)) / 2)


def test_choice_among_is_cross_entropy_and_padding_gets_no_gradient():
    """Against torch's own cross-entropy over as many images as a row has."""
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    counts, chosen = [2, 4, 3], torch.tensor([1, 3, 0])
    there = torch.arange(4) < torch.tensor(counts)[:, None]
    found = losses.choice_among(scores, F.one_hot(chosen, 4).double(), there=there)
    expected = [F.cross_entropy(scores[i, :n][None], chosen[i][None]).item() for i, n in enumerate(counts)]
    assert found.tolist() == pytest.approx(expected)
    found.sum().backward()
    assert scores.grad is not None and scores.grad[~there].abs().max() == 0 and bool(torch.isfinite(scores.grad).all())


@given(SCORES, SCORES, st.floats(0, 1))
def test_two_images_make_all_losses_one(a, b, p):
    """Of two images, the K-way loss is Bradley-Terry's, and PickScore's is that less the entropy of the label, which has no gradient."""
    pair = losses.bradley_terry(t(a), t(b), preference=p).item()
    assert losses.choice_among(t(a, b)[None], t(p, 1 - p)[None]).item() == pytest.approx(pair, abs=1e-9)
    entropy = -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)
    assert losses.pickscore(t(a), t(b), p).item() == pytest.approx(pair - entropy, abs=1e-9)


@given(SCORES, SCORES, st.floats(0, 1), st.floats(0, 1), st.floats(1.1, 20))
def test_who_comes_first_does_not_matter(a, b, p, tie, theta):
    s, r = t(-1.0), t(0.5)
    there = [
        (losses.pickscore(t(a), t(b), p), losses.pickscore(t(b), t(a), 1 - p)),
        (losses.bradley_terry(t(a), t(b), preference=p), losses.bradley_terry(t(b), t(a), preference=1 - p)),
        (
            losses.bradley_terry_ties(t(a), t(b), preference=p, tie=tie, theta=theta),
            losses.bradley_terry_ties(t(b), t(a), preference=1 - p, tie=tie, theta=theta),
        ),
        (losses.gaussian(t(a), t(b), s, r, preference=p), losses.gaussian(t(b), t(a), r, s, preference=1 - p)),
    ]
    for one, other in there:
        assert one.item() == pytest.approx(other.item(), rel=1e-6, abs=1e-9)


def test_bradley_terry_by_hand():
    """Scores log 3 and 0: 3 to 1, so -log 0.75; half and half: (log 4/3 + log 4) / 2."""
    assert losses.bradley_terry(t(math.log(3)), t(0)).item() == pytest.approx(math.log(4 / 3))
    assert losses.bradley_terry(t(math.log(3)), t(0), preference=0.5).item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


def test_bradley_terry_with_ties_by_hand():
    """Rao and Kupper with strengths 6 and 1 and theta 2: win 6 / (6 + 2), lose 1 / (1 + 12), tie (4 - 1) · 6 / ((6 + 2)(12 + 1))."""
    a, b = t(math.log(6)), t(0)
    assert losses.bradley_terry_ties(a, b, tie=0.0, theta=2).exp().item() == pytest.approx(8 / 6)
    assert losses.bradley_terry_ties(a, b, preference=0.0, tie=0.0, theta=2).exp().item() == pytest.approx(13)
    assert losses.bradley_terry_ties(a, b, tie=1.0, theta=2).exp().item() == pytest.approx(8 * 13 / 18)


@given(SCORES, SCORES, st.floats(1.01, 50))
def test_win_lose_and_tie_are_all_there_is(a, b, theta):
    chances = [
        losses.bradley_terry_ties(t(a), t(b), preference=p, tie=tie, theta=theta).neg().exp().item() for p, tie in ((1, 0), (0, 0), (1, 1))
    ]
    assert sum(chances) == pytest.approx(1)


def test_theta_one_is_bradley_terry_and_has_no_ties():
    a, b = t(1.3), t(-0.4)
    assert losses.bradley_terry_ties(a, b, preference=0.3, tie=0.0, theta=1).item() == pytest.approx(
        losses.bradley_terry(a, b, preference=0.3).item()
    )
    with pytest.raises(ValueError, match=r"theta: 1; expected more than 1: at 1 nothing is ever a tie"):
        losses.bradley_terry_ties(a, b, tie=0.5, theta=1)


def test_gaussian_against_a_million_draws():
    mean_w, mean_l, log_w, log_l = t(1.2, -3.0), t(0.3, 0.5), t(0.2, 0.7), t(-0.5, 0.4)
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((1_000_000, 2))
    z = (mean_w - mean_l).numpy() + draws * np.sqrt(np.exp(2 * log_w.numpy()) + np.exp(2 * log_l.numpy()))
    assert losses.gaussian(mean_w, mean_l, log_w, log_l).numpy() == pytest.approx(np.log1p(np.exp(-z)).mean(0), rel=0.01)
    paper = losses.gaussian(mean_w, mean_l, log_w, log_l, expect="probability")
    assert paper.numpy() == pytest.approx(-np.log((1 / (1 + np.exp(-z))).mean(0)), rel=0.01)


def test_gaussian_without_spread_is_bradley_terry():
    a, b, sure = t(1.2, -3), t(0.3, 2), t(-30, -30)
    for expect in ("loss", "probability"):
        found = losses.gaussian(a, b, sure, sure, preference=0.8, expect=expect)
        assert found.tolist() == pytest.approx(losses.bradley_terry(a, b, preference=0.8).tolist(), rel=1e-6)


def test_gaussian_rewards_doubt_where_the_order_is_wrong():
    """On a wrongly ordered pair the paper's form is cheaper for an unsure scorer; the code's is not: its loss is convex in z."""
    a, b, sure, unsure = t(-4), t(0), t(-3), t(1.5)
    paper = [losses.gaussian(a, b, s, s, expect="probability").item() for s in (sure, unsure)]
    code = [losses.gaussian(a, b, s, s).item() for s in (sure, unsure)]
    assert paper[1] < paper[0] and code[1] > code[0]


@given(st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=4))
def test_losses_are_finite_have_one_value_a_row_and_fall_as_the_winner_rises(scores):
    a = t(*(x for x, _ in scores)).requires_grad_()
    b, s = t(*(y for _, y in scores)), t(*(0.1 for _ in scores))
    for loss in (
        losses.pickscore(a, b), losses.bradley_terry(a, b), losses.bradley_terry_ties(a, b, tie=0.0), losses.gaussian(a, b, s, s),
        losses.choice_among(torch.stack([a, b], 1), t(1, 0).expand(len(scores), 2)),
    ):  # fmt: skip
        assert loss.shape == (len(scores),) and bool(torch.isfinite(loss).all()) and bool((loss >= -1e-12).all())
        (gradient,) = torch.autograd.grad(loss.sum(), a)
        assert bool((gradient <= 0).all())


def test_weighted_mean_is_a_mean_over_repeated_rows():
    assert losses.weighted_mean(t(1, 5, 5), t(1, 0.5, 0.5)).item() == pytest.approx(3)
    assert losses.weighted_mean(t(1, 5), t(2, 2)).item() == pytest.approx(3)
