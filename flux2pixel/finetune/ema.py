"""Exponential moving average of parameters with the power profile (Karras et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PowerEma:
    """Averages by parameter name; at update n the decay is beta = (1 - 1/n)^(gamma + 1)."""

    def __init__(self, module: nn.Module, gamma: float = 7.0):
        self.gamma, self.updates = gamma, 0
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Fold the module's present parameters in."""
        self.updates += 1
        keep = (1 - 1 / self.updates) ** (self.gamma + 1)
        names, current = zip(*module.named_parameters(), strict=True)
        torch._foreach_lerp_([self.values[n] for n in names], [p.detach() for p in current], 1 - keep)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averages into the module."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.values[name])

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        """What a checkpoint needs."""
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state: dict) -> None:
        """Go on from ``state_dict``."""
        self.updates, self.values = state["updates"], state["values"]
