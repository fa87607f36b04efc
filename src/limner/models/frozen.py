"""Convolutions that are not trained need not keep their input for the backward pass.

torch keeps the input of every convolution through which a gradient flows, whether or not its weight learns. In a UNet with a LoRA on
its attentions no convolution learns, and their inputs are a good part of what a training step holds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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


def forget_inputs(module: nn.Module) -> None:
    """Make all plain convolutions below a module `FrozenConv2d`; weights and names stay."""
    for layer in module.modules():
        if type(layer) is nn.Conv2d:
            layer.__class__ = FrozenConv2d
