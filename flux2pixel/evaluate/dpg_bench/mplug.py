"""The network of mPLUG-large VQA, DPG-Bench's judge, in plain torch under its checkpoint's own names.

Legend of shapes: C crops, Q questions, R rows (questions times beams), N image tokens, L text tokens, d width,
h heads. An image is encoded once for all its questions: its keys and values in every cross-attention are made once
and shared (leading dimension 1), unless a concatenating fusion layer has made the image states depend on the question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -10000.0  # BERT's additive mask: in float32 its exponential is exactly 0


@dataclass(frozen=True)
class Config:
    """Sizes from config_bert.json, config.yaml and the vision weights themselves."""

    width: int
    heads: int
    ffn: int
    vocabulary: int
    positions: int
    token_types: int
    eps: float
    text_layers: int
    fusion_layers: int
    hidden_layers: int
    decoder_layers: int
    stride: int
    image_side: int
    vision_width: int
    vision_layers: int
    vision_patch: int

    @classmethod
    def read(cls, bert: Mapping[str, Any], image_side: int, weights: Mapping[str, Tensor]) -> Config:
        """Combine config_bert.json with ``image_res`` and the shapes of the vision tower; KeyError for what lacks."""
        patches = weights["visual_encoder.visual.conv1.weight"].shape
        blocks = {
            key.split(".")[4] for key in weights if key.startswith("visual_encoder.visual.transformer.resblocks.")
        }
        return cls(
            width=bert["hidden_size"],
            heads=bert["num_attention_heads"],
            ffn=bert["intermediate_size"],
            vocabulary=bert["vocab_size"],
            positions=bert["max_position_embeddings"],
            token_types=bert["type_vocab_size"],
            eps=bert["layer_norm_eps"],
            text_layers=bert["text_encoder_layers"],
            fusion_layers=bert["fusion_layers"],
            hidden_layers=bert["num_hidden_layers"],
            decoder_layers=bert["text_decode_layers"],
            stride=bert["stride_layer"],
            image_side=image_side,
            vision_width=patches[0],
            vision_layers=len(blocks),
            vision_patch=patches[-1],
        )

    def concatenates(self, layer: int) -> bool:
        """Whether fusion layer ``layer`` (from 0) joins image and text in one self-attention."""
        return layer > 0 and layer % self.stride == 0


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (R, L, d) -> (R, h, L, d / h)


class _VisionBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


class _Vision(nn.Module):
    """CLIP's ViT; ln_post over all tokens and no projection."""

    def __init__(self, c: Config):
        super().__init__()
        tokens = (c.image_side // c.vision_patch) ** 2 + 1
        self.conv1 = nn.Conv2d(3, c.vision_width, c.vision_patch, c.vision_patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(c.vision_width))
        self.positional_embedding = nn.Parameter(torch.empty(tokens, c.vision_width))
        self.ln_pre, self.ln_post = nn.LayerNorm(c.vision_width), nn.LayerNorm(c.vision_width)
        self.blocks = [_VisionBlock(c.vision_width) for _ in range(c.vision_layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(self.blocks)})

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


class _Embeddings(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocabulary, c.width)
        self.position_embeddings = nn.Embedding(c.positions, c.width)
        self.token_type_embeddings = nn.Embedding(c.token_types, c.width)
        self.LayerNorm = nn.LayerNorm(c.width, c.eps)

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        places = self.position_embeddings.weight[start : start + ids.shape[1]]
        return self.LayerNorm(self.word_embeddings(ids) + self.token_type_embeddings.weight[0] + places)


class _Out(nn.Module):
    """BERT's way out of a sublayer: linear, residual, LayerNorm after."""

    def __init__(self, source: int, c: Config):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(source, c.width), nn.LayerNorm(c.width, c.eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


KeyValue = tuple[Tensor, Tensor]  # (R or 1, h, N, d / h) each


class _Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads = c.heads
        # "self" is the checkpoint's name of the three projections.
        self.self = nn.ModuleDict({name: nn.Linear(c.width, c.width) for name in ("query", "key", "value")})
        self.output = _Out(c.width, c)

    def keys(self, x: Tensor) -> KeyValue:
        return _split(self.self["key"](x), self.heads), _split(self.self["value"](x), self.heads)

    def forward(self, x: Tensor, sources: list[tuple[KeyValue, Tensor | None]]) -> Tensor:
        """Attend from ``x`` (R, L, d) to all sources at once: keys and values with an additive mask or None.

        A source with one row is shared by all rows without being copied.
        """
        query = _split(self.self["query"](x), self.heads)
        parts = []
        for (key, _), mask in sources:
            if len(key) == 1 < len(query):
                folded = query.transpose(0, 1).flatten(1, 2)  # (h, R L, d / h)
                score = (folded @ key[0].transpose(-1, -2)).unflatten(1, (len(query), -1)).transpose(0, 1)
            else:
                score = query @ key.transpose(-1, -2)
            score = score / query.shape[-1] ** 0.5
            parts.append(score if mask is None else score + mask)
        weights = torch.cat(parts, -1).softmax(-1).split([part.shape[-1] for part in parts], -1)
        total = torch.zeros_like(query)
        for ((_, value), _), weight in zip(sources, weights, strict=True):
            if len(value) == 1 < len(query):
                folded = weight.transpose(0, 1).flatten(1, 2) @ value[0]
                total = total + folded.unflatten(1, (len(query), -1)).transpose(0, 1)
            else:
                total = total + weight @ value
        return self.output(total.transpose(1, 2).flatten(2), x)


class _Layer(nn.Module):
    def __init__(self, c: Config, cross: bool):
        super().__init__()
        self.attention = _Attention(c)
        if cross:
            self.crossattention = _Attention(c)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(c.width, c.ffn)})
        self.output = _Out(c.ffn, c)

    def feed(self, x: Tensor) -> Tensor:
        return self.output(F.gelu(self.intermediate["dense"](x)), x)

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.attention(x, [(self.attention.keys(x), mask)])


