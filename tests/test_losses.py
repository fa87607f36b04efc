"""Preference losses against numbers worked out by hand, properties, and diffusers' own DDPM step."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from limner.training.losses import dpo, equivalent_betas, safeguard, scale_gradient, sft, statistics


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_dpo_by_hand() -> None:
    """beta 2500, d_w = 0.1000 - 0.1004 = -4e-4, d_l = 0.2002 - 0.2000 = 2e-4, margin 6e-4:
    loss = log(1 + exp(-1250 * 6e-4)) = log(1 + exp(-0.75)) = log 1.4723666 = 0.3868701."""
    loss, metrics = dpo(column(0.1), column(0.2002), column(0.1004), column(0.2), beta=2500)
    assert loss.item() == pytest.approx(0.3868701, abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(6e-4)
    assert metrics["winner_error_difference"].item() == pytest.approx(-4e-4)
    assert metrics["loser_error_difference"].item() == pytest.approx(2e-4)
    assert metrics["accuracy"].item() == 1


def test_dpo_of_a_batch_is_each_pairs_own() -> None:
    """beta 4: margins 1, -1, 0 give log(1+e^-2) = 0.1269280, log(1+e^2) = 2.1269280, log 2; a tie is half right."""
    loss, metrics = dpo(column(1, 2, 1), column(2, 1, 1), column(1, 1, 1), column(1, 1, 1), beta=4)
    assert loss.tolist() == pytest.approx([0.1269280, 2.1269280, math.log(2)], abs=1e-6)
    assert metrics["accuracy"].tolist() == [1, 0, 0.5]


@pytest.mark.parametrize("beta", [1.0, 2500.0])
def test_identical_policy_and_reference_give_log_2(beta: float) -> None:
    w, l = torch.rand(16), torch.rand(16)  # noqa: E741
    loss, metrics = dpo(w, l, w.clone(), l.clone(), beta=beta)
    assert torch.allclose(loss, torch.full_like(loss, math.log(2)))
    assert (metrics["accuracy"] == 0.5).all()


def test_swapping_winner_and_loser_flips_the_margin() -> None:
    """And -log s(x) - (-log s(-x)) = -x."""
    g = torch.Generator().manual_seed(0)
    w, l, rw, rl = torch.rand(4, 32, generator=g, dtype=torch.float64)  # noqa: E741
    (a, one), (b, other) = dpo(w, l, rw, rl, beta=10), dpo(l, w, rl, rw, beta=10)
    assert torch.equal(one["margin"], -other["margin"])
    assert torch.equal(one["accuracy"], 1 - other["accuracy"])
    assert torch.allclose(a - b, -5 * one["margin"])


def test_the_gradient_lowers_the_winner_and_raises_the_loser() -> None:
    """At the start dloss/d e_w = beta/2 * sigmoid(0) = beta/4, and the opposite for the loser; none to the reference's metrics."""
    w, l = column(0.3).requires_grad_(), column(0.5).requires_grad_()  # noqa: E741
    loss, metrics = dpo(w, l, w.detach(), l.detach(), beta=100)
    loss.sum().backward()
    assert (w.grad.item(), l.grad.item()) == (25, -25)
    assert not any(v.requires_grad for v in metrics.values())


def test_descending_on_dpo_moves_a_toy_towards_the_winner() -> None:
    """One weight predicts; the winner's target is 1, the loser's -1: the weight must grow."""
    weight = torch.zeros(1, requires_grad=True)
    for _ in range(20):
        w, l = (weight - 1).square(), (weight + 1).square()  # noqa: E741
        loss, _ = dpo(w, l, torch.ones(1), torch.ones(1), beta=1)
        (gradient,) = torch.autograd.grad(loss.sum(), weight)
        weight = (weight - 0.1 * gradient).detach().requires_grad_()
    assert weight.item() > 0.5


def test_no_overflow_far_from_the_reference() -> None:
    """-log s(x) -> -x for x -> -inf: 1250 * 10."""
    loss, _ = dpo(column(10), column(0), column(0), column(0), beta=2500)
    assert loss.item() == pytest.approx(12500)


def test_sft_is_the_winners_error() -> None:
    error = torch.rand(3, requires_grad=True)
    loss, metrics = sft(error, torch.zeros(3))
    assert loss is error
    assert torch.equal(metrics["winner_error_difference"], error.detach())


@pytest.mark.parametrize("t", [0, 1, 37, 500, 998, 999])
@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
def test_statistics_equal_a_separate_ddpm_step(t: int, schedule: str) -> None:
    """Eq. 4 as it is written: both networks' predictions go one DDPM step, same latents, same noise; compare channel means."""
    ddpm = DDPMScheduler(1000, 0.00085, 0.012, schedule, clip_sample=False)
    ddpm.alphas_cumprod = ddpm.alphas_cumprod.double()  # at t 999 the difference of two steps of size 1 is 1e-3 of them
    ddpm.betas, ddpm.alphas, ddpm.one = ddpm.betas.double(), ddpm.alphas.double(), ddpm.one.double()
    g = torch.Generator().manual_seed(t)
    noisy, policy, base = torch.randn(3, 2, 4, 8, 8, generator=g, dtype=torch.float64)
    steps = []
    for prediction in (policy, base):
        shared = torch.Generator().manual_seed(1)
        steps.append(ddpm.step(prediction, t, noisy, generator=shared).prev_sample.mean((2, 3)))
    wanted = (steps[0] - steps[1]).square().sum(1)
    found = statistics(policy, base, torch.tensor([t, t]), ddpm.alphas_cumprod)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=0)


def test_statistics_by_hand() -> None:
    """alphas (0.8, 0.4), t = 1: a = 0.5, c = 0.5 / (sqrt 0.5 sqrt 0.6) = 0.9128709; means differ by (1, -2): c^2 * 5 = 0.8333333 * 5.
    t = 0: a = 0.8, c = 0.2 / (sqrt 0.8 sqrt 0.2) = 0.5: 0.25 * 5. What averages out over space does not count."""
    policy = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    policy[:, 0] += torch.tensor([[0.0, 2.0], [5.0, -3.0]])
    policy[:, 1] -= 2
    found = statistics(policy, torch.zeros_like(policy), torch.tensor([1, 0]), column(0.8, 0.4))
    assert found.tolist() == pytest.approx([25 / 6, 1.25])


def test_scale_gradient() -> None:
    x = column(1.0, 2.0).requires_grad_()
    y = scale_gradient(x.square(), column(0.5, 0.0))
    assert y.tolist() == [1, 4]
    y.sum().backward()
    assert x.grad.tolist() == [1, 0]


def test_safeguard_by_hand() -> None:
    """mu 0.2, w = (1, 0), |w|^2 = 1. l = (2, 1): <w, l> = 2, 0.8 / 2 = 0.4.
    l = (0.5, 9): 1.6, cut to 1. l = (-1, 3): opposed, 1. l = (0, 1): 1."""
    w = torch.tensor([[1.0, 0.0]] * 4).view(4, 1, 1, 2)
    l = torch.tensor([[2.0, 1.0], [0.5, 9.0], [-1.0, 3.0], [0.0, 1.0]]).view(4, 1, 1, 2)  # noqa: E741
    assert safeguard(w, l, mu=0.2).tolist() == pytest.approx([0.4, 1, 1, 1])


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0])
def test_the_safeguard_keeps_the_winners_error_from_rising(mu: float) -> None:
    """A small step along -(g_w - lambda g_l) changes the winner's error by -<g_w, g_w - lambda g_l>:
    at least mu |g_w|^2 of descent is left."""
    g = torch.Generator().manual_seed(3)
    w, l = torch.randn(2, 64, 4, 2, 2, generator=g)  # noqa: E741
    factor = safeguard(w, l, mu=mu).view(-1, 1, 1, 1)
    drop = (w * (w - factor * l)).flatten(1).sum(1)
    assert (drop >= mu * w.square().flatten(1).sum(1) - 1e-4).all()


def test_equivalent_betas() -> None:
    """SD 1.5 at 512 px: 4 * 64 * 64 = 16384 elements. beta per mean with 1/2 of 5000 is 2500 without it, 5000 / 16384 per summed error:
    each gives the same logit 0.5 * 5000 * m = 2500 * m = 0.5 * (5000 / 16384) * (16384 m)."""
    found = equivalent_betas(5000, 16384)
    assert list(found.values()) == [5000, 2500, 5000 / 16384]
