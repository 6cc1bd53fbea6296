"""The autoencoder's prior, and token pairs without a single image: pixels and latents the VAE itself makes up.

By Stein's lemma E[f(z) z^T] = E[df/dz] for white z: the cross-covariance of decoded prior samples with their latents
is the decoder's Jacobian averaged over the prior. White latents are far from any the VAE was trained on, though, and
that Jacobian aligns badly with real images. Two things help, both measured in ``benchmarks/data_free_basis.py``:
latents with the spatial correlation of natural images (power spectrum 1 / f^3), and pairing each decoded image with
its own encoding, round trip after round trip, which moves the pairs to where encoder and decoder agree.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from flux2pixel.asymflow import color, tokens
from flux2pixel.models.base import Base

EXPONENT = 3.0  # of the power spectrum; 2 to 4 differ by 2 % in the basis's residual
ROUND_TRIPS = 2  # a third gains another 0.5 %
SIDE = 256  # pixels, or what the VAE was trained at if that is less

# Half an 8-bit step: at black itself Oklab's cube root has no derivative.
DARKEST = 0.5 / 255


def prior_side(base: Base) -> int:
    """Side in pixels of the images to imagine."""
    side = min(SIDE, int(base.vae_config.get("sample_size") or SIDE))
    return max(side // base.patch_size, 1) * base.patch_size


def prior_latents(base: Base, count: int, side: int, generator: Generator) -> Tensor:
    """Gaussian latent tokens (count, N, r) of unit variance with the spatial correlation of natural images."""
    height = 2 * side // base.patch_size
    # Twice as wide as needed and cut, because a spectrum's field repeats at its borders.
    frequency = torch.fft.fftfreq(2 * height)
    radius = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt()
    radius[0, 0] = 0.5 / height
    white = torch.randn(count, base.latent_width // 4, 2 * height, 2 * height, generator=generator)
    field = torch.fft.ifft2(torch.fft.fft2(white) * radius ** (-EXPONENT / 2)).real[..., :height, :height]
    return F.pixel_unshuffle(field / field.std(), 2).flatten(2).mT.contiguous()


def decode_pixels(base: Base, z: Tensor, height: int, width: int) -> Tensor:
    """Latent tokens (B, N, r) to pixel tokens (B, N, D) in the model's colours, differentiable inside the gamut."""
    rgb = base.decode(z, height, width).clamp(DARKEST, 1)
    return tokens.patchify(color.encode(rgb), base.patch_size)


@torch.no_grad()
def prior_pairs(
    base: Base, count: int, batch: int, generator: Generator, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of token pairs x (B, N, D), z (B, N, r) of ``count`` images that the VAE imagines."""
    side = prior_side(base)
    for first in range(0, count, batch):
        z = prior_latents(base, min(batch, count - first), side, generator).to(device)
        for _ in range(1 + ROUND_TRIPS):
            rgb = base.decode(z, side, side).clamp(0, 1)
            z = base.encode(rgb)
        yield tokens.patchify(color.encode(rgb), base.patch_size), z
