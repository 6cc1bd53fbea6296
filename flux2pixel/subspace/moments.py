"""The sums that every basis is made of, over token pairs (x, z). They add: over batches, processes and files.

x  pixel tokens (M, D)     z  latent tokens (M, r)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Second moments in float64: ``xx`` = sum x x^T (D, D), ``xz`` (D, r), ``zz`` (r, r), sums and counts."""

    xx: Tensor
    xz: Tensor
    zz: Tensor
    x: Tensor
    z: Tensor
    tokens: int = 0
    images: int = 0

    @classmethod
    def zeros(cls, width: int, rank: int) -> Moments:
        """Empty sums for D = ``width`` and r = ``rank``."""
        shapes = ((width, width), (width, rank), (rank, rank), (width,), (rank,))
        xx, xz, zz, x, z = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
        return cls(xx, xz, zz, x, z)

    def add(self, x: Tensor, z: Tensor) -> None:
        """Add a batch of images: x (B, N, D), z (B, N, r). Products in float32 blocks of one batch, totals float64."""
        flat_x, flat_z = x.flatten(0, 1).float(), z.flatten(0, 1).float()
        self.xx += (flat_x.mT @ flat_x).double()
        self.xz += (flat_x.mT @ flat_z).double()
        self.zz += (flat_z.mT @ flat_z).double()
        self.x += flat_x.sum(0, dtype=torch.float64)
        self.z += flat_z.sum(0, dtype=torch.float64)
        self.tokens += len(flat_x)
        self.images += len(x)

    def __add__(self, other: Moments) -> Moments:
        """Sums over both data sets."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Moments(*(a + b for a, b in pairs))
