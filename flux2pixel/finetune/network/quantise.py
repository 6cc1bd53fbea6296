"""Frozen Linear weights in 8 bits: one scale a row, dequantised when used. For LoRA on one small GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A frozen ``nn.Linear``: W is stored as ``rows`` (out, in) int8 with ``scale`` (out, 1), |W - W'| <= scale / 2.

    Gradients flow through to the input. Rounding is to nearest, so the error of a row is at most its largest absolute
    value / 254 an entry.
    """

    rows: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.register_buffer("rows", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The dequantised weight, in the dtype it came in."""
        return (self.rows * self.scale).to(self.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight, self.bias)


def quantise(network: nn.Module) -> int:
    """Replace every frozen Linear of ``network`` in place, LoRA's own base layers too; returns how many there were."""
    count = 0
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and not child.weight.requires_grad:
                setattr(module, name, Int8Linear(child))
                count += 1
    return count
