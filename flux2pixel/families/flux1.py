"""FLUX.1 dev and schnell: Linear in and out with biases, T5 tokens and a pooled CLIP vector.

Facts: diffusers' FluxPipeline. The transformer is given sigma in [0, 1] and predicts eps - x0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from flux2pixel.families.base import (
    Conditioning,
    Encoder,
    Guidance,
    Projections,
    Reference,
    device_of,
    refuse_references,
)
from flux2pixel.families.configs import stock_config
from flux2pixel.families.kl import KLFamily

DEFAULT_GUIDANCE = 3.5  # FLUX.1 dev's own, for calls that name none


class Flux1(KLFamily):
    """A FLUX.1 checkpoint; dev takes its guidance as a number, schnell takes none."""

    name = "flux1"
    projections = Projections(inputs=("x_embedder",), output="proj_out", modulation="norm_out.linear")
    lora_targets = (
        r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",
        r"single_transformer_blocks\.\d+\.proj_out",
        r"time_text_embed\.timestep_embedder\.linear_[12]",
    )

    @staticmethod
    def network_class() -> Any:
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel

    @property
    def distilled(self) -> bool:
        """Schnell is the distilled one, and the one without a guidance embedding."""
        return not self["transformer"].get("guidance_embeds", False)

    @property
    def guidance(self) -> Guidance:
        return "none" if self.distilled else "embedded"

    def pixel_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return stock_config(config) | {"in_channels": self.token_width, "out_channels": self.token_width}

    @property
    def encoders(self) -> dict[str, Encoder]:
        return {"text_encoder": Encoder("CLIPTextModel"), "text_encoder_2": Encoder("T5EncoderModel")}

    @property
    def tokenizers(self) -> dict[str, str]:
        return {"tokenizer": "AutoTokenizer", "tokenizer_2": "AutoTokenizer"}

    def text_length(self, parts: Mapping[str, Any]) -> int:
        return 256 if self.distilled else 512

    def embed(self, parts: Mapping[str, Any], prompts: list[str]) -> Conditioning:
        from diffusers import FluxPipeline

        pipeline = FluxPipeline(scheduler=None, vae=None, transformer=None, **parts)
        text, pooled, _ = pipeline.encode_prompt(
            prompts,
            prompt_2=None,
            device=device_of(parts["text_encoder_2"]),
            max_sequence_length=self.text_length(parts),
        )
        return {"text": text, "pooled": pooled}

    @staticmethod
    def random_conditioning(config: dict[str, Any], count: int, generator: Generator) -> Conditioning:
        shapes = {"text": (count, 4, config["joint_attention_dim"]), "pooled": (count, config["pooled_projection_dim"])}
        return {k: torch.randn(shape, generator=generator, dtype=torch.float64) for k, shape in shapes.items()}

    @staticmethod
    def call(
        network: Any,
        tokens: Tensor,
        time: Tensor,
        cond: Conditioning,
        grid: tuple[int, int],
        references: Sequence[Reference] = (),
    ) -> Tensor:
        refuse_references("FLUX.1", references)
        text = cond["text"].to(tokens)
        guidance = None
        if network.config.guidance_embeds:
            guidance = cond.get("guidance", torch.full_like(time, DEFAULT_GUIDANCE)).to(time)
        v: Tensor = network(
            hidden_states=tokens,
            encoder_hidden_states=text,
            pooled_projections=cond["pooled"].to(tokens),
            timestep=time,
            img_ids=position_ids(*grid).to(tokens.device),
            txt_ids=torch.zeros(text.shape[1], 3).to(tokens.device),
            guidance=guidance,
            return_dict=False,
        )[0]
        return v


def position_ids(height: int, width: int) -> Tensor:
    """(0, h, w) ids of the tokens of a height x width grid, (N, 3)."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
