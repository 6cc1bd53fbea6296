"""What HPSv3's network reads: the exact text around a prompt, and an image packed for Qwen2-VL.

Protocol: the ``hpsv3`` 1.0.0 package. The instruction is data with a digest, trailing spaces included: it is read from
a file and never written here.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux2pixel.evaluate.suite import Rgb
from flux2pixel.runtime.errors import UsageError

INSTRUCTION_SHA256 = "0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a"
PLACEHOLDER = "{text_prompt}"
REWARD = "<|Reward|>"
IMAGE_PAD = "<|image_pad|>"
SUFFIX = f"\nPlease provide the overall ratings of this image: {REWARD}\n\nEND\n"
BEFORE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n<|vision_start|>{IMAGE_PAD}<|vision_end|>"
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n"

AREA = 256 * 28 * 28  # pixels; least and most at once, so every image comes to about this
PATCH, MERGE, FRAMES = 14, 2, 2
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def read_instruction(path: Path) -> str:
    """Read the instruction template; UsageError if it is absent or not byte for byte the protocol's."""
    if not path.is_file():
        raise UsageError(f"{path}: no HPSv3 instruction there; `flux2pixel eval --suite hpsv3 --fetch` gets it")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != INSTRUCTION_SHA256:
        raise UsageError(f"{path}: not HPSv3's instruction (sha256 {INSTRUCTION_SHA256[:12]}...); even spaces matter")
    return content.decode("utf-8")


def chat_text(instruction: str, prompt: str) -> str:
    """The whole text for one prompt, with one `IMAGE_PAD`."""
    return BEFORE + instruction.replace(PLACEHOLDER, prompt) + SUFFIX + AFTER


def resized(width: int, height: int) -> tuple[int, int]:
    """Return the ``(width, height)`` at which the network sees an image: multiples of 28 of about `AREA` pixels."""
    unit = PATCH * MERGE
    if max(width, height) > 200 * min(width, height):
        raise UsageError(f"an image of {width}x{height} is too long for Qwen2-VL; the sides may differ 200 times")
    w, h = (max(unit, round(side / unit) * unit) for side in (width, height))
    if w * h > AREA:
        shrink = math.sqrt(width * height / AREA)
        w, h = (max(unit, math.floor(side / shrink / unit) * unit) for side in (width, height))
    elif w * h < AREA:
        grow = math.sqrt(AREA / (width * height))
        w, h = (math.ceil(side * grow / unit) * unit for side in (width, height))
    return w, h


def grid_of(width: int, height: int) -> tuple[int, int, int]:
    """Frames, rows and columns of patches of an image of this original size."""
    w, h = resized(width, height)
    return 1, h // PATCH, w // PATCH


def image_tokens(grid: tuple[int, int, int]) -> int:
    """How many tokens an image takes in the text."""
    return grid[0] * grid[1] * grid[2] // MERGE**2


def shrink(image: Rgb) -> Rgb:
    """Resize (H, W, 3) uint8 to `resized`, by Pillow's bicubic on 8 bits."""
    size = resized(image.shape[1], image.shape[0])
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def pack(image: Rgb) -> Tensor:
    """Pack an image of multiples of 28 as Qwen2-VL does: (patches, 1176) float32.

    Rows run over 2 x 2 blocks of patches (block row, block column, row, column); the values of a row over channel,
    repeated frame, y, x.
    """
    pixels = (image.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    rows, columns = image.shape[0] // PATCH, image.shape[1] // PATCH
    blocks = pixels.reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    ordered = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3, 1, PATCH * PATCH)
    return torch.from_numpy(np.repeat(ordered, FRAMES, axis=2).reshape(rows * columns, -1))
