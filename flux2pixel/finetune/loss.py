"""The AsymFlow finetuning loss (paper: Asymmetric Flow Models, variance reduction).

x0, x0_hat            clean tokens and the trainable model's prediction            (B, N, D)
x0_low, x0_low_hat    low-rank clean tokens s A z and the frozen model's prediction (B, N, D)
sigma                 noise level                                                  (B,)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VarianceReduction:
    """``loss`` (); ``lam`` (B, N, channels), the regression coefficient; ``weight`` (B,), w."""

    loss: Tensor
    lam: Tensor
    weight: Tensor


def variance_reduction(
    x0: Tensor,
    x0_hat: Tensor,
    x0_low: Tensor,
    x0_low_hat: Tensor,
    sigma: Tensor,
    kappa: float = 0.3,
    sigma_min: float = 0.05,
    channels: int = 3,
) -> VarianceReduction:
    """Regress x0_hat on a target from which the frozen model's own error has been subtracted.

    d = x0 - sg(x0_hat), d_L = x0_L - x0_L_hat; lam = clamp(<d, d_L> / max(<d_L, d_L>, 1e-4), 0, 1) per patch and
    channel, products being means over the patch's pixels; w = alpha^2 / (alpha^2 + (kappa sigma)^2), alpha = 1 - sigma;
    target = x0 - (1 - w) lam d_L; loss = mean((x0_hat - target)^2 / max(sigma, sigma_min)^2). Float32 throughout.
    """
    dtype = torch.promote_types(x0_hat.dtype, torch.float32)
    d_low = x0_low.to(dtype) - x0_low_hat.to(dtype)
    return reduce_by(d_low, x0, x0_hat, sigma, kappa, sigma_min, channels)


def reduce_by(
    d_low: Tensor,
    x0: Tensor,
    x0_hat: Tensor,
    sigma: Tensor,
    kappa: float = 0.3,
    sigma_min: float = 0.05,
    channels: int = 3,
) -> VarianceReduction:
    """:func:`variance_reduction` from the frozen model's error d_L (B, N, D) itself."""
    dtype = torch.promote_types(x0_hat.dtype, torch.float32)
    x0, x0_hat, d_low = (t.to(dtype) for t in (x0, x0_hat, d_low))
    level = sigma.to(dtype).view(-1, 1, 1)
    d_low = d_low.detach().unflatten(-1, (channels, -1))
    d = (x0 - x0_hat.detach()).unflatten(-1, (channels, -1))
    lam = ((d * d_low).mean(-1) / d_low.square().mean(-1).clamp(min=1e-4)).clamp(0, 1)
    signal = (1 - level).square()
    weight = signal / (signal + (kappa * level).square())
    target = x0 - (1 - weight) * (lam.unsqueeze(-1) * d_low).flatten(-2)
    loss = ((x0_hat - target).square() / level.clamp(min=sigma_min).square()).mean()
    return VarianceReduction(loss, lam, weight.flatten())


def flow_matching(x0: Tensor, x0_hat: Tensor, sigma: Tensor, sigma_min: float = 0.05) -> Tensor:
    """Plain flow matching in x0 form: mean((x0_hat - x0)^2 / max(sigma, sigma_min)^2), the velocity's squared error."""
    level = sigma.view(-1, 1, 1).clamp(min=sigma_min)
    return ((x0_hat - x0) / level).square().mean()
