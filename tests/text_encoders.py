"""Tiny random text encoders and a word tokenizer, written beside a tiny base as its family's own parts."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["a", "photo", "of", "red", "blue", "circle", "square", "two", "three", "on", "white"]
_TEXT = "{{ m.content if m.content is string else m.content[0].text }}"
TEMPLATE = f"{{% for m in messages %}}<s> {{{{ m.role }}}} {_TEXT} {{% endfor %}}<s>"


def tokenizer(length: int, side: str = "right", *, split: bool = False) -> tf.PreTrainedTokenizerFast:
    """One token a word, or a run of punctuation with ``split``, and an end; anything unknown is ``<unk>``."""
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<img>"]
    vocabulary = {word: index for index, word in enumerate([*specials, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace() if split else pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    made.model_max_length, made.padding_side, made.chat_template = length, side, TEMPLATE
    return made


VOCABULARY = {"vocab_size": 5 + len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, **VOCABULARY}
_QWEN = {"hidden_size": 24, "num_key_value_heads": 1, "head_dim": 12, **_SMALL}


def qwen3() -> tf.PreTrainedModel:
    """30 hidden states of width 8: FLUX.2 klein reads up to the 27th."""
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**_QWEN | {"hidden_size": 8, "head_dim": 4, "num_hidden_layers": 30}))


def clip(width: int, projection: int, cls: type = tf.CLIPTextModel) -> tf.PreTrainedModel:
    return cls(tf.CLIPTextConfig(hidden_size=width, projection_dim=projection, **_SMALL))


def t5() -> tf.PreTrainedModel:
    return tf.T5EncoderModel(tf.T5Config(d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32))


def qwen25_vl() -> tf.PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}
    text = {**_QWEN, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 24}
    return tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def qwen3_vl() -> tf.PreTrainedModel:
    """33 hidden states of width 16: FLUX.3 reads up to the 32nd."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = _QWEN | {"hidden_size": 16, "head_dim": 8, "num_hidden_layers": 33, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    vision |= {"deepstack_visual_indexes": [0]}
    return tf.Qwen3VLForConditionalGeneration(tf.Qwen3VLConfig(text_config=text, vision_config=vision))


def mistral3() -> tf.PreTrainedModel:
    """31 hidden states of width 8: FLUX.2 dev reads up to the 30th."""
    text = {"model_type": "mistral", **_QWEN, "hidden_size": 8, "head_dim": 4, "num_hidden_layers": 31}
    vision = {"model_type": "pixtral", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision |= {"intermediate_size": 16, "image_size": 16, "patch_size": 8}
    return tf.Mistral3ForConditionalGeneration(tf.Mistral3Config(text_config=text, vision_config=vision))


STOCK = {
    "flux1-dev": ("FluxPipeline", "CLIPTextModel", "T5EncoderModel"),
    "flux1-schnell": ("FluxPipeline", "CLIPTextModel", "T5EncoderModel"),
    "flux2-dev": ("Flux2Pipeline", "Mistral3ForConditionalGeneration"),
    "flux2-klein": ("Flux2KleinPipeline", "Qwen3ForCausalLM"),
    "flux3": ("", "Qwen3VLForConditionalGeneration"),
    "qwen-image": ("QwenImagePipeline", "Qwen2_5_VLForConditionalGeneration"),
    "sd3.5-large": ("StableDiffusion3Pipeline", *["CLIPTextModelWithProjection"] * 2, "T5EncoderModel"),
    "z-image": ("ZImagePipeline", "Qwen3Model"),
}
"""The stock pipeline of a tiny base (FLUX.3 has none) and its text encoders' classes, whole and with their heads."""


def stock_text(folder: Path, name: str) -> dict:
    """The text encoders and tokenizers of a written base, as its stock pipeline loads them, in float32."""
    parts = {}
    for number, kind in enumerate(STOCK[name][1:], 1):
        part = f"text_encoder{f'_{number}' if number > 1 else ''}"
        parts[part] = getattr(tf, kind).from_pretrained(folder / part, dtype=torch.float32).eval()
    for path in folder.glob("tokenizer*"):
        parts[path.name] = (tf.AutoProcessor if name in ("flux2-dev", "flux3") else tf.AutoTokenizer).from_pretrained(
            path
        )
    return parts


def write_text(folder: Path, name: str) -> None:
    """Write the text encoders and tokenizers of the tiny base ``name`` into its folder."""
    torch.manual_seed(7)
    if name.startswith("flux1"):
        parts = {"text_encoder": clip(12, 12), "text_encoder_2": t5()}
        words = {"tokenizer": tokenizer(16), "tokenizer_2": tokenizer(512)}
    elif name.startswith("sd3"):
        projected = tf.CLIPTextModelWithProjection
        parts = {
            "text_encoder": clip(8, 6, projected),
            "text_encoder_2": clip(12, 6, projected),
            "text_encoder_3": t5(),
        }
        words = {"tokenizer": tokenizer(77), "tokenizer_2": tokenizer(77), "tokenizer_3": tokenizer(256)}
    elif name == "qwen-image":
        parts, words = {"text_encoder": qwen25_vl()}, {"tokenizer": tokenizer(1024, split=True)}
    elif name == "z-image":
        parts, words = {"text_encoder": tf.Qwen3Model(tf.Qwen3Config(**_QWEN))}, {"tokenizer": tokenizer(512)}
    elif name == "flux3":
        processor = tf.Qwen3VLProcessor(
            tf.Qwen2VLImageProcessor(), tokenizer(512), tf.Qwen3VLVideoProcessor(), chat_template=TEMPLATE
        )
        parts, words = {"text_encoder": qwen3_vl()}, {"tokenizer": processor}
    elif name == "flux2-dev":
        processor = tf.PixtralProcessor(
            tf.PixtralImageProcessor(), tokenizer(512, "left"), image_token="<img>", image_break_token="<img>",
            image_end_token="<img>", chat_template=TEMPLATE,
        )  # fmt: skip
        parts, words = {"text_encoder": mistral3()}, {"tokenizer": processor}
    elif name == "flux2-klein":
        parts, words = {"text_encoder": qwen3()}, {"tokenizer": tokenizer(512)}
    else:
        raise ValueError(name)
    for part, model in {**parts, **words}.items():
        model.save_pretrained(folder / part)
