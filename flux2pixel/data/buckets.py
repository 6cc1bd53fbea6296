"""Aspect-ratio buckets: a picture keeps its aspect ratio, is scaled to cover its bucket, and is cropped at the centre.

Sizes are (height, width) in pixels throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from flux2pixel.runtime.errors import UsageError

Size = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """Where a picture goes: its bucket, the factor it is scaled by, and the share of its area that is cut off."""

    bucket: Size
    scale: float
    cut: float


@dataclass(frozen=True)
class Buckets:
    """The sizes near ``resolution`` squared pixels, both sides multiples of ``patch``, aspect ratios 1:2 to 2:1.

    ``resolution`` 0 keeps every picture at its own size, cropped to multiples of ``patch``: as many buckets as sizes.
    Raises UsageError if ``resolution`` is no multiple of ``patch``.
    """

    resolution: int
    patch: int

    def __post_init__(self) -> None:
        if self.resolution % self.patch:
            near = max(1, round(self.resolution / self.patch)) * self.patch
            raise UsageError(
                f"resolution {self.resolution} is not a multiple of the patch size {self.patch}; {near} is the nearest"
            )

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """All buckets, squarest first; empty for resolution 0."""
        from diffusers.training_utils import generate_aspect_ratio_buckets

        return tuple(generate_aspect_ratio_buckets(self.resolution, self.patch)) if self.resolution else ()

    def place(self, height: int, width: int) -> Placement:
        """The bucket whose aspect ratio is nearest, as a ratio: a portrait is treated like the landscape it mirrors."""
        if not self.resolution:
            bucket = (height // self.patch * self.patch, width // self.patch * self.patch)
            return Placement(bucket, 1.0, 1 - bucket[0] * bucket[1] / (height * width))
        aspect = math.log(height / width)
        bucket = min(self.sizes, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))
        scale = max(bucket[0] / height, bucket[1] / width)
        return Placement(bucket, scale, 1 - bucket[0] * bucket[1] / (height * width * scale**2))


def fit(image: Image.Image, placement: Placement) -> np.ndarray:
    """Scale and crop in one resampling: RGB picture -> (H, W, 3) uint8 of the bucket's size."""
    height, width = placement.bucket
    used_height, used_width = height / placement.scale, width / placement.scale
    left, top = (image.width - used_width) / 2, (image.height - used_height) / 2
    if placement.scale == 1:  # whole pixels: nothing is resampled
        left, top = int(left), int(top)
        return np.asarray(image.crop((left, top, left + width, top + height)))
    # Rounding may put the box a hair outside, which Pillow refuses.
    box = (max(left, 0.0), max(top, 0.0), min(left + used_width, image.width), min(top + used_height, image.height))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
