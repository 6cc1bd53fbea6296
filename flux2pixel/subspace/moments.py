"""The sums that every basis is made of, over token pairs (x, z). They add: over batches, processes, machines, files.

x  pixel tokens (M, D)     z  latent tokens (M, r)     y = [x - m, m, z]  (M, D + 3 + r)     G = sum y y^T
m  mean of each colour channel of the token (M, 3), subtracted from it

One symmetric rank-k update holds all second moments: only G on and above the diagonal is computed, by BLAS ``syrk``
on the CPU and by panels on a GPU. The tokens of one image are one float32 product of at most ``BLOCK`` rows, its
result is added in float64. A block never spans two images, so the sums do not depend on how images are batched,
ordered or shared out, beyond the rounding of the float64 additions.

Error of a block of K rows, u = 2^-24: |error of entry ij| <= K u/(1 - K u) ||y_i|| ||y_j|| in the worst case, and
about sqrt(K) u ||y_i|| ||y_j|| as rounding errors really fall (Higham and Mary, SIAM J. Sci. Comput. 41, 2019); over
n blocks that averages down by another sqrt(n). The bound is entry by entry, which is why m is set apart: it carries
nearly all the energy of natural images, and its rounding would drown the fine directions (12 times wider angles of
the 128 top eigenvectors of photographs). Images of fewer than ``SMALL`` tokens, for which a float32 product per image
would be mostly overhead, are multiplied in float64, as are float64 inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.linalg import blas
from torch import Tensor

FORMAT = "flux2pixel.moments"
BLOCK = 4096  # rows of one float32 product: a 1024 x 1024 image at p = 16
SMALL = 256  # images of fewer tokens are multiplied in float64
PANEL = 192  # columns of one product of the triangle; 899 = 4 x 192 + 131 leaves no sliver, which would run slowly


@dataclass
class Moments:
    """Sums in float64 over tokens.

    ``upper`` (D + g + r, D + g + r) holds G on and above the diagonal, ``total`` (D + g + r,) is sum y; ``width`` is D,
    and g = 3 (1 where 3 does not divide D). The properties ``xx``, ``xz``, ``zz``, ``x`` and ``z`` are the sums over
    the tokens themselves.
    """

    upper: Tensor
    total: Tensor
    width: int
    tokens: int = 0
    images: int = 0

    @classmethod
    def zeros(cls, width: int, rank: int, device: torch.device | str = "cpu") -> Moments:
        """Empty sums for D = ``width`` and r = ``rank``; r = 0 where there are no latents."""
        side = width + _channels(width) + rank
        upper = torch.zeros(side, side, dtype=torch.float64, device=device)
        return cls(upper, torch.zeros(side, dtype=torch.float64, device=device), width)

    @property
    def rank(self) -> int:
        """r, the width of a latent token."""
        return len(self.total) - self.width - _channels(self.width)

    def add(self, x: Tensor, z: Tensor) -> None:
        """Add a batch of images: x (B, N, D), z (B, N, r), in any floating dtype.

        Raises ValueError, and adds nothing, if the shapes do not fit or a value is not finite.
        """
        if x.shape[:2] != z.shape[:2] or (x.shape[2], z.shape[2]) != (self.width, self.rank):
            wanted = f"(B, N, {self.width}) and (B, N, {self.rank})"
            raise ValueError(f"tokens: {tuple(x.shape)} and {tuple(z.shape)} are not {wanted}")
        exact = x.shape[1] < SMALL or x.dtype == torch.float64
        y = self._join(x, z, torch.float64 if exact else torch.float32)
        total = y.sum(1).sum(0, dtype=torch.float64)
        if not bool(total.isfinite().all()):
            raise ValueError("tokens: a value is not finite; the image or the VAE's output is broken")
        self.total += total
        for rows in [y.flatten(0, 1)] if exact else y:
            for block in rows.split(BLOCK):
                self._update(block)
        self.tokens += x.shape[0] * x.shape[1]
        self.images += len(x)

    def _join(self, x: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
        y = torch.empty(*x.shape[:2], len(self.total), dtype=dtype, device=self.upper.device)
        channels = _channels(self.width)
        means = y[..., self.width : self.width + channels]
        by_channel = x.to(y).unflatten(-1, (channels, -1))
        torch.mean(by_channel, -1, out=means)
        torch.sub(by_channel, means[..., None], out=y[..., : self.width].unflatten(-1, (channels, -1)))
        y[..., self.width + channels :] = z
        return y

    def _update(self, block: Tensor) -> None:
        """Add one block (K, D + g + r), contiguous: BLAS's rank-k update on the CPU, panels of products elsewhere."""
        if block.device.type == "cpu":
            syrk = blas.dsyrk if block.dtype == torch.float64 else blas.ssyrk
            self.upper += torch.from_numpy(syrk(1.0, block.numpy().T, lower=0))
        else:
            self._update_panels(block)

    def _update_panels(self, block: Tensor) -> None:
        side = len(self.total)
        # TensorFloat-32 would keep 10 bits of the inputs; the bound above needs all 24.
        fast, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
        try:
            for start in range(0, side, PANEL):
                end = min(start + PANEL, side)
                self.upper[:end, start:end] += block[:, :end].mT @ block[:, start:end]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = fast

    def _lift(self, rows: Tensor) -> Tensor:
        """Put the means back into their tokens: rows of [x - m, m] (D + g, ...) to rows of x (D, ...)."""
        channels = _channels(self.width)
        means = rows[self.width : self.width + channels].repeat_interleave(self.width // channels, 0)
        return rows[: self.width] + means

    @property
    def xx(self) -> Tensor:
        """sum x x^T, (D, D)."""
        side = len(self.total) - self.rank
        block = self.upper[:side, :side]
        return self._lift(self._lift(block.triu() + block.triu(1).mT).mT)

    @property
    def xz(self) -> Tensor:
        """sum x z^T, (D, r)."""
        return self._lift(self.upper[:, len(self.total) - self.rank :])

    @property
    def zz(self) -> Tensor:
        """sum z z^T, (r, r)."""
        start = len(self.total) - self.rank
        block = self.upper[start:, start:]
        return block.triu() + block.triu(1).mT

    @property
    def x(self) -> Tensor:
        """sum x, (D,)."""
        return self._lift(self.total)

    @property
    def z(self) -> Tensor:
        """sum z, (r,)."""
        return self.total[len(self.total) - self.rank :]

    def __add__(self, other: Moments) -> Moments:
        """Sums over both data sets. Raises ValueError if their tokens differ in width."""
        if (self.width, len(self.total)) != (other.width, len(other.total)):
            raise ValueError(f"moments: D, r = {self.width}, {self.rank} and {other.width}, {other.rank} do not add")
        counts = self.tokens + other.tokens, self.images + other.images
        return Moments(self.upper + other.upper, self.total + other.total, self.width, *counts)

    def to(self, device: torch.device | str) -> Moments:
        """Return the sums on another device."""
        return Moments(self.upper.to(device), self.total.to(device), self.width, self.tokens, self.images)

    def tensors(self) -> dict[str, Tensor]:
        """Everything as tensors to save; :meth:`from_tensors` undoes it. Only the triangle is kept."""
        side = len(self.total)
        rows, columns = torch.triu_indices(side, side, device=self.upper.device)
        counts = torch.tensor([self.width, self.tokens, self.images])
        return {"triangle": self.upper[rows, columns], "total": self.total.clone(), "counts": counts}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """Undo :meth:`tensors`. Raises KeyError or ValueError if they are not such tensors."""
        width, tokens, images = tensors["counts"].tolist()
        side = len(tensors["total"])
        moments = cls.zeros(width, side - width - _channels(width))
        rows, columns = torch.triu_indices(side, side)
        if tensors["triangle"].shape != rows.shape or tensors["triangle"].dtype != torch.float64:
            raise ValueError("triangle: wrong shape or dtype")
        moments.upper[rows, columns] = tensors["triangle"]
        moments.total += tensors["total"]
        moments.tokens, moments.images = tokens, images
        return moments


def _channels(width: int) -> int:
    return 1 if width % 3 else 3
