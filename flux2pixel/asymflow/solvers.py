"""Samplers in x0 form: the network is asked only for a clean prediction, never divided by a vanishing sigma.

``predict(x, sigma)`` maps tokens (B, N, D) and a noise level () to x0_hat (B, N, D). Grids run from 1 down to 0.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]


def euler(predict: Predict, x: Tensor, sigmas: Tensor) -> Tensor:
    """First order: x' = x0_hat + (sigma' / sigma)(x - x0_hat), the Euler step of dx = (x - x0_hat) / sigma dsigma."""
    for sigma, following in pairwise(sigmas):
        x0 = predict(x, sigma)
        x = x0 + (following / sigma) * (x - x0)
    return x


def heun(predict: Predict, x: Tensor, sigmas: Tensor) -> Tensor:
    """Second order: the trapezoidal rule on dx/dsigma; the last step, to sigma = 0, is Euler's."""
    for sigma, following in pairwise(sigmas):
        slope = (x - predict(x, sigma)) / sigma
        ahead = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (ahead - predict(ahead, following)) / following) / 2
            ahead = x + (following - sigma) * slope
        x = ahead
    return x


def unipc(predict: Predict, x: Tensor, sigmas: Tensor) -> Tensor:
    """UniPC, order 2, on flow sigmas: diffusers' UniPCMultistepScheduler driven with x0 predictions."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, flow_shift=1.0
    )
    scheduler.set_timesteps(sigmas=sigmas[:-1].double().cpu().numpy())
    for sigma, step in zip(sigmas[:-1], scheduler.timesteps, strict=True):
        velocity = (x - predict(x, sigma)) / sigma
        x = scheduler.step(velocity, step, x, return_dict=False)[0]
    return x


SOLVERS = {"euler": euler, "heun": heun, "unipc": unipc}


def guide(conditional: Tensor, unconditional: Tensor, guidance: float, *, orthogonal: bool) -> Tensor:
    """Classifier-free guidance on clean predictions (B, N, D).

    With ``orthogonal`` the part of the guidance parallel to the conditional x0_hat is removed, per sample, which keeps
    strong guidance from saturating colours.
    """
    push = conditional - unconditional
    if orthogonal:
        size = conditional.flatten(1).square().sum(1).clamp(min=1e-12)
        along = (push * conditional).flatten(1).sum(1) / size
        push = push - along.view(-1, *[1] * (push.ndim - 1)) * conditional
    return conditional + (guidance - 1) * push


@torch.no_grad()
def sample(
    predict: Predict, noise: Tensor, sigmas: Tensor, *, solver: str = "euler", clamp: Callable | None = None
) -> Tensor:
    """Run a solver from ``noise`` (B, N, D) along ``sigmas``; ``clamp`` is applied to every x0_hat."""
    bounded = predict if clamp is None else lambda x, sigma: clamp(predict(x, sigma))
    return SOLVERS[solver](bounded, noise, sigmas)
