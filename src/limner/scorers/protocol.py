"""The one protocol of everything that turns images and prompts into numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Scorer(Protocol):
    """Images and prompts in, one number each out.

    Batch size and batch mates change a score by less than 1e-5 of its size.

    Attributes:
        name: as in the recipe.
        range: smallest and largest score that can occur.
        higher_is_better: the direction.
        comparable_across_prompts: whether scores of different prompts may be compared or averaged.
        needs_prompt: whether the prompt is read.
        revision: SHA-256 (16 digits) of the weights, behind `metric@` where one file serves several metrics.
    """

    name: str
    range: tuple[float, float]
    higher_is_better: bool
    comparable_across_prompts: bool
    needs_prompt: bool
    revision: str

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B prompts to scores (B,), float32."""
        ...
