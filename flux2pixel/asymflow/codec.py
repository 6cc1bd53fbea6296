"""Between pictures and what the network sees: colour, patches and the offset of the pixel space.

rgb  sRGB in [0, 1], (B, 3, H, W)    x  pixel tokens (B, N, D), N = (H / p)(W / p), D = 3 p p    c  offset (D,)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flux2pixel.asymflow.color import decode, encode
from flux2pixel.asymflow.tokens import patchify, unpatchify


@dataclass(frozen=True)
class Codec:
    """The pixel space of a model: normalised Oklab in patches of ``patch`` pixels, minus ``offset`` c if it has one."""

    patch: int
    offset: Tensor | None = None

    def encode(self, rgb: Tensor) -> Tensor:
        """sRGB (B, 3, H, W) -> x (B, N, D). Raises ValueError if p does not divide the sides."""
        x = patchify(encode(rgb), self.patch)
        return x if self.offset is None else x - self.offset.to(x)

    def image(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (B, N, D) -> normalised Oklab (B, 3, height, width)."""
        return unpatchify(x if self.offset is None else x + self.offset.to(x), self.patch, height, width)

    def decode(self, x: Tensor, height: int, width: int) -> Tensor:
        """x (B, N, D) -> sRGB (B, 3, height, width) in [0, 1]."""
        return decode(self.image(x, height, width))

    def clamp(self, x: Tensor, height: int, width: int) -> Tensor:
        """x with its colours moved into the sRGB gamut: decode, clamp, encode."""
        return self.encode(self.decode(x, height, width))
