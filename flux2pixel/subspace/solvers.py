"""Closed forms: bases from moments. All return A (D, r) and s in float64.

C = sum x z^T, G = sum x x^T; polar(M) = U V^T of the thin SVD, the orthonormal matrix nearest to M.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from flux2pixel.asymflow.linalg import polar as polar
from flux2pixel.subspace.moments import Moments


def scale_of(basis: Tensor, moments: Moments) -> Tensor:
    """s = sqrt(trace(A^T G A) / E||z||^2), which gives projected pixels and latents the same power."""
    return (((moments.xx @ basis) * basis).sum() / moments.zz.trace()).sqrt()


def procrustes(moments: Moments) -> tuple[Tensor, Tensor]:
    """A = polar(C), the orthonormal basis that minimises ||X - A Z||."""
    basis = polar(moments.xz)
    return basis, scale_of(basis, moments)


def pca(moments: Moments, rank: int, *, center: bool = False) -> tuple[Tensor, Tensor]:
    """Top eigenvectors of the second moment, about the mean if ``center``; no alignment with latent axes, s = 1.

    Each vector's largest entry is positive, so that a fit does not depend on the sign LAPACK happens to return.
    """
    vectors = torch.linalg.eigh(second_moment(moments, center=center)).eigenvectors.flip(1)[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).contiguous(), torch.ones((), dtype=torch.float64)


def second_moment(moments: Moments, *, center: bool = False) -> Tensor:
    """sum x x^T (D, D), about the mean of x if ``center``."""
    return moments.xx - torch.outer(moments.x, moments.x) / max(moments.tokens, 1) if center else moments.xx


def haar(width: int, rank: int, generator: Generator) -> Tensor:
    """A Haar-random orthonormal basis (D, r): the control."""
    return polar(torch.randn(width, rank, dtype=torch.float64, generator=generator))
