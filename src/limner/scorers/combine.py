"""Several scores to one, and images that win on all. Functions of numbers, in which NaN is a missing score, and a scorer that adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from torch import Tensor

from limner.scorers.protocol import Scorer

Scale = Literal["zscore", "rank", "zscore_all"]
Floats = NDArray[np.float64]


def normalise(values: ArrayLike, groups: Sequence[str], how: Scale, *, higher_is_better: bool = True) -> Floats:
    """Scores of any scale to a common one, in which higher is better.

    Args:
        values: (n,) scores.
        groups: the prompt of each.
        how: zscore (mean 0, deviation 1) or rank (0 the worst of its prompt, 1 the best, ties share their mean rank), each prompt for
            itself, which scores that do not compare across prompts need; or zscore_all, over the images of all prompts.
        higher_is_better: the direction of `values`.

    Returns:
        (n,), NaN where the score is missing. A prompt whose scores are all equal, or that has one, gets 0 (z-score) or 1/2 (rank).

    Raises:
        ValueError: another number of groups than of values.
    """
    x = np.array(values, dtype=np.float64)
    if len(groups) != len(x):
        raise ValueError(f"{len(x)} scores but {len(groups)} prompts; expected one each")
    x, out = x if higher_is_better else -x, np.full(len(x), np.nan)
    names = np.array([""] * len(x) if how == "zscore_all" else groups)
    for name in np.unique(names):
        at = np.flatnonzero((names == name) & np.isfinite(x))
        if len(at):
            out[at] = _rank(x[at]) if how == "rank" else _zscore(x[at])
    return out


def _zscore(x: Floats) -> Floats:
    deviation = x.std()
    # equal numbers may have a mean that is off by a rounding
    return np.zeros(len(x)) if deviation <= 1e-12 * np.abs(x).max() else (x - x.mean()) / deviation


def _rank(x: Floats) -> Floats:
    return np.full(len(x), 0.5) if len(x) == 1 else (rankdata(x) - 1) / (len(x) - 1)


def combine(
    scores: Mapping[str, ArrayLike], groups: Sequence[str], weights: Mapping[str, float], how: Scale = "zscore",
    directions: Mapping[str, bool] | None = None,
) -> Floats:  # fmt: skip
    """The weighted mean of several scores, each normalised first.

    Args:
        scores: by name, (n,) each.
        groups: the prompt of each image.
        weights: by name, at least 0; which scores count and how much.
        directions: by name, whether higher is better (default: it is).

    Returns:
        (n,); NaN where any score that counts is missing, since a mean of fewer would be on another scale.

    Raises:
        ValueError: a weight of no score, a negative one, or none above 0.
    """
    if unknown := [n for n in weights if n not in scores]:
        raise ValueError(f"weights: no score {unknown[0]!r}; there are {', '.join(scores)}")
    if any(w < 0 for w in weights.values()) or not sum(weights.values()) > 0:
        raise ValueError(f"weights: {dict(weights)}; expected numbers of at least 0, one of them above 0")
    total = np.zeros(len(groups))
    for name, weight in weights.items():
        if weight:
            better = (directions or {}).get(name, True)
            total += weight * normalise(scores[name], groups, how, higher_is_better=better)
    return total / sum(weights.values())


def dominates(a: ArrayLike, b: ArrayLike) -> NDArray[np.bool_]:
    """Whether a wins on all: at least as good everywhere and better somewhere. (..., scores) twice to (...); higher is better.

    A missing score wins and loses nothing: where one is, there is no dominance.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return np.asarray((x >= y).all(-1) & (x > y).any(-1))


def pareto(scores: ArrayLike, groups: Sequence[str]) -> NDArray[np.bool_]:
    """The images of each prompt that no other image of it dominates.

    Args:
        scores: (n, scores), higher is better.
        groups: the prompt of each image.

    Returns:
        (n,); False where a score is missing.
    """
    x, names = np.asarray(scores, dtype=np.float64), np.array(groups)
    kept = np.asarray(np.isfinite(x).all(1))
    for name in np.unique(names):
        at = np.flatnonzero(kept & (names == name))
        beaten = dominates(x[at][:, None], x[at][None]).any(0)
        kept[at[beaten]] = False
    return kept


class SumScorer:
    """The weighted sum of other scorers' numbers, as they are: for scores of one scale, such as log-probabilities and logits."""

    def __init__(self, name: str, parts: Sequence[Scorer], weights: Sequence[float]):
        """One weight a part; scores of which lower is better count with the opposite sign."""
        self.name, self.parts = name, list(parts)
        self.weights = [w if p.higher_is_better else -w for p, w in zip(parts, weights)]
        ends = [sorted(w * end for end in p.range) if w else [0.0, 0.0] for p, w in zip(parts, self.weights)]
        self.range = (sum(low for low, _ in ends), sum(high for _, high in ends))
        self.higher_is_better = True
        self.comparable_across_prompts = all(p.comparable_across_prompts for p in parts)
        self.needs_prompt = any(p.needs_prompt for p in parts)
        self.metric = " + ".join(f"{w:g} {p.name}" for p, w in zip(parts, self.weights))
        self.files = {f"{p.name}/{n}": digest for p in parts for n, digest in getattr(p, "files", {}).items()}
        self.revision = "+".join(f"{w:g}*{p.revision}" for p, w in zip(parts, self.weights))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """As `Scorer`."""
        return torch.stack([w * p(images, prompts) for p, w in zip(self.parts, self.weights)]).sum(0)

    def add(self, values: Sequence[float | str]) -> float | str:
        """The sum for one image from its parts' scores, or the first reason why one of them has none."""
        missing = next((v for v in values if isinstance(v, str)), None)
        return missing or sum(w * float(v) for w, v in zip(self.weights, values))
