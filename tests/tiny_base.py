"""A FLUX.2 base of a few thousand parameters in the layout of a real one: shards with an index, companions, bf16."""

import json
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import save_file

CONFIG = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}
VAE = {"latent_channels": 4, "patch_size": [2, 2], "block_out_channels": [16, 32, 64]}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0, "use_dynamic_shifting": False}
INDEX = {
    "_class_name": "Flux2KleinPipeline",
    "is_distilled": False,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}


def tiny_transformer(seed: int = 1, **changes: object) -> Flux2Transformer2DModel:
    """The transformer, with every weight random: several are zero at birth, which would hide mistakes."""
    torch.manual_seed(seed)
    model = Flux2Transformer2DModel(**CONFIG | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / max(parameter.shape[-1], 1) ** 0.5)
    return model.to(torch.bfloat16).eval()


def write_tiny_base(folder: Path, *, max_shard_size: str = "20KB") -> Path:
    """Write the base; at the default shard size the transformer has several shards, most of which do not change."""
    tiny_transformer().save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / part).mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(VAE))
    (folder / "text_encoder" / "config.json").write_text("{}")
    save_file({"embed": torch.randn(64, 8)}, folder / "text_encoder" / "model.safetensors")
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder
