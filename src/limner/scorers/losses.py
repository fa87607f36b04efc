"""Losses that make a scorer of choices and captions. Pure functions of scores, unreduced but for the contrastive one.

`preference` is always the probability that the first of two is preferred: 1 and 0 certain, 0.5 a tie or a doubt, between them shares of
votes. Scores are scaled as the probability needs them: exp(logit_scale) · cosine for a CLIP.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def pickscore(winner: Tensor, loser: Tensor, preference: Tensor | float = 1.0) -> Tensor:
    """PickScore's loss (arXiv 2305.01569, eq. 2-3): KL from the label to the softmax of two scaled scores.

    Args:
        winner, loser: scaled scores of the two images for their prompt, (B,).
        preference: probability that the first is preferred; 1 = certain, 0.5 = tie.

    Returns:
        (B,).
    """
    p = torch.as_tensor(preference, dtype=winner.dtype, device=winner.device).expand_as(winner)
    log = F.log_softmax(torch.stack([winner, loser], 1), 1)
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    return -(p * log[:, 0] + (1 - p) * log[:, 1]) - entropy


def choice_among(scores: Tensor, shares: Tensor, *, there: Tensor | None = None) -> Tensor:
    """HPS v1's loss (arXiv 2303.14420, its classifier of choices): cross-entropy between the softmax over a prompt's
    images and which one was chosen.

    Where several were chosen alike (HPS has no such rows) `shares` says how often; for two images and one-hot shares it is
    `bradley_terry`.

    Args:
        scores: scaled scores, (B, K).
        shares: of being the chosen one, rows sum to 1, (B, K).
        there: whether a row has a k-th image, (B, K) bool; None = all.

    Returns:
        (B,).
    """
    if there is not None:
        scores = scores.masked_fill(~there, -math.inf)
    log = F.log_softmax(scores, 1)
    return -(shares * log.masked_fill(shares == 0, 0)).sum(1)  # 0 · -inf is not 0


def bradley_terry(winner: Tensor, loser: Tensor, *, preference: Tensor | float = 1.0) -> Tensor:
    """ImageReward's loss (arXiv 2304.05977, eq. 1; Bradley and Terry 1952): -log sigmoid(winner - loser), pairs of a ranking pooled.

    With a preference between 0 and 1 the cross-entropy with it; `pickscore` is that less the label's entropy, with the same gradient.

    Args:
        winner, loser: scores of two images of a prompt, (B,).
        preference: see the module.

    Returns:
        (B,).
    """
    p = torch.as_tensor(preference, dtype=winner.dtype, device=winner.device)
    d = winner - loser
    return -(p * F.logsigmoid(d) + (1 - p) * F.logsigmoid(-d))


def bradley_terry_ties(
    winner: Tensor, loser: Tensor, *, preference: Tensor | float = 1.0, tie: Tensor | float, theta: float = 5.0
) -> Tensor:
    """Bradley-Terry with ties as Rao and Kupper (1967) add them: to win, a score must exceed the other by more than noise and log theta.

    With d = winner - loser and e = log theta: P(win) = sigmoid(d - e), P(lose) = sigmoid(-d - e), and what is left,
    (theta² - 1) · P(win) · P(lose), is a tie. theta 1 is Bradley-Terry (and has no ties). HPSv3's option of that kind has theta 5, after
    arXiv 2410.05328.

    Args:
        winner, loser: scores, (B,).
        preference: that the first wins if it is no tie, (B,) or a number.
        tie: probability that the answer was a tie, (B,) or a number.
        theta: above 1 where there are ties.

    Returns:
        (B,).

    Raises:
        ValueError: theta below 1, or 1 with ties.
    """
    p, t = (torch.as_tensor(v, dtype=winner.dtype, device=winner.device) for v in (preference, tie))
    if theta < 1 or (theta == 1 and bool((t > 0).any())):
        raise ValueError(f"theta: {theta:g}; expected more than 1: at 1 nothing is ever a tie")
    d, e = winner - loser, math.log(theta)
    win, lose = F.logsigmoid(d - e), F.logsigmoid(-d - e)
    decided = -(p * win + (1 - p) * lose)
    if theta == 1:
        return decided
    return (1 - t) * decided - t * (math.log(theta**2 - 1) + win + lose)


NODES = 32
_POINTS, _WEIGHTS = np.polynomial.hermite_e.hermegauss(NODES)  # of the standard normal, up to its factor


def gaussian(
    winner: Tensor,
    loser: Tensor,
    winner_log_sigma: Tensor,
    loser_log_sigma: Tensor,
    *,
    preference: Tensor | float = 1.0,
    expect: Literal["loss", "probability"] = "loss",
) -> Tensor:
    """HPSv3's loss (arXiv 2508.03789, uncertainty-aware ranking): scores are Gaussians, so their difference is one,
    N(m_w - m_l, s_w² + s_l²).

    The released code draws 1,000 differences and averages -log sigmoid over them (`expect` loss); the paper writes the logarithm of the
    averaged probability (`expect` probability), which lets an unsure scorer off more cheaply. Here the average is Gauss-Hermite quadrature
    with 32 nodes: no draws, so no noise in the gradient.

    Args:
        winner, loser: means of the scores, (B,).
        winner_log_sigma, loser_log_sigma: logarithms of their standard deviations, (B,).
        preference: see the module.

    Returns:
        (B,).
    """
    sigma = torch.sqrt(torch.exp(2 * winner_log_sigma) + torch.exp(2 * loser_log_sigma))
    points, weights = (torch.as_tensor(v, dtype=winner.dtype, device=winner.device) for v in (_POINTS, _WEIGHTS / math.sqrt(2 * math.pi)))
    z = (winner - loser)[:, None] + sigma[:, None] * points
    p = torch.as_tensor(preference, dtype=winner.dtype, device=winner.device)
    if expect == "loss":
        won, lost = (F.logsigmoid(z) * weights).sum(1), (F.logsigmoid(-z) * weights).sum(1)
    else:
        won, lost = (torch.logsumexp(F.logsigmoid(s * z) + weights.log(), 1) for s in (1, -1))
    return -(p * won + (1 - p) * lost)


def weighted_mean(loss: Tensor, weights: Tensor) -> Tensor:
    """The mean of a batch in which rows count by weight, as PickScore counts a pair by one over the pairs of its prompt.

    Args:
        loss, weights: (B,); weights 0 or more, not all 0.

    Returns:
        scalar.
    """
    return (loss * weights).sum() / weights.sum()


def contrastive(images: Tensor, texts: Tensor, scale: Tensor, extra_texts: Tensor | None = None) -> Tensor:
    """CLIP's symmetric loss; `extra_texts` are further wrong captions for every image (hard negatives).

    Args:
        images, texts: unit vectors (B, D) of matching pairs; extra_texts (K, D).

    Returns:
        scalar.
    """
    label = torch.arange(len(images), device=images.device)
    right = texts if extra_texts is None else torch.cat([texts, extra_texts])
    return (F.cross_entropy(scale * images @ right.T, label) + F.cross_entropy(scale * texts @ images.T, label)) / 2
