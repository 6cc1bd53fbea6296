"""Exponential moving average of the trained parameters with the power profile (Karras et al., 2024).

Averages are kept by name in float32 and are sharded like the parameters: an update touches this process's part alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flux2pixel.finetune.network.parallel import local, reshard


class PowerEma:
    """Averages of the parameters that require a gradient; at update n the decay is beta = (1 - 1/n)^(gamma + 1)."""

    def __init__(self, module: nn.Module, gamma: float = 7.0):
        self.gamma, self.updates = gamma, 0
        self.values = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    def _pairs(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        reshard(module)
        parameters = dict(module.named_parameters())
        current = [local(parameters[name].detach()) for name in self.values]
        return [local(value) for value in self.values.values()], current

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Fold the module's present parameters in."""
        self.updates += 1
        keep = (1 - 1 / self.updates) ** (self.gamma + 1)
        averages, current = self._pairs(module)
        torch._foreach_lerp_(averages, current, 1 - keep)

    @torch.no_grad()
    def follow(self, module: nn.Module) -> None:
        """Take the present parameters as they are: before averaging begins."""
        averages, current = self._pairs(module)
        torch._foreach_copy_(averages, current)

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """The module holds the averages while the block runs; needs one tensor's memory, loses no bit."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        for average, current in zip(*self._pairs(module), strict=True):
            kept = current.clone()
            current.copy_(average)
            average.copy_(kept)
