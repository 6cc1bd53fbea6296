"""SD3.5 medium and large: a convolution in, a Linear out whose rows run ph,pw,c, both with biases.

Facts: diffusers' StableDiffusion3Pipeline. The transformer takes images, is given 1000 sigma and predicts eps - x0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
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


class SD3(KLFamily):
    """An SD3.5 checkpoint: two CLIPs and T5 in, guided by two forwards."""

    name = "sd3"
    projections = Projections(
        inputs=("pos_embed.proj",), output="proj_out", modulation="norm_out.linear", output_order="ph,pw,c"
    )
    lora_targets = (
        r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",
        r"time_text_embed\.timestep_embedder\.linear_[12]",
    )

    @staticmethod
    def network_class() -> Any:
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel

    @property
    def guidance(self) -> Guidance:
        return "none" if self.distilled else "cfg"

    def pixel_config(self, config: dict[str, Any]) -> dict[str, Any]:
        # The positional table depends on sample_size / patch_size alone; keeping that ratio keeps the table.
        side = config["sample_size"] // config["patch_size"] * self.patch_size
        changed = {"sample_size": side, "patch_size": self.patch_size, "in_channels": 3, "out_channels": 3}
        return stock_config(config) | changed

    @staticmethod
    def shallow(config: dict[str, Any]) -> dict[str, Any]:
        """The first block and the last, which is of a kind of its own: it does not write to the text."""
        ends = sorted({0, config["num_layers"] - 1})
        dual = [place for place, block in enumerate(ends) if block in config["dual_attention_layers"]]
        return config | {"num_layers": len(ends), "dual_attention_layers": dual}

    @staticmethod
    def deep_name(name: str, config: dict[str, Any]) -> str:
        return name.replace("transformer_blocks.1.", f"transformer_blocks.{config['num_layers'] - 1}.", 1)

    @property
    def encoders(self) -> dict[str, Encoder]:
        clip = Encoder("CLIPTextModelWithProjection")
        return {"text_encoder": clip, "text_encoder_2": clip, "text_encoder_3": Encoder("T5EncoderModel")}

    @property
    def tokenizers(self) -> dict[str, str]:
        return dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"), "AutoTokenizer")

    def embed(self, parts: Mapping[str, Any], prompts: list[str]) -> Conditioning:
        from diffusers import StableDiffusion3Pipeline

        pipeline = StableDiffusion3Pipeline(transformer=None, scheduler=None, vae=None, **parts)
        text, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device=device_of(parts["text_encoder_3"]), do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    @staticmethod
    def start_levels(steps: int) -> list[float] | None:
        return None

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
        refuse_references("SD3.5", references)
        patch = network.config.patch_size
        v: Tensor = network(
            hidden_states=F.pixel_shuffle(tokens.mT.unflatten(2, grid), patch),
            encoder_hidden_states=cond["text"].to(tokens),
            pooled_projections=cond["pooled"].to(tokens),
            timestep=1000 * time,
            return_dict=False,
        )[0]
        return F.pixel_unshuffle(v, patch).flatten(2).mT
