"""OpenMMLab's Mask2Former checkpoint in the names of transformers' class.

Source names are mmdet 2.x's; targets are the names of the Hub's Mask2Former checkpoints, which ``from_pretrained``
renames itself where a transformers version needs it. Loading them with ``load_state_dict(strict=False)`` would leave
the backbone untouched in silence, hence a folder, and a strict account of what was missing or unexpected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError, UsageError

# Recomputed by the class, or of the loss alone: nothing that the outputs depend on.
NOT_IN_CHECKPOINT = ("criterion.empty_weight", "encoder.swin.layernorm.weight", "encoder.swin.layernorm.bias")

_ENCODER, _DECODER = "model.pixel_level_module.encoder.", "model.pixel_level_module.decoder."
_TRANSFORMER = "model.transformer_module."
_SWIN = r"backbone\.stages\.(\d+)\.blocks\.(\d+)\."
_MSDA = r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\."
_BLOCK = r"panoptic_head\.transformer_decoder\.layers\.(\d+)\."
_TO_SWIN = _ENCODER + r"encoder.layers.\1.blocks.\2."
_TO_MSDA, _TO_BLOCK = _DECODER + r"encoder.layers.\1.", _TRANSFORMER + r"decoder.layers.\1."

# One rule a module: pattern of the source name up to the parameter, target name.
_RULES = [
    (r"backbone\.patch_embed\.projection", _ENCODER + "embeddings.patch_embeddings.projection"),
    (r"backbone\.patch_embed\.norm", _ENCODER + "embeddings.norm"),
    (_SWIN + "norm1", _TO_SWIN + "layernorm_before"),
    (_SWIN + "norm2", _TO_SWIN + "layernorm_after"),
    (_SWIN + r"attn\.w_msa\.proj", _TO_SWIN + "attention.output.dense"),
    (_SWIN + r"ffn\.layers\.0\.0", _TO_SWIN + "intermediate.dense"),
    (_SWIN + r"ffn\.layers\.1", _TO_SWIN + "output.dense"),
    (r"backbone\.stages\.(\d+)\.downsample\.norm", _ENCODER + r"encoder.layers.\1.downsample.norm"),
    (r"backbone\.stages\.(\d+)\.downsample\.reduction", _ENCODER + r"encoder.layers.\1.downsample.reduction"),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv", _DECODER + r"input_projections.\1.0"),
    (r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn", _DECODER + r"input_projections.\1.1"),
    (_MSDA + r"attentions\.0\.(\w+)", _TO_MSDA + r"self_attn.\2"),
    (_MSDA + r"ffns\.0\.layers\.0\.0", _TO_MSDA + "fc1"),
    (_MSDA + r"ffns\.0\.layers\.1", _TO_MSDA + "fc2"),
    (_MSDA + r"norms\.0", _TO_MSDA + "self_attn_layer_norm"),
    (_MSDA + r"norms\.1", _TO_MSDA + "final_layer_norm"),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv", _DECODER + "adapter_1.0"),
    (r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn", _DECODER + "adapter_1.1"),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv", _DECODER + "layer_1.0"),
    (r"panoptic_head\.pixel_decoder\.output_convs\.0\.gn", _DECODER + "layer_1.1"),
    (r"panoptic_head\.pixel_decoder\.mask_feature", _DECODER + "mask_projection"),
    (_BLOCK + r"attentions\.0\.attn\.out_proj", _TO_BLOCK + "cross_attn.out_proj"),
    (_BLOCK + r"attentions\.1\.attn\.out_proj", _TO_BLOCK + "self_attn.out_proj"),
    (_BLOCK + r"ffns\.0\.layers\.0\.0", _TO_BLOCK + "fc1"),
    (_BLOCK + r"ffns\.0\.layers\.1", _TO_BLOCK + "fc2"),
    (_BLOCK + r"norms\.0", _TO_BLOCK + "cross_attn_layer_norm"),
    (_BLOCK + r"norms\.1", _TO_BLOCK + "self_attn_layer_norm"),
    (_BLOCK + r"norms\.2", _TO_BLOCK + "final_layer_norm"),
    (r"panoptic_head\.transformer_decoder\.post_norm", _TRANSFORMER + "decoder.layernorm"),
    (r"panoptic_head\.query_embed", _TRANSFORMER + "queries_embedder"),
    (r"panoptic_head\.query_feat", _TRANSFORMER + "queries_features"),
    (r"panoptic_head\.level_embed", _TRANSFORMER + "level_embed"),
    (r"panoptic_head\.cls_embed", "class_predictor"),
]
_BY_MODULE = [(re.compile(rf"{source}\.(weight|bias)"), target) for source, target in _RULES]
_QKV = re.compile(_SWIN + r"attn\.w_msa\.qkv\.(weight|bias)")
_TABLE = re.compile(_SWIN + r"attn\.w_msa\.relative_position_bias_table")
_INDEX = re.compile(_SWIN + r"attn\.w_msa\.relative_position_index")
_CROSS = re.compile(_BLOCK + r"attentions\.0\.attn\.in_proj_(weight|bias)")
_SELF = re.compile(_BLOCK + r"attentions\.1\.attn\.in_proj_(weight|bias)")
_STAGE_NORM = re.compile(r"backbone\.norm(\d+)\.(weight|bias)")
_MASK_EMBED = re.compile(r"panoptic_head\.mask_embed\.(\d+)\.(weight|bias)")


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, split and reorder a whole OpenMMLab Mask2Former state dict with a Swin backbone.

    Raises Flux2PixelError naming the first key that the map does not know: nothing is dropped in silence but
    ``relative_position_index``, which the class computes.
    """
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        converted |= _convert_one(key, tensor)
    return converted


