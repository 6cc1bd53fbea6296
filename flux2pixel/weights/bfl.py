"""FLUX.2 under the names of Black Forest Labs' single files, in and out; only byte ranges move, nothing is computed.

Their attention keeps query, key and value in one tensor, and their final modulation stores (shift, scale) where
diffusers has (scale, shift). ComfyUI's stock FLUX.2 loader takes these names, but no pixel model: it has no recovery.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from flux2pixel.weights.checkpoint import Stored, joined

MARKER = {
    "flux2pixel.model": "asymflow pixel model under FLUX.2 names; needs proj_buffer and scale_buffer",
    "flux2pixel.note": "a stock FLUX.2 loader cannot run it",
}
PREFIX = "model.diffusion_model."
TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
DOUBLE = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
SINGLE = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
SWAPPED = "norm_out.linear.weight"
BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}


def is_bfl(names: Mapping[str, object]) -> bool:
    """Whether a checkpoint uses these names."""
    return any(name.removeprefix(PREFIX).startswith("double_blocks.") for name in names)


def stock_names(name: str) -> tuple[str, ...]:
    """The stock class's names of what a tensor of these names holds: one, three if it is fused, none if unknown."""
    module, _, kind = name.removeprefix(PREFIX).rpartition(".")
    kind = "weight" if kind == "scale" else kind
    if module in TOP:
        return (f"{TOP[module]}.{kind}",)
    block = re.fullmatch(r"(double_blocks|single_blocks)\.(\d+)\.(.+)", module)
    if not block:
        return ()
    stream, number, inner = block.groups()
    known = DOUBLE if stream == "double_blocks" else SINGLE
    parts: tuple[str, ...] = FUSED.get(inner, ()) if stream == "double_blocks" else ()
    parts = parts or ((known[inner],) if inner in known else ())
    return tuple(f"{BLOCKS[stream]}.{number}.{part}.{kind}" for part in parts)


def to_stock(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensors by the stock class's names; a name that is not known stays, for the check against the class to list."""
    found = {}
    for name, stored in tensors.items():
        targets = stock_names(name)
        rows = stored.length // max(len(targets), 1)
        for place, target in enumerate(targets):
            part = stored.slice(place * rows, (place + 1) * rows)
            found[target] = _halves_swapped(part) if target == SWAPPED else part
        if not targets:
            found[name] = stored
    return found


def to_bfl(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The inverse of :func:`to_stock`. Raises KeyError for a tensor that has no such name."""
    found = {}
    for name in dict.fromkeys(map(_bfl_name, tensors)):
        parts = [tensors[target] for target in stock_names(name)]
        whole = joined(*parts) if len(parts) > 1 else parts[0]
        found[name] = _halves_swapped(whole) if stock_names(name) == (SWAPPED,) else whole
    return found


def _bfl_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    for theirs, ours in TOP.items():
        if ours == module:
            return f"{theirs}.{kind}"
    block = re.fullmatch(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)", module)
    if not block:
        raise KeyError(name)
    stream, number, inner = block.groups()
    theirs = "double_blocks" if stream == "transformer_blocks" else "single_blocks"
    table: dict[str, str] = {}
    if theirs == "double_blocks":
        table = {ours: key for key, ours in DOUBLE.items()} | {o: key for key, parts in FUSED.items() for o in parts}
    else:
        table = {ours: key for key, ours in SINGLE.items()}
    kind = "scale" if ".norm_" in f".{inner}" else kind
    return f"{theirs}.{number}.{table[inner]}.{kind}"


def _halves_swapped(stored: Stored) -> Stored:
    half = stored.length // 2
    return joined(stored.slice(half, stored.length), stored.slice(0, half))
