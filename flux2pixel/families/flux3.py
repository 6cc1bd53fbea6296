"""FLUX.3 klein: one in-projection for the image and one for references, no biases, FLUX.2's VAE.

Facts: diffusers' Flux3 modular pipeline. The transformer is given sigma in [0, 1] and predicts eps - x0; references sit
at time 0, told apart on the l axis. The step-distilled checkpoint is a flow map, whose output is not eps - x0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from flux2pixel.families.base import Conditioning, Encoder, Guidance, Projections, Reference, stack
from flux2pixel.families.configs import stock_config
from flux2pixel.families.flux2 import FluxVae
from flux2pixel.runtime.errors import UsageError

TEXT_STATES = (4, 8, 12, 16, 20, 24, 28, 32)  # hidden states, joined token by token
POSITION_SCALE = 0.5  # of the h and w position ids, as trained


class Flux3(FluxVae):
    """A FLUX.3 klein base checkpoint, read by Qwen3-VL, guided by two forwards.

    Raises UsageError on the step-distilled (flow map) checkpoint: it answers with a jump between two noise levels,
    from which no clean image can be recovered at one.
    """

    name = "flux3"
    projections = Projections(
        inputs=("x_embedders.image", "x_embedders.image_cond"), output="proj_out", modulation="norm_out.linear"
    )
    lora_targets = (
        r"(mode_blocks\.image(_cond)?|txt_mode_blocks|single_transformer_blocks)\.\d+\.ff\.linear_(in|out)",
        r"timestep_embedder\.linear_[12]",
    )

    def __init__(self, configs: Mapping[str, Mapping[str, Any]], where: str = ""):
        super().__init__(configs, where)
        if self["transformer"].get("flow_map"):
            raise UsageError(
                f"{self.where}/transformer: a flow map (step-distilled) cannot be converted; use flux3-klein, its base"
            )

    @staticmethod
    def network_class() -> Any:
        from diffusers import Flux3Transformer2DModel

        return Flux3Transformer2DModel

    @property
    def guidance(self) -> Guidance:
        return "cfg"

    def pixel_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return stock_config(config) | {"in_channels": self.token_width, "cond_in_channels": self.token_width}

    @property
    def encoders(self) -> dict[str, Encoder]:
        return {"text_encoder": Encoder("Qwen3VLModel", TEXT_STATES)}

    @property
    def tokenizers(self) -> dict[str, str]:
        return {"tokenizer": "AutoProcessor"}

    def embed(self, parts: Mapping[str, Any], prompts: list[str]) -> Conditioning:
        from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep

        stock = Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds
        # One prompt per call: the window is sized by the prompt, and the transformer attends to all of it.
        texts = [stock(parts["text_encoder"], parts["tokenizer"], prompt) for prompt in prompts]
        return stack(*({"text": text, "mask": torch.ones_like(text[..., 0], dtype=torch.bool)} for text in texts))

    @staticmethod
    def random_conditioning(config: dict[str, Any], count: int, generator: Generator) -> Conditioning:
        text = torch.randn(count, 5, config["joint_attention_dim"], generator=generator, dtype=torch.float64)
        lengths = torch.arange(count) % 2 + 4
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
        lengths = cond["mask"].sum(1)
        v = torch.empty_like(tokens)
        for length in lengths.unique().tolist():  # the network has no text mask, so each window length goes by itself
            rows = (lengths == length).nonzero().flatten().to(tokens.device)
            text = cond["text"][rows.to(cond["text"].device), :length].to(tokens)
            pictures = [(picture.to(tokens)[rows], shape) for picture, shape in references]
            v[rows] = _call(network, tokens[rows], time[rows], text, grid, pictures).to(v.dtype)
        return v


def _call(
    network: Any, tokens: Tensor, time: Tensor, text: Tensor, grid: tuple[int, int], references: Sequence[Reference]
) -> Tensor:
    conditions, condition_ids = None, None
    if references:
        conditions = torch.cat([picture for picture, _ in references], dim=1)
        ids = [position_ids(*shape, layer=-1 - i) for i, (_, shape) in enumerate(references)]
        condition_ids = torch.cat(ids).to(tokens.device)
    zero = torch.zeros(1)
    text_ids = torch.cartesian_prod(zero, zero, zero, torch.arange(float(text.shape[1])))
    v: Tensor = network(
        hidden_states=tokens,
        encoder_hidden_states=text,
        timestep=time,
        img_ids=position_ids(*grid, layer=0).to(tokens.device),
        txt_ids=text_ids.to(tokens.device),
        image_cond_hidden_states=conditions,
        image_cond_ids=condition_ids,
        return_dict=False,
    )[0]
    return v


def position_ids(height: int, width: int, *, layer: int) -> Tensor:
    """(t, h, w, l) ids of the tokens of a height x width grid, (N, 4)."""
    rows, columns = (POSITION_SCALE * torch.arange(float(side)) for side in (height, width))
    return torch.cartesian_prod(torch.zeros(1), rows, columns, torch.tensor([float(layer)]))
