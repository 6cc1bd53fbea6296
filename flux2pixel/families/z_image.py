"""Z-Image: Linear in and out with biases, both flattening a token as ph,pw,c; time and sign run backwards.

Facts: diffusers' ZImagePipeline. The transformer takes lists of images and captions of any length, is given 1 - sigma
and predicts x0 - eps. Its projections are named after the patch size, so their names change with a conversion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from flux2pixel.asymflow.denoiser import plain
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

_PATCHED = re.compile(r"^(all_x_embedder|all_final_layer)\.2-1(?=\.|$)")
BASE_SHIFT = 6.0  # of the undistilled model's scheduler; Turbo's is 3


class ZImage(KLFamily):
    """A Z-Image checkpoint, read by Qwen3; the undistilled one is guided by two forwards."""

    name = "z-image"
    projections = Projections(
        inputs=("all_x_embedder.2-1",),
        output="all_final_layer.2-1.linear",
        modulation="all_final_layer.2-1.adaLN_modulation.1",
        input_order="ph,pw,c",
        output_order="ph,pw,c",
    )
    lora_targets = (
        r"(layers|noise_refiner|context_refiner)\.\d+\.feed_forward\.w[123]",
        r"t_embedder\.mlp\.[02]",
    )

    @staticmethod
    def network_class() -> Any:
        from diffusers import ZImageTransformer2DModel

        return ZImageTransformer2DModel

    @property
    def distilled(self) -> bool:
        """Turbo: the scheduler's shift is the only published difference between its configuration and the base's."""
        return bool(self.configs.get("scheduler", {}).get("shift", BASE_SHIFT) < BASE_SHIFT)

    @property
    def guidance(self) -> Guidance:
        return "none" if self.distilled else "cfg"

    def pixel_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return stock_config(config) | {"in_channels": 3, "all_patch_size": [self.patch_size]}

    def pixel_name(self, name: str) -> str:
        return _PATCHED.sub(rf"\g<1>.{self.patch_size}-1", name)

    @staticmethod
    def guide(conditional: Tensor, unconditional: Tensor, scale: float, *, normalization: float = 0.0) -> Tensor:
        """Guidance with the usual meaning of ``scale`` (the pipeline's guidance_scale plus one).

        With ``normalization`` c > 0 (the pipeline's cfg_normalization) an image's guided v is never longer than c
        times its conditional v. Lengths of v are the same in pixels and latents, since the basis is orthonormal.
        """
        guided = plain(conditional, unconditional, scale)
        if normalization > 0:
            length, limit = (x.flatten(1).norm(dim=1).view(-1, 1, 1) for x in (guided, normalization * conditional))
            guided = guided * (limit / length.clamp(min=torch.finfo(guided.dtype).tiny)).clamp(max=1)
        return guided

    @property
    def encoders(self) -> dict[str, Encoder]:
        return {"text_encoder": Encoder("Qwen3Model", (-2,))}

    @property
    def tokenizers(self) -> dict[str, str]:
        return {"tokenizer": "AutoTokenizer"}

    def embed(self, parts: Mapping[str, Any], prompts: list[str]) -> Conditioning:
        from diffusers import ZImagePipeline

        # The stock method asks its pipeline for these two alone; it writes the chat template into the list it is given.
        embedded = ZImagePipeline._encode_prompt(
            SimpleNamespace(**parts), list(prompts), device=device_of(parts["text_encoder"])
        )
        text = pad_sequence(embedded, batch_first=True)
        lengths = torch.tensor([len(one) for one in embedded], device=text.device)
        return {"text": text, "mask": torch.arange(text.shape[1], device=text.device) < lengths.view(-1, 1)}

    @staticmethod
    def start_levels(steps: int) -> list[float] | None:
        return torch.linspace(1.0, 1 / steps, steps).tolist()

    @staticmethod
    def random_conditioning(config: dict[str, Any], count: int, generator: Generator) -> Conditioning:
        text = torch.randn(count, 5, config["cap_feat_dim"], generator=generator, dtype=torch.float64)
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
        refuse_references("Z-Image", references)
        (patch,) = network.config.all_patch_size
        images = F.pixel_shuffle(tokens.mT.unflatten(2, grid), patch).unsqueeze(2)
        captions = [text[real].to(tokens) for text, real in zip(cond["text"], cond["mask"].bool(), strict=True)]
        outputs = network(list(images), 1 - time, captions, patch_size=patch, return_dict=False)[0]
        return -F.pixel_unshuffle(torch.stack(outputs).squeeze(2), patch).flatten(2).mT
