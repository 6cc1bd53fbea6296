"""The published bases: Hub id, licence, size, and the transformer configuration each was published with.

The configurations are facts read from public copies of each repository's ``transformer/config.json``, checked against
published file sizes; a test builds each one without storage and compares every count here. They let a plan be made,
and a recipe be checked, before anything is downloaded. A folder's own files always win over this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Known:
    """One published base.

    ``rank`` r and ``patch`` p give the pixel token's width D = 3 p p; ``parameters`` are the transformer's;
    ``undistilled`` names the alias to prefer over a distilled checkpoint; ``refused`` says why one cannot be converted.
    """

    hub: str
    licence: str
    parameters: int
    rank: int
    transformer_class: str
    transformer: dict[str, Any]
    gated: bool = False
    undistilled: str = ""
    refused: str = ""
    patch: int = 16


_FLUX2 = {
    "patch_size": 1,
    "in_channels": 128,
    "attention_head_dim": 128,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
    "eps": 1e-6,
}
_KLEIN = {"guidance_embeds": False, "joint_attention_dim": 7680, "num_attention_heads": 24}
_KLEIN_4B = _FLUX2 | _KLEIN | {"num_layers": 5, "num_single_layers": 20}
_KLEIN_9B = (
    _FLUX2
    | _KLEIN
    | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
)
_FLUX2_DEV = _FLUX2 | {
    "num_layers": 8,
    "num_single_layers": 48,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "guidance_embeds": True,
}
_FLUX1 = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
}
_SD35 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
_SD35_MEDIUM = _SD35 | {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
}
_SD35_LARGE = _SD35 | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}
_QWEN_IMAGE = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}
_Z_IMAGE = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
# The Hub's own config.json was not seen; these are the class defaults, 1 % short of the advertised 5.6B.
_FLUX3 = {
    "in_channels": 128,
    "cond_in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 28,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 20480,
    "timestep_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "rope_theta": 10000,
    "eps": 1e-6,
}

_APACHE, _BFL, _STABILITY = "Apache-2.0", "FLUX Non-Commercial", "Stability Community"
_KOMMUNITY, _FLOW_MAP = "FLUX Kommunity", "a flow map; its output is no velocity at one noise level"
_F2, _F1, _S3 = "Flux2Transformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel"
_QI, _ZI, _F3 = "QwenImageTransformer2DModel", "ZImageTransformer2DModel", "Flux3Transformer2DModel"

COLOUR = "oklab"  # of every pixel model, normalised

KNOWN: dict[str, Known] = {
    "flux2-klein-4b": Known("black-forest-labs/FLUX.2-klein-base-4B", _APACHE, 3_875_544_576, 128, _F2, _KLEIN_4B),
    "flux2-klein-4b-distilled": Known(
        "black-forest-labs/FLUX.2-klein-4B", _APACHE, 3_875_544_576, 128, _F2, _KLEIN_4B, undistilled="flux2-klein-4b"
    ),
    "flux2-klein-9b": Known(
        "black-forest-labs/FLUX.2-klein-base-9B", _BFL, 9_078_581_248, 128, _F2, _KLEIN_9B, gated=True
    ),
    "flux2-klein-9b-distilled": Known(
        "black-forest-labs/FLUX.2-klein-9B",
        _BFL,
        9_078_581_248,
        128,
        _F2,
        _KLEIN_9B,
        gated=True,
        undistilled="flux2-klein-9b",
    ),
    "flux2-dev": Known("black-forest-labs/FLUX.2-dev", _BFL, 32_223_281_152, 128, _F2, _FLUX2_DEV, gated=True),
    "flux1-dev": Known(
        "black-forest-labs/FLUX.1-dev", _BFL, 11_901_408_320, 64, _F1, _FLUX1 | {"guidance_embeds": True}, gated=True
    ),
    "flux1-schnell": Known(
        "black-forest-labs/FLUX.1-schnell",
        _APACHE,
        11_891_178_560,
        64,
        _F1,
        _FLUX1 | {"guidance_embeds": False},
        gated=True,
        undistilled="flux1-dev",
    ),
    "sd3.5-medium": Known(
        "stabilityai/stable-diffusion-3.5-medium", _STABILITY, 2_243_171_520, 64, _S3, _SD35_MEDIUM, gated=True
    ),
    "sd3.5-large": Known(
        "stabilityai/stable-diffusion-3.5-large", _STABILITY, 8_056_627_520, 64, _S3, _SD35_LARGE, gated=True
    ),
    "qwen-image": Known("Qwen/Qwen-Image", _APACHE, 20_430_401_088, 64, _QI, _QWEN_IMAGE),
    "qwen-image-2512": Known("Qwen/Qwen-Image-2512", _APACHE, 20_430_401_088, 64, _QI, _QWEN_IMAGE),
    "z-image": Known("Tongyi-MAI/Z-Image", _APACHE, 6_154_908_736, 64, _ZI, _Z_IMAGE),
    "z-image-turbo": Known(
        "Tongyi-MAI/Z-Image-Turbo", _APACHE, 6_154_908_736, 64, _ZI, _Z_IMAGE, undistilled="z-image"
    ),
    "flux3-klein": Known(
        "black-forest-labs/flux-3-image-klein-base", _KOMMUNITY, 5_538_458_368, 128, _F3, _FLUX3, gated=True
    ),
    "flux3-klein-distilled": Known(
        "black-forest-labs/flux-3-image-klein",
        _KOMMUNITY,
        5_548_681_984,
        128,
        _F3,
        _FLUX3 | {"flow_map": True},
        gated=True,
        undistilled="flux3-klein",
        refused=_FLOW_MAP,
    ),
}


def table() -> str:
    """Every base by alias, one a line: what ``flux2pixel bases`` prints."""
    heads = ("alias", "Hub id", "gated", "licence", "parameters", "r", "D", "patch", "colour", "status")
    rows = [heads, ("klein-tiny", "(in the package)", "no", _APACHE, "4.5M", "16", "192", "8", COLOUR, "ready")]
    for alias, known in KNOWN.items():
        status = "ready"
        if known.refused:
            status = f"refused: {known.refused}"
        elif known.undistilled:
            status = f"ready, but distilled: prefer {known.undistilled}"
        rows.append(
            (
                alias,
                known.hub,
                "yes" if known.gated else "no",
                known.licence,
                f"{known.parameters / 1e9:.2f}B",
                str(known.rank),
                str(3 * known.patch**2),
                str(known.patch),
                COLOUR,
                status,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
