"""Frozen convolutions against torch's own."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from limner.models.frozen import FrozenConv2d, ThriftyGEGLU, forget_inputs


def values(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of its squared sum."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "padding": 1}, {"groups": 2, "padding": 1}, {"bias": False}])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_torchs(options: dict[str, int], memory_format: torch.memory_format) -> None:
    layer = nn.Conv2d(4, 6, 3, **options).requires_grad_(False)
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0)).to(memory_format=memory_format)
    wanted = values(layer, x)
    forget_inputs(layer)
    assert type(layer) is FrozenConv2d
    for a, b in zip(values(layer, x), wanted):
        torch.testing.assert_close(a, b)


def test_its_input_is_not_kept() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    forget_inputs(layer)
    kept: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(1, 4, 8, 8, requires_grad=True))
    assert kept == [(4, 4, 3, 3)], "only the weight"


def test_a_layer_that_learns_gets_its_gradient() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    forget_inputs(layer)
    layer(torch.randn(1, 4, 8, 8, requires_grad=True)).sum().backward()
    assert layer.weight.grad is not None


def test_the_gate_is_diffusers_own() -> None:
    """Same values and gradients, and of the gate only what it is made of is kept."""
    layer = GEGLU(6, 10).requires_grad_(False)
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    wanted = values(layer, x)
    forget_inputs(layer)
    assert type(layer) is ThriftyGEGLU
    for a, b in zip(values(layer, x), wanted):
        torch.testing.assert_close(a, b)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        layer(x.requires_grad_())
    assert (2, 5, 20) in kept
    assert (2, 5, 10) not in kept
