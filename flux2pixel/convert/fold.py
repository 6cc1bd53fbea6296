"""Folding a basis into the in- and out-projection, and the exact test that the result is the same model.

W_in' = W_in A^T    (inner, D)        W_out' = A W_out    (D, inner)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flux2pixel.asymflow import schedule
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.asymflow.sampler import euler
from flux2pixel.errors import UsageError

Network = Callable[[Tensor, Tensor], Tensor]


def fold(state: Mapping[str, Tensor], basis: Tensor, in_projection: str, out_projection: str) -> dict[str, Tensor]:
    """Return the state dict of the pixel model; products in float64, stored in each tensor's own dtype."""
    a = basis.double()
    w_in, w_out = state[in_projection], state[out_projection]
    if w_in.shape[1] != a.shape[1] or w_out.shape[0] != a.shape[1]:
        raise UsageError(
            f"subspace: rank {a.shape[1]} does not fit the base, whose latent tokens have {w_in.shape[1]} numbers"
        )
    folded = dict(state)
    folded[in_projection] = (w_in.double() @ a.mT).to(w_in.dtype).contiguous()
    folded[out_projection] = (a @ w_out.double()).to(w_out.dtype).contiguous()
    return folded


@torch.no_grad()
def exactness(latent: Network, pixel: Network, flow: AsymFlow, noise: Tensor, steps: int) -> float:
    """Sample both models from coupled noise on matched grids; return the largest absolute error of the identities.

    ``latent(z, tau)`` and ``pixel(x, tau)`` are the two networks on tokens; ``noise`` is eps, (B, N, D) float64. After
    every Euler step A^T x = z / k and (I - P) x = sigma (I - P) eps must hold (AsymFlow's acceptance test).
    """
    basis, scale = flow.basis.to(noise.dtype), flow.scale.to(noise.dtype)
    taus = schedule.grid(steps, dtype=noise.dtype)
    sigmas = flow.sigma_of(taus)
    z, x = noise @ basis, noise
    off_plane = noise - (noise @ basis) @ basis.mT
    worst = 0.0
    for i in range(steps):
        z = z + (taus[i + 1] - taus[i]) * latent(z, taus[i].expand(len(z)))

        def predict(tokens: Tensor, sigma: Tensor) -> Tensor:
            k, tau = flow.calibrate(sigma.expand(len(tokens)))
            return flow.predict_x0(pixel(k.view(-1, 1, 1) * tokens, tau), tokens, sigma.expand(len(tokens)))

        x = euler(predict, x, sigmas[i : i + 2])
        k_next = 1 / (scale * (1 - sigmas[i + 1]) + sigmas[i + 1])
        inside = (x @ basis - z / k_next).abs().max()
        outside = (x - (x @ basis) @ basis.mT - sigmas[i + 1] * off_plane).abs().max()
        worst = max(worst, inside.item(), outside.item())
    return worst
