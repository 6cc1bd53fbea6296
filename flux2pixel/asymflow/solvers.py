"""Solvers in x0 form, and the one sampling loop: the network is asked only for a clean prediction.

``denoiser(x, sigma, final)`` maps tokens (B, N, D) and a noise level () to x0_hat (B, N, D); ``final`` tells it that no
evaluation follows. A solver is made for a grid of noise levels from 1 down to 0, (steps + 1,), and then takes one step
at a time: ``step(denoiser, x, i)`` goes from ``sigmas[i]`` to ``sigmas[i + 1]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor, bool], Tensor]
Step = Callable[[Denoise, Tensor, int], Tensor]
Solver = Callable[[Tensor], Step]
# on_step(i, x) is called after step i, counted from 0; what it returns goes on.
OnStep = Callable[[int, Tensor], Tensor]


def euler(sigmas: Tensor) -> Step:
    """First order: x' = x0_hat + (sigma' / sigma)(x - x0_hat), the Euler step of dx = (x - x0_hat) / sigma dsigma."""
    last = len(sigmas) - 2

    def step(denoise: Denoise, x: Tensor, i: int) -> Tensor:
        x0 = denoise(x, sigmas[i], i == last)
        return x0 + (sigmas[i + 1] / sigmas[i]) * (x - x0)

    return step


def heun(sigmas: Tensor) -> Step:
    """Second order: the trapezoidal rule on dx/dsigma; the last step, to sigma = 0, is Euler's."""
    last = len(sigmas) - 2

    def step(denoise: Denoise, x: Tensor, i: int) -> Tensor:
        sigma, following = sigmas[i], sigmas[i + 1]
        slope = (x - denoise(x, sigma, i == last)) / sigma
        ahead = x + (following - sigma) * slope
        if i == last:
            return ahead
        slope = (slope + (ahead - denoise(ahead, following, False)) / following) / 2
        return x + (following - sigma) * slope

    return step


def unipc(sigmas: Tensor) -> Step:
    """UniPC, order 2, on flow sigmas: diffusers' UniPCMultistepScheduler."""
    from diffusers import UniPCMultistepScheduler

    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2, "flow_shift": 1.0}
    return scheduled(UniPCMultistepScheduler(**config))(sigmas)


def scheduled(scheduler: Any, sigma_min: float = 0.0) -> Solver:
    """A solver out of a flow-matching scheduler of diffusers that takes ``sigmas`` as they are.

    The scheduler is asked for a velocity, (x - x0_hat) / max(sigma, sigma_min). Raises ValueError, when it is given the
    grid, if it shifts or cuts it.
    """

    def solver(sigmas: Tensor) -> Step:
        given = sigmas[:-1].double().cpu()
        scheduler.set_timesteps(sigmas=given.numpy(), device=sigmas.device)
        kept = scheduler.sigmas[: len(given)].double().cpu()
        if len(kept) != len(given) or (kept - given).abs().max() > 1e-4:
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} changes the noise levels it is given; "
                "set its shift to 1 and use_dynamic_shifting to False"
            )
        # Large shifts repeat integer timesteps; looked up by value, a multistep scheduler would begin at the wrong one.
        scheduler.set_begin_index(0)
        last = len(given) - 1

        def step(denoise: Denoise, x: Tensor, i: int) -> Tensor:
            x0 = denoise(x, sigmas[i], i == last)
            velocity = (x - x0) / sigmas[i].clamp(min=sigma_min)
            stepped: Tensor = scheduler.step(velocity, scheduler.timesteps[i], x, return_dict=False)[0]
            return stepped

        return step

    return solver


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "unipc": unipc}


@torch.no_grad()
def sample(
    denoise: Denoise, noise: Tensor, sigmas: Tensor, solver: Solver = euler, on_step: OnStep | None = None
) -> Tensor:
    """Run ``solver`` from ``noise`` (B, N, D) along ``sigmas`` (steps + 1,), from 1 down to 0."""
    step, x = solver(sigmas), noise
    for i in range(len(sigmas) - 1):
        x = step(denoise, x, i)
        if on_step is not None:
            x = on_step(i, x)
    return x
