"""Where images come from: the miniature's scenes, or a folder of pictures. Batches are (B, 3, H, W) sRGB in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flux2pixel.errors import UsageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def _unit(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def scenes(count: int, batch: int, start: int) -> Iterator[Tensor]:
    """The miniature's scenes number ``start`` to ``start + count``."""
    from flux2pixel.miniature import world

    for first in range(start, start + count, batch):
        seeds = range(first, min(first + batch, start + count))
        yield _unit(np.stack([world.sample(seed).image for seed in seeds]))


def find_images(folder: Path) -> list[Path]:
    """Pictures below ``folder``, sorted. Raises UsageError if there is none."""
    if not folder.is_dir():
        raise UsageError(f"--images {folder}: no such folder")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise UsageError(f"--images {folder}: no {', '.join(sorted(SUFFIXES))} in it")
    return found


def folder(path: Path, count: int, patch: int) -> Iterator[Tensor]:
    """Up to ``count`` pictures below ``path``, upright, on white, cropped at the centre to multiples of ``patch``."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    for file in find_images(path)[:count]:
        try:
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGBA")
        except (UnidentifiedImageError, OSError) as error:
            raise UsageError(f"{file}: not a readable picture ({error}); remove or replace it") from error
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        width, height = (side // patch * patch for side in flat.size)
        if not width or not height:
            raise UsageError(f"{file}: {flat.size[0]} x {flat.size[1]} is smaller than one {patch}-pixel patch")
        yield _unit(np.asarray(ImageOps.fit(flat, (width, height)))[None].copy())
