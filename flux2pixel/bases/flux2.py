"""The FLUX.2 family: names, packing, latent normalisation, text and position ids.

    B  images    h, w  latent token grid (H / p, W / p)    N = h w    r  latent token width (4 x latent channels)

Time: the transformer is given sigma in [0, 1] and predicts eps - x0. Facts: diffusers' FLUX.2 klein pipeline.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flux2pixel.errors import UsageError
from flux2pixel.progress import hush

IN_PROJECTION = "x_embedder.weight"
OUT_PROJECTION = "proj_out.weight"
PIPELINES = ("Flux2KleinPipeline",)


class Flux2:
    """A FLUX.2 klein checkpoint in a diffusers folder, its parts loaded when first used, float32 and frozen.

    Raises UsageError if the folder is not of this family.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index = json.loads((folder / "model_index.json").read_text())
        if index.get("_class_name") not in PIPELINES:
            raise UsageError(
                f"{folder}/model_index.json: _class_name {index.get('_class_name')!r} is not a FLUX.2 klein pipeline"
            )

    def _load(self, part: str, loader: Any, **options: Any) -> Any:
        hush()
        try:
            return loader.from_pretrained(self.folder / part, **options)
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.folder}/{part}: cannot be loaded ({str(error).splitlines()[0]})") from error

    @cached_property
    def vae(self) -> Any:
        from diffusers import AutoencoderKLFlux2

        return self._load("vae", AutoencoderKLFlux2).float().eval().requires_grad_(False)

    @cached_property
    def transformer(self) -> Any:
        from diffusers import Flux2Transformer2DModel

        return self._load("transformer", Flux2Transformer2DModel).float().eval().requires_grad_(False)

    @cached_property
    def text(self) -> TextEncoder:
        return TextEncoder(self.folder)

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        return json.loads((self.folder / "vae" / "config.json").read_text())

    @property
    def latent_width(self) -> int:
        """r: numbers per latent token."""
        height, width = self.vae_config["patch_size"]
        return int(self.vae_config["latent_channels"]) * height * width

    @property
    def patch_size(self) -> int:
        """p: pixels along the side of the patch that one latent token stands for."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1) * int(self.vae_config["patch_size"][0])

    def _statistics(self) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        deviation = (norm.running_var + self.vae.config.batch_norm_eps).sqrt()
        return norm.running_mean.view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)

    @torch.no_grad()
    def encode(self, rgb: Tensor) -> Tensor:
        """sRGB in [0, 1], (B, 3, H, W) -> normalised, packed latent tokens (B, N, r)."""
        mean, deviation = self._statistics()
        z = F.pixel_unshuffle(self.vae.encode(rgb * 2 - 1).latent_dist.mode(), 2)
        return ((z - mean) / deviation).flatten(2).mT.contiguous()

    def decode(self, z: Tensor, height: int, width: int) -> Tensor:
        """Latent tokens (B, N, r) -> sRGB (B, 3, height, width), unclamped."""
        mean, deviation = self._statistics()
        p = self.patch_size
        packed = z.mT.reshape(z.shape[0], z.shape[2], height // p, width // p)
        return self.vae.decode(F.pixel_shuffle(packed * deviation + mean, 2)).sample / 2 + 0.5


class TextEncoder:
    """The klein text path: chat template, three hidden states side by side. Each distinct prompt is encoded once."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        hush()
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        model = AutoModelForCausalLM.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.model = model.eval().requires_grad_(False)
        # The miniature was trained with 12 text tokens; real bases take 512. Both say so in their tokenizer.
        self.length = min(512, int(self.tokenizer.model_max_length))

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """Embed prompts: (len(prompts), tokens, joint width) float32."""
        from diffusers import Flux2KleinPipeline

        distinct = list(dict.fromkeys(prompts))
        embedded = torch.cat(
            [
                Flux2KleinPipeline._get_qwen3_prompt_embeds(
                    text_encoder=self.model,
                    tokenizer=self.tokenizer,
                    prompt=distinct[start : start + 64],
                    max_sequence_length=self.length,
                ).float()
                for start in range(0, len(distinct), 64)
            ]
        )
        row = {prompt: index for index, prompt in enumerate(distinct)}
        return embedded[torch.tensor([row[p] for p in prompts])]


def position_ids(height: int, width: int, text: int) -> tuple[Tensor, Tensor]:
    """(t, h, w, l) ids of a height x width grid of image tokens, (N, 4), and of ``text`` text tokens, (text, 4)."""
    one = torch.arange(1)
    image = torch.cartesian_prod(one, torch.arange(height), torch.arange(width), one)
    return image.float(), torch.cartesian_prod(one, one, one, torch.arange(text)).float()


def call(transformer: Any, tokens: Tensor, time: Tensor, text: Tensor, grid: tuple[int, int]) -> Tensor:
    """One forward of a FLUX.2 transformer: tokens (B, N, C) at time (B,) with text (B, L, J) on an (h, w) grid."""
    image_ids, text_ids = position_ids(*grid, text.shape[1])
    return transformer(
        hidden_states=tokens,
        encoder_hidden_states=text.to(tokens.dtype),
        timestep=time,
        img_ids=image_ids.to(tokens.device),
        txt_ids=text_ids.to(tokens.device),
        return_dict=False,
    )[0]
