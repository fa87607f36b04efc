"""Losses that make a scorer of choices and captions. Pure functions of scores."""

from __future__ import annotations

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
