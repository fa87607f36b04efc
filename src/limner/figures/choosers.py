"""Simulated raters who choose among pictures: a hidden quality, noise of their own, and what that leaves to be known.

Hidden quality is a weighted sum of `latent.qualities` (`candidates.hidden_quality`). A rater sees it with Gumbel noise, so that choices
follow Luce's axiom: of two pictures the better one is preferred with probability sigmoid(difference / noise).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from limner.figures.fitting import logistic_regression
from limner.records import Choice
from limner.scorers.agreement import accuracy, judge
from limner.scorers.choices import pairs

Array = NDArray[np.float64]


def utilities(hidden: Array, noise: float, rng: np.random.Generator) -> Array:
    """How good one rater finds pictures (K,) this time."""
    return hidden + noise * rng.gumbel(size=len(hidden))


def choose(hidden: Array, *, noise: float, tie: float, rng: np.random.Generator) -> list[float]:
    """One rater's answer as shares (K,): the best one, or half and half where the best two are less than `tie` apart."""
    seen = utilities(hidden, noise, rng)
    first, second = np.argsort(-seen)[:2]
    said = np.zeros(len(hidden))
    said[[first, second]] = (0.5, 0.5) if seen[first] - seen[second] < tie else (1.0, 0.0)
    return said.tolist()


def by_lot(scores: Array, rng: np.random.Generator) -> list[float]:
    """Scores (K,) of which equal ones are decided by lot: a predicted tie would count as wrong, which a guess is only half the time."""
    return (scores + 1e-9 * rng.random(len(scores))).tolist()


def ceilings(
    rows: Sequence[Choice], hidden: Sequence[Array], noise: float, *, seed: int = 0, draws: int = 20, **how: Any
) -> dict[str, Any]:
    """The accuracy of knowing the hidden quality, and of one more rater's answers, on the same pairs as any scorer.

    Args:
        how: as for `agreement.accuracy`.
    """
    rng = np.random.default_rng([seed, 71])
    others = [
        accuracy(judge(rows, [utilities(h, noise, rng).tolist() for h in hidden]), **{**how, "draws": 2})["value"] for _ in range(draws)
    ]
    known = accuracy(judge(rows, [by_lot(h, rng) for h in hidden]), seed=seed, **how)
    return {"quality": known, "single_rater": {"value": float(np.mean(others)), "low": min(others), "high": max(others), "draws": draws}}


def fit_linear(rows: Sequence[Choice], features: Sequence[Array], l2: float = 1e-2) -> Array:
    """The vector (D,) whose product with features (K, D) of each row's pictures tells choices best: Bradley-Terry, decided pairs only.

    With features of a frozen tower it is an aesthetic head; with one-hot generators it is what the domain alone gives away.
    """
    known = [(f[i] - f[j], p) for row, f in zip(rows, features) for i, j, p in pairs(row) if p != 0.5]
    x = torch.tensor(np.array([d for d, _ in known]), dtype=torch.float64)
    p = torch.tensor([p for _, p in known], dtype=torch.float64)
    return logistic_regression(x, p, l2, intercept=False)[0].numpy()
