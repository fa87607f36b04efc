"""Preference losses: pure functions of named tensors. Each returns an unreduced loss (B,) and a dict of metrics (B,).

An *error* is a sample's mean squared denoising error over channels and space. β is per mean squared error, with the factor ½
of the original Diffusion-DPO code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Output = tuple[Tensor, dict[str, Tensor]]


def dpo(winner_error: Tensor, loser_error: Tensor, winner_reference_error: Tensor, loser_reference_error: Tensor, *, beta: float) -> Output:
    """Diffusion-DPO (arXiv 2311.12908, eq. 14).

        d_w = e_w - r_w,  d_l = e_l - r_l,  loss = -log sigmoid(-beta/2 (d_w - d_l))

    Args:
        winner_error, loser_error: of the policy, (B,), with gradient.
        winner_reference_error, loser_reference_error: of the reference at the same noise and timestep, (B,).
        beta: strength; the paper's T is absorbed, its weight over timesteps is constant, as in its code.

    Returns:
        loss (B,), log 2 where policy and reference agree; metrics winner_error_difference (d_w; below 0 the winner became likelier),
        loser_error_difference, margin (d_l - d_w; positive is good) and accuracy (margin > 0; a tie counts a half).
    """
    d_w, d_l = winner_error - winner_reference_error, loser_error - loser_reference_error
    margin = d_l - d_w
    loss = -F.logsigmoid(0.5 * beta * margin)
    accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()
    metrics = {"winner_error_difference": d_w, "loser_error_difference": d_l, "margin": margin, "accuracy": accuracy}
    return loss, {k: v.detach() for k, v in metrics.items()}


def sft(winner_error: Tensor, winner_reference_error: Tensor) -> Output:
    """Supervised fine-tuning: the denoising error of the winner itself (stage `base`, and an anchor beside DPO)."""
    return winner_error, {"winner_error_difference": (winner_error - winner_reference_error).detach()}


def statistics(policy_noise: Tensor, base_noise: Tensor, t: Tensor, alphas: Tensor) -> Tensor:
    """HG-DPO's statistics matching (arXiv 2405.20216, eq. 4), without a pass of its own.

        || mu(l_theta^{t-1}) - mu(l_base^{t-1}) ||^2,   l^{t-1} one DDPM step from the same l^t, mu the mean of each channel

    With the step's noise shared (the paper leaves that open) everything but the predicted noise cancels:
    mu(l_theta) - mu(l_base) = -c_t mu(eps_theta - eps_base) with c_t = (1 - a_t) / (sqrt(a_t) sqrt(1 - abar_t)), a_t = abar_t / abar_{t-1}.

    Args:
        policy_noise, base_noise: noise predicted for the winner by policy and base model, (B, C, H, W), the first with gradient.
        t: timesteps (B,) int.
        alphas: (T,) cumulative alphas (abar).

    Returns:
        (B,): squared norm over channels. x_0 is not clipped.
    """
    before = torch.cat([alphas.new_ones(1), alphas[:-1]])
    step = alphas[t] / before[t]
    c = (1 - step) / (step.sqrt() * (1 - alphas[t]).sqrt())
    shift = (policy_noise - base_noise).mean((2, 3)) * c.view(-1, 1)
    return shift.square().sum(1)


def scale_gradient(x: Tensor, factor: Tensor | float) -> Tensor:
    """The same value with its gradient multiplied."""
    return x.detach() + factor * (x - x.detach())


def safeguard(winner_residual: Tensor, loser_residual: Tensor, *, mu: float) -> Tensor:
    """Diffusion-SDPO's factor on the loser's gradient (arXiv 2511.03317) that keeps the winner's error from rising.

        lambda = clip((1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1) if <g_w, g_l> > 0, else 1;   g = d error / d prediction = 2 residual / n

    Args:
        winner_residual, loser_residual: prediction - target, (B, C, H, W).
        mu: 0 < mu <= 1; larger protects more.
    """
    w, l = winner_residual.detach().flatten(1), loser_residual.detach().flatten(1)  # noqa: E741
    dot = (w * l).sum(1)
    ratio = (1 - mu) * w.square().sum(1) / dot.clamp_min(1e-12)
    return torch.where(dot > 0, ratio.clamp(0, 1), torch.ones_like(dot))


def equivalent_betas(beta: float, elements: int) -> dict[str, float]:
    """The same strength under other conventions: without the ½ (diffusers' script), and per summed error."""
    return {"mean error, with 1/2 (here)": beta, "mean error, without 1/2": beta / 2, "summed error, with 1/2": beta / elements}
