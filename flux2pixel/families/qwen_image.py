"""Qwen-Image: Linear in and out with biases, a video VAE used on single frames, guidance rescaled token by token.

Facts: diffusers' QwenImagePipeline. The transformer is given sigma in [0, 1] and predicts eps - x0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from flux2pixel.asymflow.denoiser import plain
from flux2pixel.families.base import (
    TEXT_LENGTH,
    Conditioning,
    Encoder,
    Family,
    Guidance,
    Projections,
    Reference,
    device_of,
    refuse_references,
)
from flux2pixel.families.configs import stock_config

PACK = 2  # latents along the side of a token


class QwenImage(Family):
    """A Qwen-Image text-to-image checkpoint, read by Qwen2.5-VL, guided by two forwards."""

    name = "qwen-image"
    projections = Projections(inputs=("img_in",), output="proj_out", modulation="norm_out.linear")
    lora_targets = (
        r"transformer_blocks\.\d+\.(img|txt)_mlp\.net\.(0\.proj|2)",
        r"time_text_embed\.timestep_embedder\.linear_[12]",
    )

    @staticmethod
    def network_class() -> Any:
        from diffusers import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel

    @staticmethod
    def vae_class() -> Any:
        from diffusers import AutoencoderKLQwenImage

        return AutoencoderKLQwenImage

    @property
    def latent_width(self) -> int:
        return int(self.vae_config["z_dim"]) * PACK**2

    @property
    def patch_size(self) -> int:
        return int(2 ** len(self.vae_config["temperal_downsample"]) * PACK)

    @property
    def guidance(self) -> Guidance:
        return "none" if self.distilled else "cfg"

    def pixel_config(self, config: dict[str, Any]) -> dict[str, Any]:
        changed = {"in_channels": self.token_width, "out_channels": 3, "patch_size": self.patch_size}
        return stock_config(config) | changed

    @staticmethod
    def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Guidance rescaled, token by token, to the conditional v's length.

        The length is that of v, before any recovery; lengths of x0_hat would not agree.
        """
        guided = plain(conditional, unconditional, scale)
        length = guided.norm(dim=-1, keepdim=True)
        return guided * (conditional.norm(dim=-1, keepdim=True) / length.clamp(min=torch.finfo(guided.dtype).tiny))

    @staticmethod
    def to_latent(vae: Any, image: Tensor) -> Tensor:
        mean, deviation = _statistics(vae)
        z = vae.encode(image.unsqueeze(2)).latent_dist.mode().squeeze(2)
        return F.pixel_unshuffle((z - mean) / deviation, PACK).flatten(2).mT.contiguous()

    @staticmethod
    def from_latent(vae: Any, z: Tensor, grid: tuple[int, int]) -> Tensor:
        mean, deviation = _statistics(vae)
        packed = F.pixel_shuffle(z.mT.unflatten(2, grid), PACK)
        image: Tensor = vae.decode((packed * deviation + mean).unsqueeze(2)).sample
        return image.squeeze(2)

    @property
    def encoders(self) -> dict[str, Encoder]:
        return {"text_encoder": Encoder("Qwen2_5_VLModel", (-1,))}

    @property
    def tokenizers(self) -> dict[str, str]:
        return {"tokenizer": "AutoTokenizer"}

    def embed(self, parts: Mapping[str, Any], prompts: list[str]) -> Conditioning:
        from diffusers import QwenImagePipeline

        pipeline = QwenImagePipeline(scheduler=None, vae=None, transformer=None, **parts)
        text, mask = pipeline.encode_prompt(
            prompts, device=device_of(parts["text_encoder"]), max_sequence_length=TEXT_LENGTH
        )
        if mask is None:
            mask = torch.ones(text.shape[:2], device=text.device)
        return {"text": text, "mask": mask.bool()}

    @staticmethod
    def random_conditioning(config: dict[str, Any], count: int, generator: Generator) -> Conditioning:
        text = torch.randn(count, 5, config["joint_attention_dim"], generator=generator, dtype=torch.float64)
        lengths = torch.arange(count) % 3 + 3
        return {"text": text, "mask": torch.arange(5) < lengths.view(-1, 1)}

    @staticmethod
    def call(
        network: Any,
        tokens: Tensor,
        time: Tensor,
        cond: Conditioning,
        grid: tuple[int, int],
        references: Sequence[Reference] = (),
    ) -> Tensor:
        refuse_references("Qwen-Image", references)
        mask = cond["mask"].to(tokens.device)
        v: Tensor = network(
            hidden_states=tokens,
            encoder_hidden_states=cond["text"].to(tokens),
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            timestep=time,
            img_shapes=[[(1, *grid)]] * len(tokens),
            return_dict=False,
        )[0]
        return v


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    config, like = vae.config, next(vae.parameters())
    mean, deviation = (torch.tensor(v).to(like) for v in (config.latents_mean, config.latents_std))
    return mean.view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)
