"""The decoder's mean self-block Jacobian J = E[d patch_i / d token_i], exactly and as a stochastic estimate.

B  latent images     N  tokens on an (h, w) grid     r  latent token width     D  pixel token width

``decode`` maps latent tokens (B, N, r) to pixel tokens (B, N, D), differentiably. Both ways use forward mode
(``torch.func.jvp``): a column of J costs one pass, while reverse mode pays one for each of the N D pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Estimate:
    """``mean`` (D, r) float64 of the self-block Jacobian, and the standard error of its entries, likewise."""

    mean: Tensor
    standard_error: Tensor

    @property
    def relative_error(self) -> float:
        """||standard error|| / ||mean||."""
        return float(self.standard_error.norm() / self.mean.norm())


def exact(decode: Decode, z: Tensor, grid: tuple[int, int], *, stride: int = 0, chunk: int = 32) -> Tensor:
    """Mean over z (B, N, r) of the decoder's self-block Jacobian, (D, r) float64.

    ``stride`` colours the grid: tokens ``stride`` apart in both directions move together in one pass, so that the cost
    is stride^2 r passes instead of N r. That is exact where the decoder does not reach across ``stride - 1`` tokens;
    0 moves each token alone, which is exact for every decoder. ``chunk`` columns are carried through one pass.
    """
    axes = torch.eye(z.shape[2], dtype=z.dtype, device=z.device)

    def column(mask: Tensor, axis: Tensor) -> Tensor:
        moved: Tensor = torch.func.jvp(decode, (z,), ((mask[:, None] * axis).expand_as(z),))[1]
        return (moved * mask[:, None]).sum((0, 1), dtype=torch.float64)

    masks = torch.stack(list(colours(grid, stride, z.device))).to(z.dtype)
    pairs = masks.repeat_interleave(z.shape[2], 0), axes.repeat(len(masks), 1)
    with _differentiable_attention():
        columns = torch.vmap(column, chunk_size=chunk)(*pairs)
    return columns.unflatten(0, (len(masks), -1)).sum(0).mT / (z.shape[0] * z.shape[1])


def colours(grid: tuple[int, int], stride: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Masks (N,) that part the tokens of the grid into sets whose members are ``stride`` apart; 0: one token each."""
    height, width = grid
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)[None]
    step_down, step_right = (stride or height), (stride or width)
    for down in range(min(step_down, height)):
        for right in range(min(step_right, width)):
            yield ((rows % step_down == down) & (columns % step_right == right)).flatten()


def stochastic(decode: Decode, z: Tensor, probes: int, generator: Generator) -> Estimate:
    """Unbiased estimate of the same mean from ``probes`` passes, with its standard error.

    Each pass moves every token by random signs d: E[(J d)_i d_i^T] = J_ii (Hutchinson 1990; blocks of a Jacobian). The
    error falls as 1 / sqrt(probes B N), whatever r and N, so it suits large decoders. Needs two probes or more.
    """
    samples = []
    for _ in range(probes):
        signs = torch.randint(0, 2, z.shape, generator=generator, device=generator.device).to(z) * 2 - 1
        with _differentiable_attention():
            moved = torch.func.jvp(decode, (z,), (signs,))[1]
        flat_moved, flat_signs = moved.flatten(0, 1).double(), signs.flatten(0, 1).double()
        samples.append(flat_moved.mT @ flat_signs / len(flat_signs))
    stacked = torch.stack(samples)
    return Estimate(stacked.mean(0), stacked.std(0) / probes**0.5)


def _differentiable_attention() -> AbstractContextManager[None]:
    """The fused attention kernels have no forward-mode derivative; the plain one has."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context
