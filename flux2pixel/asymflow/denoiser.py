"""The one denoiser: calibrate, call, guide, recover. Every sampler, every proof and every training asks it for x0_hat.

B  images    N  tokens    C  token width (D in pixels, r in latents)    x, x0_hat  (B, N, C)    sigma  () or (B,)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flux2pixel.asymflow.guidance import guide
from flux2pixel.asymflow.method import AsymFlow, per_token

# network(inputs, time): v (B, N, C) of calibrated tokens (B, N, C) at network time (B,).
Network = Callable[[Tensor, Tensor], Tensor]
# branches(inputs, time): conditional v, and unconditional v, or None where there is nothing to guide away from.
Branches = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
# mix(conditional, unconditional, scale): guidance on v as a family does it.
Mix = Callable[[Tensor, Tensor, float], Tensor]
# refine(x0_hat, x, sigma, final): the clean prediction with a readout's parts in it.
Refine = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def denoise(flow: AsymFlow, network: Network, x: Tensor, sigma: Tensor) -> Tensor:
    """x0_hat of noisy pixel tokens x at noise levels ``sigma`` (B,), unguided and differentiable."""
    k, tau = flow.calibrate(sigma)
    return flow.predict_x0(network(per_token(k, x) * x, tau), x, sigma)


def plain(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on v: unconditional + scale (conditional - unconditional)."""
    return unconditional + scale * (conditional - unconditional)


@dataclass(frozen=True)
class Denoiser:
    """Clean predictions of a guided network, ``denoiser(x, sigma) -> x0_hat``, float32 or better.

    Args:
        branches: the network with its conditionings.
        flow: the method's basis and scale; None for a latent network, whose tokens need neither calibration nor
            recovery: x0_hat = x - sigma v.
        guidance: scale of the guidance; 1 is none.
        mix: how the family guides on v. One that is not linear, such as by norms of v, sees the low-rank part A^T v
            alone, whose norms are the latent base's; what a head's readout writes into the complement is guided
            linearly. So a converted model is guided as its latent base is, readout or not.
        orthogonal: guide on x0_hat instead, without the component parallel to it (method: AsymFlow section 6;
            Sadat et al., 2410.02416).
        clamp: applied to every x0_hat, such as to the gamut.
        readout: what a closed-form readout makes of a recovered x0_hat, ``readout(x0_hat, x, sigma, final)``; see
            :meth:`flux2pixel.asymflow.readout.Readout.bind`.
    """

    branches: Branches
    flow: AsymFlow | None = None
    guidance: float = 1.0
    mix: Mix = plain
    orthogonal: bool = False
    clamp: Callable[[Tensor], Tensor] | None = None
    readout: Refine | None = None

    def __call__(self, x: Tensor, sigma: Tensor, final: bool = False) -> Tensor:
        """x0_hat (B, N, C) at noise level ``sigma``; ``final``: no evaluation follows in this sampling."""
        sigma = sigma.expand(len(x))
        inputs, time = x, sigma
        if self.flow is not None:
            k, time = self.flow.calibrate(sigma)
            inputs = per_token(k, x) * x
        v, away = self.branches(inputs, time)
        if away is None:
            x0 = self._recover(v, x, sigma)
        elif self.orthogonal:
            clean, other = (self._recover(branch, x, sigma) for branch in (v, away))
            x0 = guide(clean, other, self.guidance, orthogonal=True)
        else:
            x0 = self._recover(self._mixed(v, away), x, sigma)
        if self.readout is not None:
            x0 = self.readout(x0, x, sigma, final)
        return x0 if self.clamp is None else self.clamp(x0)

    def _mixed(self, v: Tensor, away: Tensor) -> Tensor:
        if self.flow is None or self.mix is plain:
            return self.mix(v, away, self.guidance)
        basis = self.flow.basis.to(v)
        low = v @ basis, away @ basis
        beyond = self.mix(*low, self.guidance) - plain(*low, self.guidance)
        return plain(v, away, self.guidance) + beyond @ basis.mT

    def _recover(self, v: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        if self.flow is not None:
            return self.flow.predict_x0(v, x, sigma)
        with torch.autocast(x.device.type, enabled=False):
            return x - per_token(sigma, x) * v.to(x.dtype)
