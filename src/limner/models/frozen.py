"""What is not trained need not keep what only training would need.

torch keeps the input of every convolution through which a gradient flows, whether or not its weight learns, and three tensors of every
gated feed-forward layer where one is enough. In a UNet with a LoRA on its attentions these are half of what a training step holds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.nn.grad import conv2d_input


class _Frozen(torch.autograd.Function):
    """A convolution with a gradient for its input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
        y = F.conv2d(x, weight, bias, *options)
        ctx.save_for_backward(weight.to(y.dtype))  # under autocast y has another type
        ctx.shape, ctx.options = x.shape, options
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight, gradients[0], *ctx.options), None, None, None


class FrozenConv2d(nn.Conv2d):
    """Conv2d that, while its weight is frozen, keeps nothing but the weight. Values and gradients are the same."""

    def forward(self, input: Tensor) -> Tensor:
        learns = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if learns or not torch.is_grad_enabled() or not input.requires_grad or self.padding_mode != "zeros":
            return super().forward(input)
        options = (self.stride, self.padding, self.dilation, self.groups)
        return _Frozen.apply(input, self.weight, self.bias, options)


class _Gate(torch.autograd.Function):
    """hidden * gelu(gate) of a tensor that holds both; the gelu is computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        hidden, gate = both.chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        hidden, gate = ctx.saved_tensors[0].chunk(2, dim=-1)
        return torch.cat([gradients[0] * F.gelu(gate), torch.ops.aten.gelu_backward(gradients[0] * hidden, gate)], dim=-1)


class ThriftyGEGLU(GEGLU):
    """diffusers' GEGLU that keeps one tensor for the backward pass instead of two. Values and gradients are the same."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _Gate.apply(self.proj(hidden_states))


def forget_inputs(module: nn.Module) -> None:
    """Make all plain convolutions below a module `FrozenConv2d` and all gates `ThriftyGEGLU`; weights and names stay."""
    for layer in module.modules():
        if type(layer) is nn.Conv2d:
            layer.__class__ = FrozenConv2d
        elif type(layer) is GEGLU:
            layer.__class__ = ThriftyGEGLU
