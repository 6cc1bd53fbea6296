"""Normalised Oklab, the colour space of the FLUX.2 pixel model (method: AsymFlow; Oklab: B. Ottosson, 2020).

Images are (..., 3, H, W). sRGB here is in [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

Matrix = tuple[tuple[float, ...], ...]

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


def _inverse(rows: Matrix) -> Matrix:
    # Inverted in float64 whatever the caller's dtype, so that encode and decode undo each other.
    return tuple(tuple(row) for row in torch.linalg.inv(torch.tensor(rows, dtype=torch.float64)).tolist())


_LMS_TO_RGB, _LAB_TO_LMS = _inverse(_RGB_TO_LMS), _inverse(_LMS_TO_LAB)


def _mix(rows: Matrix, image: Tensor) -> Tensor:
    """A 3 x 3 matrix on the channels, by products and sums of scalars: no matrix product that TF32 could round."""
    one, two, three = image.unbind(-3)
    return torch.stack([a * one + b * two + c * three for a, b, c in rows], dim=-3)


def _exact(image: Tensor) -> Tensor:
    """The image in float32, or float64 if it is: half precision is too coarse for a cube root."""
    return image if image.dtype == torch.float64 else image.float()


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
    """sRGB in [0, 1], (..., 3, H, W) -> normalised Oklab, same shape; float32 or better, whatever the autocast."""
    with torch.autocast(rgb.device.type, enabled=False):
        lms = _mix(_RGB_TO_LMS, srgb_to_linear(_exact(rgb)))
        lab = _mix(_LMS_TO_LAB, lms.clamp(min=0) ** (1 / 3))
        return (lab - _channelwise(OFFSET, lab)) / SPREAD


def decode(image: Tensor) -> Tensor:
    """Normalised Oklab -> sRGB in [0, 1]; linear RGB outside the gamut is clamped. Float32 or better, as encode."""
    with torch.autocast(image.device.type, enabled=False):
        image = _exact(image)
        lms = _mix(_LAB_TO_LMS, image * SPREAD + _channelwise(OFFSET, image)) ** 3
        return linear_to_srgb(_mix(_LMS_TO_RGB, lms).clamp(0, 1))
