"""Bases from moments: procrustes, pca, random, and the VAE's Jacobian. All return A (D, r) and s in float64.

C = E[x z^T], G = E[x x^T]; polar(M) = U V^T of the thin SVD, the orthonormal matrix nearest to M.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from flux2pixel.subspace.moments import Moments


def polar(matrix: Tensor) -> Tensor:
    """The orthonormal polar factor U V^T of a tall matrix."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def scale_of(basis: Tensor, moments: Moments) -> Tensor:
    """s = sqrt(trace(A^T G A) / E||z||^2), which gives projected pixels and latents the same power."""
    return (((moments.xx @ basis) * basis).sum() / moments.zz.trace()).sqrt()


def procrustes(moments: Moments) -> tuple[Tensor, Tensor]:
    """A = polar(C), the orthonormal basis that minimises ||X - A Z||."""
    basis = polar(moments.xz)
    return basis, scale_of(basis, moments)


def pca(moments: Moments, rank: int) -> tuple[Tensor, Tensor]:
    """Top eigenvectors of the uncentred second moment; no alignment with latent axes, s = 1."""
    basis = torch.linalg.eigh(moments.xx).eigenvectors.flip(1)[:, :rank].contiguous()
    return basis, torch.ones((), dtype=torch.float64)


def haar(moments: Moments, rank: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """A Haar-random orthonormal basis of the same shape: the control."""
    gaussian = torch.randn(moments.xx.shape[0], rank, dtype=torch.float64, generator=generator)
    basis = polar(gaussian)
    return basis, scale_of(basis, moments)


@torch.no_grad()
def decoder_jacobian(
    decode: Callable[[Tensor], Tensor], prior: Callable[[], Tensor], *, width: float = 1.0, rounds: int = 8
) -> Tensor:
    """Mean self-block Jacobian of the decoder, smoothed: E[(f(z + d) - f(z - d)) d^T] / (2 width^2), d ~ N(0, width^2).

    ``decode`` maps latent tokens (B, N, r) to pixel tokens (B, N, D); ``prior()`` draws latent tokens. By Stein's
    lemma this is the Jacobian of the decoder convolved with a Gaussian; cross terms between tokens average out.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for _ in range(rounds):
        z = prior()
        step = width * torch.randn_like(z)
        change = decode(z + step) - decode(z - step)
        total = total + torch.einsum("bnd,bnr->dr", change.double(), step.double())
        count += z.shape[0] * z.shape[1]
    return total / (2 * width**2 * count)
