"""Images (B, 3, H, W) to pixel tokens (B, N, D) and back; tokens run row by row, each channel-first (c, ph, pw)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def patchify(image: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, (H/p)(W/p), C p p). Raises ValueError if p does not divide the sides."""
    height, width = image.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(f"image: {height} x {width} is not a multiple of the patch size {patch}")
    return F.pixel_unshuffle(image, patch).flatten(2).mT


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """(B, N, C p p) -> (B, C, height, width), the inverse of :func:`patchify`."""
    grid = tokens.mT.reshape(tokens.shape[0], tokens.shape[2], height // patch, width // patch)
    return F.pixel_shuffle(grid, patch)
