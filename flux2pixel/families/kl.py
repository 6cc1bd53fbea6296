"""What FLUX.1, SD3.5 and Z-Image share: AutoencoderKL, packed 2 x 2, normalised as (z - shift) scale."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from flux2pixel.families.base import Family

PACK = 2  # latents along the side of a token


class KLFamily(Family):
    """A family on diffusers' AutoencoderKL with one scale and one shift for all channels."""

    @staticmethod
    def vae_class() -> Any:
        from diffusers import AutoencoderKL

        return AutoencoderKL

    @property
    def latent_width(self) -> int:
        return int(self.vae_config["latent_channels"]) * PACK**2

    @property
    def patch_size(self) -> int:
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1) * PACK)

    @staticmethod
    def to_latent(vae: Any, image: Tensor) -> Tensor:
        config = vae.config
        z = (vae.encode(image).latent_dist.mode() - config.shift_factor) * config.scaling_factor
        return F.pixel_unshuffle(z, PACK).flatten(2).mT.contiguous()

    @staticmethod
    def from_latent(vae: Any, z: Tensor, grid: tuple[int, int]) -> Tensor:
        config = vae.config
        packed = F.pixel_shuffle(z.mT.unflatten(2, grid), PACK)
        image: Tensor = vae.decode(packed / config.scaling_factor + config.shift_factor).sample
        return image
