"""What a finetune minimises: one batch, noise levels and noise in; the loss and its parts out.

    x0   pixel tokens (B, N, D)     z0   latent tokens (B, N, r)     sigma (B,)     eps (B, N, D)

The frozen converted model on the low-rank image is the latent base on (z0, A^T eps) at time tau, exactly:
k A^T x_t^L = (1 - tau) z0 + tau A^T eps, so its error is d_L = x0_L - x0_hat_L = s A tau (v - (A^T eps - z0)).
That forward works on r numbers a token, needs no D-wide projection, and d_L is had without a cancellation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Generator, Tensor, nn

from flux2pixel.asymflow import schedule
from flux2pixel.asymflow.codec import Codec
from flux2pixel.asymflow.denoiser import denoise
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.data.cache import Batch
from flux2pixel.families.base import Conditioning
from flux2pixel.finetune.loss import flow_matching, reduce_by
from flux2pixel.finetune.step.perceptual import perceptual
from flux2pixel.models.base import Base
from flux2pixel.recipe import Finetune

# Streams of random numbers of a run's seed, apart from those of the data order.
NOISE, DROPOUT, VALIDATION = 101, 102, 103

# velocity(z, tau, cond, grid): the latent base's v (B, N, r), without a gradient.
Velocity = Callable[[Tensor, Tensor, Conditioning, tuple[int, int]], Tensor]


@dataclass(frozen=True)
class Parts:
    """The loss (), what it is made of, and the mean lam (zeros for plain flow matching)."""

    loss: Tensor
    regression: Tensor
    perceptual: Tensor
    lam: Tensor


class Objective:
    """The loss of a network on a batch, as the recipe's ``[finetune]`` says.

    Args:
        base: of the pixel model; it knows how to call the network.
        flow: the method's basis and scale.
        reference: the latent base's velocity, or None for plain flow matching.
        lpips: the perceptual network, or None.
        codec: of the model's pixel space; one without an offset if not given.
    """

    def __init__(
        self,
        settings: Finetune,
        base: Base,
        flow: AsymFlow,
        reference: Velocity | None = None,
        lpips: Any = None,
        codec: Codec | None = None,
    ):
        self.settings, self.base, self.flow = settings, base, flow
        self.reference, self.lpips, self.codec = reference, lpips, codec or Codec(base.patch_size)

    def __call__(self, network: nn.Module, batch: Batch, sigma: Tensor, eps: Tensor) -> Parts:
        settings, x0 = self.settings, batch.pixels(self.codec)
        d_low = self.error(batch, sigma, eps)  # first, so that its activations are gone before the others come
        x0_hat = self.predict(network, batch, x0, sigma, eps)
        nothing = x0_hat.new_zeros(())
        if d_low is None:
            plain = flow_matching(x0, x0_hat, sigma, settings.sigma_min)
            return Parts(plain, plain.detach(), nothing, nothing)
        reduced = reduce_by(d_low, x0, x0_hat, sigma, settings.kappa, settings.sigma_min)
        loss, seen = reduced.loss, nothing
        if self.lpips is not None:
            seen = perceptual(
                self.lpips, self.codec, x0, x0_hat, reduced.lam, reduced.weight, sigma, batch.grid, settings.sigma_min
            )
            loss = loss + settings.perceptual * seen
        return Parts(loss, reduced.loss.detach(), seen.detach(), reduced.lam.mean())

    def predict(self, network: nn.Module, batch: Batch, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        """x0_hat (B, N, D) float32 of the trained network."""

        def call(tokens: Tensor, tau: Tensor) -> Tensor:
            with autocast(x0.device, self.settings.precision):
                return self.base.call(network, tokens, tau, batch.conditioning, batch.grid)

        return denoise(self.flow, call, torch.lerp(x0, eps, sigma.view(-1, 1, 1)), sigma)

    @torch.no_grad()
    def error(self, batch: Batch, sigma: Tensor, eps: Tensor) -> Tensor | None:
        """d_L (B, N, D): the frozen model's error on the low-rank image; None for plain flow matching."""
        if self.reference is None:
            return None
        z0, z1 = batch.latents.float(), eps @ self.flow.basis
        _, tau = self.flow.calibrate(sigma)
        time = tau.view(-1, 1, 1)
        with autocast(eps.device, self.settings.precision):
            v = self.reference(torch.lerp(z0, z1, time), tau, batch.conditioning, batch.grid)
        return self.flow.lift(time * (v.float() - (z1 - z0)))


class LatentReference:
    """The frozen base as a network of its own, for full finetuning."""

    def __init__(self, base: Base, network: nn.Module):
        self.base, self.network = base, network

    def __call__(self, z: Tensor, tau: Tensor, cond: Conditioning, grid: tuple[int, int]) -> Tensor:
        return self.base.call(self.network, z, tau, cond, grid)


class SharedReference:
    """The trained network with its adapters off and its original projections: no second copy of the weights.

    Its projections are folded, W_in A^T and A W_out, so it takes A z and gives A v; A^T takes the basis off again.
    """

    def __init__(self, base: Base, network: nn.Module, basis: Tensor):
        self.base, self.network, self.basis = base, network, basis

    def __call__(self, z: Tensor, tau: Tensor, cond: Conditioning, grid: tuple[int, int]) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            wide = z @ self.basis.mT
        with original(self.network):
            v = self.base.call(self.network, wide, tau, cond, grid)
        with torch.autocast(z.device.type, enabled=False):
            return v.float() @ self.basis


@contextmanager
def original(network: nn.Module):
    """The network as it was before training, while the block runs: adapters off, saved modules' originals on."""
    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters would touch requires_grad, on which FSDP relies
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision of both forwards; the method's own arithmetic stays float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def seeded(device: torch.device, *key: int) -> Generator:
    """A generator whose stream depends on ``key`` alone: draws are a function of place, never of history."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return Generator(device).manual_seed(int(state[0]) << 31 ^ int(state[1]))


def draw(batch: Batch, seed: int, shift: float) -> tuple[Tensor, Tensor]:
    """Noise levels (B,) and noise (B, N, D) of a batch: of its number in the data's order, whatever process has it.

    ``shift`` is that of an image of 1024 x 1024 pixels; smaller ones are trained at less.
    """
    device = batch.rgb.device
    generator = seeded(device, seed, NOISE, batch.number)
    count, (h, w) = len(batch.rgb), batch.grid
    sigma = schedule.draw(count, schedule.shift_at(shift, *batch.rgb.shape[-2:]), generator)
    return sigma, torch.randn(count, h * w, 3 * batch.patch_size**2, generator=generator, device=device)
