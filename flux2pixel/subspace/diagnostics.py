"""How good a basis is, from the moments alone."""

from __future__ import annotations

import torch
from torch import Tensor

from flux2pixel.subspace.moments import Moments


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles in degrees between the spans of two orthonormal bases (D, r), smallest first.

    By sines of small angles, so that nearly equal subspaces give nearly zero (Knyazev and Argentati, 2002).
    """
    cosines = torch.linalg.svdvals(a.mT @ b).clamp(max=1)
    sines = torch.linalg.svdvals(b - a @ (a.mT @ b)).clamp(max=1).flip(0)
    return torch.where(cosines**2 > 0.5, sines.asin(), cosines.acos()).rad2deg()


def describe(basis: Tensor, scale: Tensor, moments: Moments) -> dict[str, float]:
    """Captured energy, alignment residual ||X - sAZ||^2 / ||X||^2, scale, orthonormality error (float64 inputs)."""
    total = moments.xx.trace()
    captured = ((moments.xx @ basis) * basis).sum()
    cross = (basis * moments.xz).sum()
    residual = total - 2 * scale * cross + scale**2 * moments.zz.trace()
    identity = torch.eye(basis.shape[1], dtype=basis.dtype)
    return {
        "scale": float(scale),
        "captured_energy": float(captured / total),
        "complement_energy": float(1 - captured / total),
        "alignment_residual": float(residual / total),
        "orthonormality_error": float((basis.mT @ basis - identity).abs().max()),
    }


def spectrum(moments: Moments) -> list[float]:
    """Eigenvalues of E[x x^T], largest first."""
    return (torch.linalg.eigvalsh(moments.xx).flip(0).clamp(min=0) / max(moments.tokens, 1)).tolist()
