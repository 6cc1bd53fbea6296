"""The training set as tensors: pixel tokens, latent tokens and text rows of the miniature's scenes, encoded once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flux2pixel.asymflow import color, tokens
from flux2pixel.bases.base import Base, Conditioning
from flux2pixel.progress import bar


@dataclass(frozen=True)
class Cache:
    """``pixels`` (M, N, D), ``latents`` (M, N, r), both float16; ``text`` of K captions, row 0 empty; ``rows`` (M,)."""

    pixels: Tensor
    latents: Tensor
    text: Conditioning
    rows: Tensor


def encode_scenes(base: Base, count: int, start: int, batch: int = 250) -> Cache:
    """Render and encode scenes ``start`` to ``start + count``; captions held out for evaluation never occur."""
    from flux2pixel.miniature import world

    pixels, latents, captions = [], [], []
    with bar("encode", count) as progress:
        for first in range(start, start + count, batch):
            drawn = [world.sample(seed) for seed in range(first, min(first + batch, start + count))]
            captions += [scene.caption for scene in drawn]
            rgb = torch.from_numpy(np.stack([scene.image for scene in drawn])).permute(0, 3, 1, 2).float() / 255
            pixels.append(tokens.patchify(color.encode(rgb), base.patch_size).half())
            latents.append(base.encode(rgb).half())
            progress.advance(len(drawn))
    distinct = ["", *sorted(set(captions))]
    row = {caption: index for index, caption in enumerate(distinct)}
    rows = torch.tensor([row[caption] for caption in captions])
    return Cache(torch.cat(pixels), torch.cat(latents), base.text(distinct), rows)
