"""Every family's stock diffusers classes, tiny and random, written to disk as a base: what the proofs run on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LATENT = 4  # channels of the tiny VAEs; their tokens have 16 numbers
ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 16}
TEXT = {"joint_attention_dim": 24, "num_layers": 1}


@dataclass(frozen=True)
class Tiny:
    """A family's tiny transformer and VAE: class names and constructor arguments, and the pixels of a patch's side."""

    transformer: str
    config: dict[str, Any]
    vae: str
    vae_config: dict[str, Any]
    patch: int = 4


_KL = {
    "latent_channels": LATENT,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "sample_size": 32,
}
_KL_NORM = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
_ROPE3 = {"axes_dims_rope": [4, 6, 6]}
_FLUX = TEXT | ATTENTION | {"in_channels": 16, "num_single_layers": 1}
_FLUX1 = _FLUX | _ROPE3 | {"pooled_projection_dim": 12}
_FLUX2 = _FLUX | {"timestep_guidance_channels": 16, "axes_dims_rope": [4, 4, 4, 4]}
_FLUX2_VAE = _KL | {"patch_size": [2, 2]}
_QWEN_VAE = {
    "base_dim": 8,
    "z_dim": LATENT,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False],
    "latents_mean": [-0.7, 0.1, 0.4, -0.2],
    "latents_std": [2.8, 1.4, 0.7, 1.9],
}
_SD3 = (
    TEXT
    | ATTENTION
    | {
        "sample_size": 16,
        "in_channels": LATENT,
        "out_channels": LATENT,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 12,
        "pos_embed_max_size": 12,
        "qk_norm": "rms_norm",
    }
)
_Z = {
    "in_channels": LATENT,
    "dim": 32,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 24,
    "axes_dims": [4, 6, 6],
    "axes_lens": [128, 32, 32],
}
_FLUX3 = TEXT | ATTENTION | {"in_channels": 16, "cond_in_channels": 16, "num_single_layers": 1, "timestep_channels": 16}

TINY = {
    "flux2-klein": Tiny(
        "Flux2Transformer2DModel", _FLUX2 | {"guidance_embeds": False}, "AutoencoderKLFlux2", _FLUX2_VAE
    ),
    "flux2-dev": Tiny("Flux2Transformer2DModel", _FLUX2 | {"guidance_embeds": True}, "AutoencoderKLFlux2", _FLUX2_VAE),
    "flux1-dev": Tiny("FluxTransformer2DModel", _FLUX1 | {"guidance_embeds": True}, "AutoencoderKL", _KL | _KL_NORM),
    "flux1-schnell": Tiny("FluxTransformer2DModel", _FLUX1, "AutoencoderKL", _KL | _KL_NORM),
    "sd3.5-large": Tiny("SD3Transformer2DModel", _SD3, "AutoencoderKL", _KL | _KL_NORM),
    "sd3.5-medium": Tiny(
        "SD3Transformer2DModel", _SD3 | {"dual_attention_layers": [0]}, "AutoencoderKL", _KL | _KL_NORM
    ),
    "qwen-image": Tiny(
        "QwenImageTransformer2DModel",
        TEXT | ATTENTION | _ROPE3 | {"in_channels": 16, "out_channels": LATENT},
        "AutoencoderKLQwenImage",
        _QWEN_VAE,
    ),
    "z-image": Tiny("ZImageTransformer2DModel", _Z, "AutoencoderKL", _KL | _KL_NORM),
    "flux3": Tiny(
        "Flux3Transformer2DModel", _FLUX3 | {"axes_dims_rope": [4, 4, 4, 4]}, "AutoencoderKLFlux2", _FLUX2_VAE
    ),
}


def write_base(folder: Path, name: str, **changes: Any) -> Path:
    """Write the tiny base called ``name`` as a diffusers folder, every parameter random, biases and norms included.

    ``changes`` go to the transformer's configuration.
    """
    import diffusers

    tiny = TINY[name]
    torch.manual_seed(sum(map(ord, name)))
    for part, class_name, config in (
        ("transformer", tiny.transformer, tiny.config | changes),
        ("vae", tiny.vae, tiny.vae_config),
    ):
        model = getattr(diffusers, class_name)(**config)
        for key, parameter in model.named_parameters():
            if part == "transformer":
                torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
            elif key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        if hasattr(model, "bn"):
            model.bn.running_mean.normal_()
            model.bn.running_var.uniform_(0.5, 2)
        model.save_pretrained(folder / part)
    index = "modular_model_index.json" if name == "flux3" else "model_index.json"
    (folder / index).write_text(json.dumps({"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}))
    diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0).save_pretrained(folder / "scheduler")
    return folder
