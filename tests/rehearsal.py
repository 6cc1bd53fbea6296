"""The published bases at reduced depth and width: folders with every published key, small random weights, real names.

What a recipe meets in a downloaded checkpoint it meets here: absent and unknown keys, sub-folders, class names, head
sizes, schedulers. Depth, width, vocabularies and tables are small, so that a whole road is walked in seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers as tf
from text_encoders import TEMPLATE, tokenizer

from flux2pixel.asymflow import color, tokens
from flux2pixel.families import family_of
from flux2pixel.families.known import KNOWN
from flux2pixel.subspace.moments import Moments
from flux2pixel.subspace.solvers import procrustes

REHEARSED = [alias for alias, known in KNOWN.items() if not known.refused]
HIDDEN, HEAD, CLIP, VOCABULARY = 32, 16, 16, 64  # widths of the language models
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SCALE = 2.3  # of the subspace, as measured on FLUX.2's VAE


def write_rehearsal(folder: Path, alias: str, **deeper: int) -> Path:
    """Write the base ``alias`` small into ``folder``, in its published layout; ``deeper`` sets numbers of layers."""
    known = KNOWN[alias]
    torch.manual_seed(sum(map(ord, alias)))
    configs = {part: reduced(part, dict(config)) for part, config in known.configs.items()}
    configs["transformer"] |= {key: value for key, value in deeper.items() if key in configs["transformer"]}
    for part, config in configs.items():
        place = folder if part == "model_index" else folder / part
        place.mkdir(parents=True, exist_ok=True)
        if part == "model_index":
            index = "modular_model_index.json" if "Modular" in config["_class_name"] else "model_index.json"
            (place / index).write_text(json.dumps(config))
        elif part == "scheduler":
            (place / "scheduler_config.json").write_text(json.dumps(config))
        elif part.startswith("text_encoder"):
            model = getattr(tf, config["architectures"][0])
            model._from_config(model.config_class(**config)).bfloat16().save_pretrained(place)
            (place / "config.json").write_text(json.dumps(config))
        else:
            kind = getattr(diffusers, config["_class_name"])
            network = kind.from_config(config)
            if part == "transformer":
                randomise(network)
            else:
                rescale(family_of(known.transformer_class), network)
            dtype = torch.float32 if part == "vae" else torch.bfloat16
            torch.nn.Module.to(network, dtype).save_pretrained(place)
            (place / "config.json").write_text(json.dumps(config))  # the published keys, not diffusers' completed ones
    for part, words in vocabularies(known.configs["model_index"]).items():
        words.save_pretrained(folder / part)
    return folder


def reduced(part: str, config: dict[str, Any]) -> dict[str, Any]:
    """A published configuration with its own keys and smaller numbers."""
    if part.startswith("text_encoder"):
        return _encoder(config)
    if part == "vae":
        small = {"block_out_channels": [8] * 4, "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 64}
        small |= {"base_dim": 8, "num_res_blocks": 1}
    elif part == "transformer":
        heads, head = 1, config.get("attention_head_dim", 128)
        states = {"Flux2": 3, "Flux3": 8}.get(config["_class_name"][:5], 1)
        small = {"num_layers": 1, "num_single_layers": 1, "n_layers": 1, "n_refiner_layers": 1}
        small |= {"num_attention_heads": heads, "n_heads": heads, "n_kv_heads": heads, "dim": 128}
        small |= {"joint_attention_dim": states * HIDDEN, "cap_feat_dim": HIDDEN}
        small |= {"timestep_guidance_channels": 32, "timestep_channels": 32}
        if config["_class_name"].startswith("SD3"):
            small |= {"num_layers": 2, "caption_projection_dim": heads * head, "pooled_projection_dim": 2 * CLIP}
            small |= {"pos_embed_max_size": 24, "sample_size": 16, "dual_attention_layers": [0]}
        elif config["_class_name"].startswith("FluxT"):
            small |= {"pooled_projection_dim": CLIP}
    else:
        return config
    return {key: small.get(key, value) for key, value in config.items()}


def _encoder(config: dict[str, Any]) -> dict[str, Any]:
    kind = config["model_type"]
    if kind == "clip_text_model":
        small = {"hidden_size": CLIP, "projection_dim": CLIP, "num_attention_heads": 2, "num_hidden_layers": 2}
        small |= {"vocab_size": VOCABULARY, "intermediate_size": HIDDEN}
    elif kind == "t5":
        small = {"d_model": HIDDEN, "d_kv": HEAD, "d_ff": HIDDEN, "num_heads": 2, "num_layers": 1}
        small |= {"num_decoder_layers": 1, "vocab_size": VOCABULARY}
    else:
        depth = {"qwen3": 28, "mistral": 31, "qwen3_vl_text": 33}.get(kind, 2)  # one that nothing reads, at least
        small = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "head_dim": HEAD, "num_attention_heads": 2}
        small |= {"num_hidden_layers": depth, "num_key_value_heads": 1, "vocab_size": VOCABULARY}
        small |= {"layer_types": ["full_attention"] * depth, "max_position_embeddings": 1024}
        small |= dict.fromkeys(("bos_token_id", "eos_token_id"), 1)
    small_config = {key: small.get(key, value) for key, value in config.items()}
    if "text_config" in config:
        small_config["text_config"] = _encoder(config["text_config"])
    if "vision_config" in config:
        vision = {"depth": 1, "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_heads": 2}
        vision |= {"out_hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": HEAD}
        vision |= {"image_size": 28, "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0]}
        vision |= {"num_position_embeddings": 16}
        own = config["vision_config"]
        small_config["vision_config"] = {key: vision.get(key, value) for key, value in own.items()}
    rope = small_config.get("rope_scaling")
    if rope:  # sections are of half a head
        small_config["rope_scaling"] = rope | {"mrope_section": [4, 2, 2]}
    return small_config


def vocabularies(index: dict[str, Any]) -> dict[str, Any]:
    """A word tokenizer, or a processor around one, for each tokenizer of a model index."""
    made: dict[str, Any] = {}
    for part, value in index.items():
        if not part.startswith("tokenizer"):
            continue
        match value[1]:
            case "CLIPTokenizer":  # spells: stock pipelines load it by its class, which reads byte pairs
                spelt = {"<|startoftext|>": 0, "<|endoftext|>": 1}
                spelt |= {piece: 2 + i for i, piece in enumerate([*LETTERS, *(f"{one}</w>" for one in LETTERS)])}
                made[part] = tf.CLIPTokenizer(vocab=spelt, merges=[], model_max_length=77)
            case "T5TokenizerFast":
                pieces = [
                    ("<pad>", 0.0),
                    ("</s>", 0.0),
                    ("<unk>", -9.0),
                    ("▁", -2.0),
                    *((one, -3.0) for one in LETTERS),
                ]
                made[part] = tf.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
            case "PixtralProcessor":
                marks = dict.fromkeys(("image_token", "image_break_token", "image_end_token"), "<img>")
                words = tokenizer(512, "left")
                made[part] = tf.PixtralProcessor(tf.PixtralImageProcessor(), words, chat_template=TEMPLATE, **marks)
            case "Qwen3VLProcessor":
                pictures, videos = tf.Qwen2VLImageProcessor(), tf.Qwen3VLVideoProcessor()
                made[part] = tf.Qwen3VLProcessor(pictures, tokenizer(512), videos, chat_template=TEMPLATE)
            case "Qwen2Tokenizer":  # Qwen-Image's template has 34 tokens of preamble, of which words alone are fewer
                made[part] = tokenizer(1024, split=True)
            case _:
                made[part] = tokenizer(512)
    return made


@torch.no_grad()
def randomise(network: Any) -> None:
    """Every parameter random, biases and norms too: several are zero at birth, which would hide mistakes."""
    for parameter in network.parameters():
        parameter.normal_(std=0.5 / max(parameter.shape[-1], 1) ** 0.5 if parameter.ndim > 1 else 0.3)


@torch.no_grad()
def rescale(family: Any, vae: Any) -> None:
    """Scale what the encoder gives so that pixels have about SCALE times the power of normalised latents."""
    if hasattr(vae, "bn"):
        vae.bn.running_mean.normal_(std=0.1)
    rgb = torch.nn.functional.interpolate(torch.rand(4, 3, 2, 2), (64, 64), mode="bicubic").clamp(0, 1)
    last = getattr(vae, "quant_conv", None) or vae.encoder.conv_out
    count = len(last.bias) // 2  # the other half is the logarithm of a variance
    mean = torch.tensor(vae.config.get("latents_mean") or [vae.config.get("shift_factor") or 0.0] * count)
    raw = vae.encode((rgb * 2 - 1).unsqueeze(2) if last.weight.ndim == 5 else rgb * 2 - 1).latent_dist.mode()
    last.bias[:count] += mean - raw.transpose(0, 1).flatten(1).mean(1)
    x, z = tokens.patchify(color.encode(rgb), 16), family.to_latent(vae, rgb * 2 - 1)
    moments = Moments.zeros(x.shape[2], z.shape[2])
    moments.add(x, z)
    factor = float(procrustes(moments)[1]) / SCALE
    last.weight[:count] *= factor
    last.bias[:count] = mean + factor * (last.bias[:count] - mean)
