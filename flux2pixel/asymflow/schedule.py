"""Noise levels: the shift map, the grids of sampling and the draws of training.

``shift`` always is a factor of the *pixel* noise level at 1024 x 1024. It grows with the resolution, as an image's
signal does: :func:`shift_at`. A latent network sees the matched grid, which is that factor over the method's scale s,
since sigma = shift(tau, s).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

REFERENCE_SIDE = 1024  # pixels along the side of the image that a shift is stated for


def shift(t: Tensor, factor: float) -> Tensor:
    """Move times towards noise: a t / (1 + (a - 1) t), the FLUX time shift; ``factor`` is a itself, not its log."""
    return factor * t / (1 + (factor - 1) * t)


def shift_at(shift: float, height: int, width: int) -> float:
    """The shift of an image of this size in pixels: ``shift`` sqrt(H W) / 1024 (method: AsymFlow section 6)."""
    return shift * (height * width) ** 0.5 / REFERENCE_SIDE


def grid(steps: int, factor: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A shifted uniform time grid from 1 to 0, (steps + 1,)."""
    return shift(torch.linspace(1, 0, steps + 1, dtype=dtype), factor)


def noise_levels(steps: int, shift: float, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The grid that an image of this size is drawn on, from 1 to 0, (steps + 1,).

    With ``shift`` over s instead, the matched grid of the latent network. Computed in float64 and rounded once.
    """
    return grid(steps, shift_at(shift, height, width), torch.float64).to(dtype)


def draw(count: int, factor: float, generator: Generator) -> Tensor:
    """Training noise levels (count,): shifted logit-normal(0, 1)."""
    return shift(torch.sigmoid(torch.randn(count, generator=generator, device=generator.device)), factor)
