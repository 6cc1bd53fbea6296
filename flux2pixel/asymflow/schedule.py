"""Noise levels: the shift map, the coupled pixel grid of a latent grid, and training draws."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def shift(t: Tensor, factor: float) -> Tensor:
    """Move times towards noise: a t / (1 + (a - 1) t), the FLUX time shift; ``factor`` is a itself, not its log."""
    return factor * t / (1 + (factor - 1) * t)


def grid(steps: int, factor: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A shifted uniform time grid from 1 to 0, (steps + 1,)."""
    return shift(torch.linspace(1, 0, steps + 1, dtype=dtype), factor)


def draw(count: int, factor: float, generator: Generator) -> Tensor:
    """Training noise levels (count,): shifted logit-normal(0, 1)."""
    return shift(torch.sigmoid(torch.randn(count, generator=generator, device=generator.device)), factor)