class _Stack(nn.Module):
    """BERT's encoder: layers numbered from ``first``, as the checkpoint numbers them."""

    def __init__(self, layers: list[_Layer], first: int = 0):
        super().__init__()
        self.layer = nn.ModuleDict({str(first + index): layer for index, layer in enumerate(layers)})
        self.layers = layers  # a plain list: registered once, typed, in order


class _Bert(nn.Module):
    def __init__(self, c: Config, layers: list[_Layer]):
        super().__init__()
        self.embeddings, self.encoder = _Embeddings(c), _Stack(layers)


class _Fusion(nn.Module):
    def __init__(self, layers: list[_Layer], first: int):
        super().__init__()
        self.encoder = _Stack(layers, first)


class _Transform(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(c.width, c.width), nn.LayerNorm(c.width, c.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class _Head(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(c.vocabulary))
        self.transform = _Transform(c)


class _Decoder(nn.Module):
    """A causal BERT with cross-attention; its output words are tied to its embeddings."""

    def __init__(self, c: Config):
        super().__init__()
        self.bert = _Bert(c, [_Layer(c, cross=True) for _ in range(c.decoder_layers)])
        self.cls = nn.ModuleDict({"predictions": _Head(c)})

    @property
    def head(self) -> _Head:
        head = self.cls["predictions"]
        assert isinstance(head, _Head)
        return head


@dataclass
class Memory:
    """What the decoder attends to: image states (1 or Q, N, d), text states (Q, L, d) and the text's additive mask."""

    image: Tensor
    text: Tensor
    mask: Tensor  # (Q, 1, 1, L)

    def joined(self) -> Tensor:
        """[image; text], (Q, N + L, d)."""
        return torch.cat([self.image.expand(len(self.text), -1, -1), self.text], 1)


class MPlug(nn.Module):
    """mPLUG VQA; `see` a crop once, `read` its questions against it, `step` the answers token by token."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.visual_encoder = nn.ModuleDict({"visual": _Vision(c)})
        self.visn_fc, self.visn_layer_norm = nn.Linear(c.vision_width, c.width), nn.LayerNorm(c.width, c.eps)
        self.text_encoder = _Bert(c, [_Layer(c, cross=False) for _ in range(c.text_layers)])
        # The checkpoint numbers the fusion layers as the last of num_hidden_layers.
        fused = [_Layer(c, cross=not c.concatenates(k)) for k in range(c.fusion_layers)]
        self.fusion_encoder = _Fusion(fused, first=c.hidden_layers - c.fusion_layers)
        self.text_decoder = _Decoder(c)

    def see(self, pixels: Tensor) -> Tensor:
        """Encode crops (C, 3, side, side), normalised, to image states (C, N, d)."""
        return self.visn_layer_norm(self.visn_fc(self.visual_encoder["visual"](pixels)))

    def read(self, image: Tensor, ids: Tensor, attention_mask: Tensor) -> Memory:
        """Fuse questions (Q, L) with the image states (1, N, d) of their crop, or (Q, N, d) of a crop each."""
        mask = (1.0 - attention_mask[:, None, None, :].to(image.dtype)) * MASKED
        text = self.text_encoder.embeddings(ids)
        for layer in self.text_encoder.encoder.layers:
            text = layer.feed(layer.attend(text, mask))
        for index, layer in enumerate(self.fusion_encoder.encoder.layers):
            if self.config.concatenates(index):
                both = torch.cat([image.expand(len(text), -1, -1), text], 1)
                wide = F.pad(mask, (image.shape[1], 0))
                both = layer.feed(layer.attend(both, wide))
                image, text = image + both[:, : image.shape[1]], both[:, image.shape[1] :]
            else:
                text = layer.attend(text, mask)
                text = layer.feed(layer.crossattention(text, [(layer.crossattention.keys(image), None)]))
        return Memory(image, text, mask)

    def start(self, memory: Memory, beams: int) -> Decoding:
        """Begin an answer for each question with ``beams`` beams; rows are question by question."""
        rows = torch.arange(len(memory.text), device=memory.text.device).repeat_interleave(beams)
        layers = self.text_decoder.bert.encoder.layers
        image = [layer.crossattention.keys(memory.image) for layer in layers]
        text = [layer.crossattention.keys(memory.text) for layer in layers]
        own = image[0][0]
        empty = own.new_empty(len(rows), own.shape[1], 0, own.shape[3])
        past = [(empty, empty) for _ in layers]
        decoding = Decoding(image, text, memory.mask, past)
        decoding.take(rows, past=False)
        return decoding

    def step(self, tokens: Tensor, decoding: Decoding) -> Tensor:
        """Logits (R, V) of what follows after the last ``tokens`` (R,), which ``decoding`` is extended by."""
        bert = self.text_decoder.bert
        x = bert.embeddings(tokens[:, None], start=decoding.past[0][0].shape[2])
        for index, layer in enumerate(bert.encoder.layers):
            key, value = layer.attention.keys(x)
            before = decoding.past[index]
            own = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
            decoding.past[index] = own
            x = layer.attention(x, [(own, None)])
            sources = [(decoding.image[index], None), (decoding.text[index], decoding.mask)]
            x = layer.feed(layer.crossattention(x, sources))
        head = self.text_decoder.head
        return F.linear(head.transform(x)[:, 0], bert.embeddings.word_embeddings.weight, head.bias)


@dataclass
class Decoding:
    """Keys and values of answers under way, per decoder layer: the image's, the question's, and the answer's own."""

    image: list[KeyValue]
    text: list[KeyValue]
    mask: Tensor
    past: list[KeyValue]

    def take(self, rows: Tensor, past: bool = True) -> None:
        """Keep these rows, in this order; ``past`` False leaves the answers' own keys as they are."""

        def pick(pair: KeyValue) -> KeyValue:
            return (pair[0], pair[1]) if len(pair[0]) == 1 else (pair[0][rows], pair[1][rows])

        self.image, self.text = [pick(pair) for pair in self.image], [(k[rows], v[rows]) for k, v in self.text]
        self.mask = self.mask[rows]
        if past:
            self.past = [(k[rows], v[rows]) for k, v in self.past]
