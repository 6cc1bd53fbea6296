"""The published ``config.json`` of every part of every base, as data, by part: what a plan or a rehearsal starts from.

Read from public copies of each repository's files and checked against published file sizes. Keys are those that were
published, no more: SD3.5 large has no ``dual_attention_layers``, Qwen-Image has a ``pooled_projection_dim`` that its
class does not know, FLUX.1 has no ``axes_dims_rope``. Left out are ``_diffusers_version``, ``_name_or_path`` and
``transformers_version``, which change with every upload and configure nothing.

Not seen, and so put together from what loads: FLUX.3's transformer (the class's defaults) and its ``text_encoder``
(Qwen3-VL-4B-Instruct's), Qwen-Image's ``text_encoder`` (Qwen2.5-VL-7B-Instruct's), and FLUX.2 klein 9B's
``text_encoder`` (Qwen3-8B's).
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def _index(pipeline: str, transformer: str, vae: str, encoders: dict[str, str], words: dict[str, str]) -> Config:
    """A ``model_index.json``."""
    index: Config = {"_class_name": pipeline, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    index |= {part: ["transformers", name] for part, name in {**encoders, **words}.items()}
    return index | {"transformer": ["diffusers", transformer], "vae": ["diffusers", vae]}


# Schedulers ---------------------------------------------------------------------------------------------------------

_EULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
}
_FLAGS = {
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
_FLUX2_SCHEDULER = _EULER | _FLAGS | {"shift": 3.0, "use_dynamic_shifting": True}
_DEV_SCHEDULER = _EULER | {"shift": 3.0, "use_dynamic_shifting": True}
_SCHNELL_SCHEDULER = _EULER | {"shift": 1.0, "use_dynamic_shifting": False}
_SD3_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
_QWEN_SCHEDULER = (
    _EULER
    | _FLAGS
    | {
        "max_image_seq_len": 8192,
        "max_shift": 0.9,
        "shift": 1.0,
        "shift_terminal": 0.02,
        "use_dynamic_shifting": True,
    }
)
_Z_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
}
_FLUX3_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 6.93,
    "use_dynamic_shifting": False,
}

# VAEs ---------------------------------------------------------------------------------------------------------------

_KL_VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
_FLUX1_VAE = _KL_VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
_SD3_VAE = _KL_VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
_FLUX2_VAE = {name: value for name, value in _KL_VAE.items() if not name.startswith("latents")} | {
    "_class_name": "AutoencoderKLFlux2",
    "batch_norm_eps": 0.0001,
    "batch_norm_momentum": 0.1,
    "latent_channels": 32,
    "patch_size": [2, 2],
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_MEAN = "-.7571 -.7089 -.9113 .1075 -.1745 .9653 -.1517 1.5508 .4134 -.0715 .5517 -.3632 -.1922 -.9497 .2503 -.2921"
_DEVIATION = (
    "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251 1.916"
)
_QWEN_VAE = {
    "_class_name": "AutoencoderKLQwenImage",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": [float(number) for number in _MEAN.split()],
    "latents_std": [float(number) for number in _DEVIATION.split()],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}

# Text encoders ------------------------------------------------------------------------------------------------------

_QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN3_8B = _QWEN3_4B | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
_MISTRAL3 = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "dtype": "bfloat16",
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "text_config": {
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "intermediate_size": 32768,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "use_cache": True,
        "vocab_size": 131072,
    },
    "vision_config": {
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "image_size": 1540,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "pixtral",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "rope_theta": 10000.0,
    },
    "vision_feature_layer": -1,
}
_CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "bfloat16",
    "vocab_size": 49408,
}
_SD3_CLIP_L = _CLIP_L | {"architectures": ["CLIPTextModelWithProjection"], "torch_dtype": "float16"}
_CLIP_G = _SD3_CLIP_L | {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
_T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32128,
}
_QWEN25_VL_7B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_token_id": 151655,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_chans": 3,
        "intermediate_size": 3420,
        "model_type": "qwen2_5_vl",
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vision_token_id": 151654,
    "vocab_size": 152064,
}
_QWEN3_VL_4B = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}

# Transformers -------------------------------------------------------------------------------------------------------

_FLUX2 = {
    "_class_name": "Flux2Transformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-06,
    "guidance_embeds": False,
    "in_channels": 128,
    "mlp_ratio": 3.0,
    "out_channels": None,
    "patch_size": 1,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}
_KLEIN_4B = _FLUX2 | {
    "joint_attention_dim": 7680,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 20,
}
_KLEIN_9B = _FLUX2 | {
    "joint_attention_dim": 12288,
    "num_attention_heads": 32,
    "num_layers": 8,
    "num_single_layers": 24,
}
_FLUX2_DEV = {name: value for name, value in _FLUX2.items() if name != "guidance_embeds"} | {
    "joint_attention_dim": 15360,
    "num_attention_heads": 48,
    "num_layers": 8,
    "num_single_layers": 48,
}
_FLUX1 = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
_SD35 = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
    "sample_size": 128,
}
_SD35_MEDIUM = _SD35 | {
    "caption_projection_dim": 1536,
    "dual_attention_layers": list(range(13)),
    "num_attention_heads": 24,
    "num_layers": 24,
    "pos_embed_max_size": 384,
}
_SD35_LARGE = _SD35 | {
    "caption_projection_dim": 2432,
    "num_attention_heads": 38,
    "num_layers": 38,
    "pos_embed_max_size": 192,
}
_QWEN_IMAGE = {
    "_class_name": "QwenImageTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 768,
}
_Z_IMAGE = {
    "_class_name": "ZImageTransformer2DModel",
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "norm_eps": 1e-05,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}
_FLUX3 = {
    "_class_name": "Flux3Transformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "cond_in_channels": 128,
    "eps": 1e-06,
    "flow_map": False,
    "in_channels": 128,
    "joint_attention_dim": 20480,
    "mlp_ratio": 3.0,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 28,
    "rope_theta": 10000,
    "timestep_channels": 256,
}

# Whole checkpoints --------------------------------------------------------------------------------------------------

_TRANSFORMER = "Flux2Transformer2DModel"
_KLEIN_INDEX = _index(
    "Flux2KleinPipeline",
    _TRANSFORMER,
    "AutoencoderKLFlux2",
    {"text_encoder": "Qwen3ForCausalLM"},
    {"tokenizer": "Qwen2TokenizerFast"},
)
_DEV_INDEX = _index(
    "Flux2Pipeline",
    _TRANSFORMER,
    "AutoencoderKLFlux2",
    {"text_encoder": "Mistral3ForConditionalGeneration"},
    {"tokenizer": "PixtralProcessor"},
)
_FLUX1_INDEX = _index(
    "FluxPipeline",
    "FluxTransformer2DModel",
    "AutoencoderKL",
    {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
    {"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"},
)
_SD3_INDEX = _index(
    "StableDiffusion3Pipeline",
    "SD3Transformer2DModel",
    "AutoencoderKL",
    {
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    },
    {"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer", "tokenizer_3": "T5TokenizerFast"},
)
_QWEN_INDEX = _index(
    "QwenImagePipeline",
    "QwenImageTransformer2DModel",
    "AutoencoderKLQwenImage",
    {"text_encoder": "Qwen2_5_VLForConditionalGeneration"},
    {"tokenizer": "Qwen2Tokenizer"},
)
_Z_INDEX = _index(
    "ZImagePipeline",
    "ZImageTransformer2DModel",
    "AutoencoderKL",
    {"text_encoder": "Qwen3Model"},
    {"tokenizer": "Qwen2Tokenizer"},
)
_FLUX3_INDEX = _index(
    "Flux3ModularPipeline",
    "Flux3Transformer2DModel",
    "AutoencoderKLFlux2",
    {"text_encoder": "Qwen3VLForConditionalGeneration"},
    {"tokenizer": "Qwen3VLProcessor"},
)


def _parts(index: Config, scheduler: Config, transformer: Config, vae: Config, *encoders: Config) -> dict[str, Config]:
    parts = {"model_index": index, "scheduler": scheduler, "transformer": transformer, "vae": vae}
    return parts | {f"text_encoder{f'_{i + 1}' if i else ''}": config for i, config in enumerate(encoders)}


_DISTILLED = {"is_distilled": True}
_FLUX1_REST = (_FLUX1_VAE, _CLIP_L, _T5_XXL)
_SD3_REST = (_SD3_VAE, _SD3_CLIP_L, _CLIP_G, _T5_XXL | {"torch_dtype": "float16"})

PUBLISHED: dict[str, dict[str, Config]] = {
    "flux2-klein-4b": _parts(_KLEIN_INDEX, _FLUX2_SCHEDULER, _KLEIN_4B, _FLUX2_VAE, _QWEN3_4B),
    "flux2-klein-4b-distilled": _parts(_KLEIN_INDEX | _DISTILLED, _FLUX2_SCHEDULER, _KLEIN_4B, _FLUX2_VAE, _QWEN3_4B),
    "flux2-klein-9b": _parts(_KLEIN_INDEX, _FLUX2_SCHEDULER, _KLEIN_9B, _FLUX2_VAE, _QWEN3_8B),
    "flux2-klein-9b-distilled": _parts(_KLEIN_INDEX | _DISTILLED, _FLUX2_SCHEDULER, _KLEIN_9B, _FLUX2_VAE, _QWEN3_8B),
    "flux2-dev": _parts(_DEV_INDEX, _FLUX2_SCHEDULER, _FLUX2_DEV, _FLUX2_VAE, _MISTRAL3),
    "flux1-dev": _parts(_FLUX1_INDEX, _DEV_SCHEDULER, _FLUX1 | {"guidance_embeds": True}, *_FLUX1_REST),
    "flux1-schnell": _parts(_FLUX1_INDEX, _SCHNELL_SCHEDULER, _FLUX1 | {"guidance_embeds": False}, *_FLUX1_REST),
    "sd3.5-medium": _parts(_SD3_INDEX, _SD3_SCHEDULER, _SD35_MEDIUM, *_SD3_REST),
    "sd3.5-large": _parts(_SD3_INDEX, _SD3_SCHEDULER, _SD35_LARGE, *_SD3_REST),
    "qwen-image": _parts(_QWEN_INDEX, _QWEN_SCHEDULER, _QWEN_IMAGE, _QWEN_VAE, _QWEN25_VL_7B),
    "qwen-image-2512": _parts(_QWEN_INDEX, _QWEN_SCHEDULER, _QWEN_IMAGE, _QWEN_VAE, _QWEN25_VL_7B),
    "z-image": _parts(_Z_INDEX, _Z_SCHEDULER | {"shift": 6.0}, _Z_IMAGE, _FLUX1_VAE, _QWEN3_4B),
    "z-image-turbo": _parts(_Z_INDEX, _Z_SCHEDULER | {"shift": 3.0}, _Z_IMAGE, _FLUX1_VAE, _QWEN3_4B),
    "flux3-klein": _parts(_FLUX3_INDEX, _FLUX3_SCHEDULER, _FLUX3, _FLUX2_VAE, _QWEN3_VL_4B),
    "flux3-klein-distilled": _parts(
        _FLUX3_INDEX, _FLUX3_SCHEDULER, _FLUX3 | {"flow_map": True}, _FLUX2_VAE, _QWEN3_VL_4B
    ),
}
"""By base and part: ``model_index``, ``scheduler``, ``transformer``, ``vae``, ``text_encoder``, ``text_encoder_2``."""
