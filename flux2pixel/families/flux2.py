"""FLUX.2 klein and dev: one Linear in, one out, no biases; references are appended tokens.

Facts: diffusers' FLUX.2 pipelines. The transformer is given sigma in [0, 1] and predicts eps - x0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from flux2pixel.families.base import TEXT_LENGTH, Conditioning, Encoder, Family, Guidance, Projections, Reference
from flux2pixel.families.configs import stock_config

DEFAULT_GUIDANCE = 4.0  # FLUX.2 dev's own, for calls that name none
QWEN_STATES, MISTRAL_STATES = (9, 18, 27), (10, 20, 30)  # hidden states, joined token by token
REFERENCE_SPACING = 10  # of the pictures to edit, along the time axis of the position ids


class FluxVae(Family):
    """A family on AutoencoderKLFlux2: packed 2 x 2, each of the packed numbers normalised by its own statistics."""

    @staticmethod
    def vae_class() -> Any:
        from diffusers import AutoencoderKLFlux2

        return AutoencoderKLFlux2

    @property
    def latent_width(self) -> int:
        height, width = self.vae_config["patch_size"]
        return int(self.vae_config["latent_channels"]) * height * width

    @property
    def patch_size(self) -> int:
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1) * int(self.vae_config["patch_size"][0])

    @staticmethod
    def to_latent(vae: Any, image: Tensor) -> Tensor:
        mean, deviation = _statistics(vae)
        z = F.pixel_unshuffle(vae.encode(image).latent_dist.mode(), 2)
        return ((z - mean) / deviation).flatten(2).mT.contiguous()

    @staticmethod
    def from_latent(vae: Any, z: Tensor, grid: tuple[int, int]) -> Tensor:
        mean, deviation = _statistics(vae)
        packed = z.mT.unflatten(2, grid)
        image: Tensor = vae.decode(F.pixel_shuffle(packed * deviation + mean, 2)).sample
        return image


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return vae.bn.running_mean.view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)


class Flux2(FluxVae):
    """A FLUX.2 checkpoint; klein reads prompts with Qwen3, dev with Mistral 3."""

    name = "flux2"
    projections = Projections(inputs=("x_embedder",), output="proj_out", modulation="norm_out.linear")
    lora_targets = (
        r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)",
        r"single_transformer_blocks\.\d+\.attn\.to_out",
        r"time_guidance_embed\.timestep_embedder\.linear_[12]",
    )

    @staticmethod
    def network_class() -> Any:
        from diffusers import Flux2Transformer2DModel

        return Flux2Transformer2DModel

    @property
    def guidance(self) -> Guidance:
        if self["transformer"].get("guidance_embeds", True):
            return "embedded"
        return "none" if self.distilled else "cfg"

    def cautions(self) -> list[str]:
        lines = super().cautions()
        if self.guidance == "cfg" and "model_index" not in self.configs:
            lines.append(f"{self.where} has no model_index.json, which alone says if it is distilled: taken as not")
        return lines

    def pixel_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return stock_config(config) | {"in_channels": self.token_width, "out_channels": self.token_width}

    @property
    def encoders(self) -> dict[str, Encoder]:
        if self._reads_mistral:
            return {"text_encoder": Encoder("Mistral3Model", MISTRAL_STATES)}
        return {"text_encoder": Encoder("Qwen3Model", QWEN_STATES)}

    @property
    def tokenizers(self) -> dict[str, str]:
        return {"tokenizer": "AutoProcessor" if self._reads_mistral else "AutoTokenizer"}

    @property
    def _reads_mistral(self) -> bool:
        return self["text_encoder"].get("model_type") == "mistral3"

    def text_length(self, parts: Mapping[str, Any]) -> int:
        """The miniature was trained with 12 text tokens; real bases take 512. Both say so in their tokenizer."""
        return TEXT_LENGTH if self._reads_mistral else min(TEXT_LENGTH, int(parts["tokenizer"].model_max_length))

    def embed(self, parts: Mapping[str, Any], prompts: list[str]) -> Conditioning:
        from diffusers import Flux2KleinPipeline, Flux2Pipeline

        stock = Flux2Pipeline._get_mistral_3_small_prompt_embeds
        if not self._reads_mistral:
            stock = Flux2KleinPipeline._get_qwen3_prompt_embeds
        length, encoder = self.text_length(parts), parts["text_encoder"]
        return {"text": stock(encoder, parts["tokenizer"], prompt=prompts, max_sequence_length=length)}

    @staticmethod
    def mu(scheduler: Any, steps: int, tokens: int) -> float | None:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return float(compute_empirical_mu(image_seq_len=tokens, num_steps=steps))

    @staticmethod
    def random_conditioning(config: dict[str, Any], count: int, generator: Generator) -> Conditioning:
        width = config["joint_attention_dim"]
        return {"text": torch.randn(count, 4, width, generator=generator, dtype=torch.float64)}

    @staticmethod
    def call(
        network: Any,
        tokens: Tensor,
        time: Tensor,
        cond: Conditioning,
        grid: tuple[int, int],
        references: Sequence[Reference] = (),
    ) -> Tensor:
        text = cond["text"].to(tokens)
        image_ids = [position_ids(0, *grid)]
        image_ids += [position_ids(REFERENCE_SPACING * (i + 1), *shape) for i, (_, shape) in enumerate(references)]
        zero = torch.zeros(1)
        text_ids = torch.cartesian_prod(zero, zero, zero, torch.arange(float(text.shape[1])))
        guidance = None
        if network.config.guidance_embeds:
            guidance = cond.get("guidance", torch.full_like(time, DEFAULT_GUIDANCE)).to(time)
        v: Tensor = network(
            hidden_states=torch.cat([tokens, *(picture.to(tokens) for picture, _ in references)], dim=1),
            encoder_hidden_states=text,
            timestep=time,
            img_ids=torch.cat(image_ids).to(tokens.device),
            txt_ids=text_ids.to(tokens.device),
            guidance=guidance,
            return_dict=False,
        )[0]
        return v[:, : tokens.shape[1]]


def position_ids(t: int, height: int, width: int) -> Tensor:
    """(t, h, w, l) ids of the tokens of a height x width grid, (N, 4)."""
    one = torch.zeros(1)
    return torch.cartesian_prod(one + t, torch.arange(float(height)), torch.arange(float(width)), one)