def _convert_one(key: str, tensor: Tensor) -> dict[str, Tensor]:
    for pattern, target in _BY_MODULE:
        if match := pattern.fullmatch(key):
            if "downsample" in key:
                tensor = _merge_order(tensor)
            return {f"{match.expand(target)}.{match.groups()[-1]}": tensor}
    if match := _QKV.fullmatch(key):
        names = [match.expand(_TO_SWIN + rf"attention.self.{part}.\3") for part in ("query", "key", "value")]
        return dict(zip(names, tensor.chunk(3), strict=True))
    if match := _TABLE.fullmatch(key):
        return {match.expand(_TO_SWIN + "attention.self.relative_position_bias_table"): tensor}
    if _INDEX.fullmatch(key):
        return {}
    if match := _CROSS.fullmatch(key):
        return {match.expand(_TO_BLOCK + r"cross_attn.in_proj_\2"): tensor}
    if match := _SELF.fullmatch(key):
        names = [match.expand(_TO_BLOCK + rf"self_attn.{part}_proj.\2") for part in "qkv"]
        return dict(zip(names, tensor.chunk(3), strict=True))
    if match := _STAGE_NORM.fullmatch(key):
        return {f"{_ENCODER}hidden_states_norms.stage{int(match[1]) + 1}.{match[2]}": tensor}
    if match := _MASK_EMBED.fullmatch(key):  # 0, 2, 4 of mmdet's Sequential with the ReLUs counted
        return {f"{_TRANSFORMER}decoder.mask_predictor.mask_embedder.{int(match[1]) // 2}.0.{match[2]}": tensor}
    if key == "panoptic_head.pixel_decoder.level_encoding.weight":
        return {f"{_DECODER}level_embed": tensor}
    raise Flux2PixelError(
        f"{key}: not a key of an OpenMMLab Mask2Former with a Swin backbone; take the checkpoint named"
    )


def _merge_order(tensor: Tensor) -> Tensor:
    """Reorder the last dimension of a patch merging: mmdet unfolds channel-major, transformers stacks four blocks."""
    by_channel = tensor.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]]  # (..., C, 4), offsets (y, x) -> (x, y)
    return by_channel.transpose(-1, -2).flatten(-2)


def official_config() -> Any:
    """The `Mask2FormerConfig` of GenEval's detector: Swin-S, 100 queries, 80 classes."""
    from transformers import Mask2FormerConfig, SwinConfig

    backbone = SwinConfig(
        image_size=224,
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(backbone_config=backbone, num_labels=80, num_queries=100)


def save(state: Mapping[str, Tensor], config: Any, folder: Path, facts: Mapping[str, str]) -> None:
    """Write a converted state dict as a model folder, weights last; ``facts`` say what it was made from."""
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in convert(state).items()}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # halves of one split share storage
    config.architectures = ["Mask2FormerForUniversalSegmentation"]
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "config.json", lambda path: path.write_text(config.to_json_string(use_diff=False)))
    metadata = {"format": "pt", **facts}
    files.write(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata=metadata))


def source(folder: Path) -> dict[str, str]:
    """What a folder written by `save` was made from."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {key: value for key, value in (file.metadata() or {}).items() if key != "format"}


def load(folder: Path, device: str | torch.device = "cpu") -> Any:
    """Open a folder written by `save` as transformers' model in float32; Flux2PixelError unless every key fits."""
    from transformers import Mask2FormerForUniversalSegmentation

    from flux2pixel.runtime.progress import quiet_libraries

    if not (folder / "model.safetensors").is_file():
        raise UsageError(f"{folder}: no converted detector there; `flux2pixel eval --suite geneval --fetch` makes it")
    quiet_libraries()
    model, info = Mask2FormerForUniversalSegmentation.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, local_files_only=True
    )
    missing = [key for key in info["missing_keys"] if not key.endswith(NOT_IN_CHECKPOINT)]
    wrong = {"missing": missing, "unexpected": info["unexpected_keys"], "mismatched": info["mismatched_keys"]}
    for what, keys in wrong.items():
        if keys:
            raise Flux2PixelError(
                f"{folder}: {len(keys)} {what} keys, such as {sorted(map(str, keys))[0]}; convert again"
            )
    return model.to(device).eval().requires_grad_(False)
