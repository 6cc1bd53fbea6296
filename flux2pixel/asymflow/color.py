"""Normalised Oklab, the colour space of the FLUX.2 pixel model (method: AsymFlow; Oklab: B. Ottosson, 2020).

Images are (..., 3, H, W). sRGB here is in [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

OFFSET = (0.56, 0.0, 0.01)
SPREAD = 0.16

_RGB_TO_LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_LMS_TO_LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


def _matrix(rows: tuple[tuple[float, ...], ...], like: Tensor, inverse: bool = False) -> Tensor:
    # Inverted in float64 whatever the caller's dtype, so that encode and decode undo each other.
    exact = torch.tensor(rows, dtype=torch.float64)
    return (torch.linalg.inv(exact) if inverse else exact).to(like)


def _mix(matrix: Tensor, image: Tensor) -> Tensor:
    return torch.einsum("ij,...jhw->...ihw", matrix, image)


def _channelwise(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def srgb_to_linear(rgb: Tensor) -> Tensor:
    """Undo the sRGB transfer curve (IEC 61966-2-1)."""
    return torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(linear: Tensor) -> Tensor:
    """Apply the sRGB transfer curve."""
    curved = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, 12.92 * linear, curved)


def encode(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1], (..., 3, H, W) -> normalised Oklab of the same shape."""
    lms = _mix(_matrix(_RGB_TO_LMS, rgb), srgb_to_linear(rgb))
    lab = _mix(_matrix(_LMS_TO_LAB, rgb), lms.clamp(min=0) ** (1 / 3))
    return (lab - _channelwise(OFFSET, rgb)) / SPREAD


def decode(image: Tensor) -> Tensor:
    """Normalised Oklab -> sRGB in [0, 1]; linear RGB outside the gamut is clamped."""
    lab = image * SPREAD + _channelwise(OFFSET, image)
    lms = _mix(_matrix(_LMS_TO_LAB, image, inverse=True), lab) ** 3
    linear = _mix(_matrix(_RGB_TO_LMS, image, inverse=True), lms)
    return linear_to_srgb(linear.clamp(0, 1))


def clamp_to_gamut(image: Tensor) -> Tensor:
    """Move normalised Oklab colours into the sRGB gamut: decode, clamp, encode."""
    return encode(decode(image))
