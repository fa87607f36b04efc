"""Denoising errors of policy and reference: one pass each, winner and loser side by side, reduced in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from limner.models.stable_diffusion import Pipeline


@dataclass
class Batch:
    """What one pass needs. Winners and losers share noise and timestep.

    winner, loser: latents (B, C, h, w), loser None for supervised learning; text (B, L, D); noise like winner; t (B,) int;
    names: the groups, for messages.
    """

    winner: Tensor
    loser: Tensor | None
    text: Tensor
    noise: Tensor
    t: Tensor
    names: list[str]


@dataclass
class Errors:
    """Per-sample errors (B,), the residuals (prediction - target) behind them, and the winner's predicted noise of policy and base."""

    winner: Tensor
    winner_reference: Tensor
    loser: Tensor | None
    loser_reference: Tensor | None
    winner_residual: Tensor
    loser_residual: Tensor | None
    policy_noise: Tensor
    base_noise: Tensor


Network = Callable[[], AbstractContextManager[None]]


def measure(pipeline: Pipeline, batch: Batch, reference: Network, base: Network | None = None) -> Errors:
    """Errors of the policy (with gradient) and of the reference (without).

    `reference` is a context in which the network is the reference, and `base` one in which it is the base model, where that is another
    and the statistics term asks for it (a pass of its own, of the winners); None = the reference. Their passes come first, so that
    gradient checkpointing, which recomputes during backward, always sees the policy.
    """
    paired = batch.loser is not None
    double = lambda x: torch.cat([x, x]) if paired else x  # noqa: E731
    clean = torch.cat([batch.winner, batch.loser]) if batch.loser is not None else batch.winner
    noise, t, text = double(batch.noise), double(batch.t), double(batch.text)
    noisy, target = pipeline.add_noise(clean, noise, t), pipeline.target(clean, noise, t)
    if pipeline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last):
        noisy = noisy.contiguous(memory_format=torch.channels_last)
    n = len(batch.winner)
    with torch.no_grad(), reference():
        expected = pipeline.predict(noisy, t, text)
    usual = expected[:n]
    if base is not None:
        with torch.no_grad(), base():
            usual = pipeline.predict(noisy[:n], t[:n], text[:n])
    predicted = pipeline.predict(noisy, t, text)
    residual = predicted - target
    policy = residual.square().flatten(1).mean(1)
    frozen = (expected - target).square().flatten(1).mean(1)
    return Errors(
        policy[:n],
        frozen[:n],
        policy[n:] if paired else None,
        frozen[n:] if paired else None,
        residual[:n],
        residual[n:] if paired else None,
        pipeline.to_noise(predicted[:n], noisy[:n], t[:n]),
        pipeline.to_noise(usual, noisy[:n], t[:n]),
    )
