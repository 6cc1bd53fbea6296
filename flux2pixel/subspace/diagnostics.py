"""How good a basis is, from the sums alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from flux2pixel.asymflow.denoiser import denoise
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.subspace.moments import Moments
from flux2pixel.subspace.solvers import procrustes, scale_of
from flux2pixel.subspace.strata import LEVELS, Strata

Fit = Callable[[Moments], tuple[Tensor, Tensor]]


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles in degrees between the spans of two orthonormal bases (D, r), smallest first.

    By sines of small angles, so that nearly equal subspaces give nearly zero (Knyazev and Argentati, 2002).
    """
    cosines = torch.linalg.svdvals(a.mT @ b).clamp(max=1)
    sines = torch.linalg.svdvals(b - a @ (a.mT @ b)).clamp(max=1).flip(0)
    return torch.where(cosines**2 > 0.5, sines.asin(), cosines.acos()).rad2deg()


def residual(basis: Tensor, scale: Tensor, moments: Moments) -> float:
    """Alignment residual ||X - s A Z||^2 / ||X||^2, from the sums."""
    total = moments.xx.trace()
    error = total - 2 * scale * (basis * moments.xz).sum() + scale**2 * moments.zz.trace()
    return float(error / total)


def energy(basis: Tensor, moments: Moments) -> float:
    """Captured energy trace(A^T G A) / trace(G)."""
    second = moments.xx
    return float(((second @ basis) * basis).sum() / second.trace())


def describe(basis: Tensor, scale: Tensor, moments: Moments) -> dict[str, float]:
    """Energies, scale and orthonormality error of a basis (D, any rank); float64 inputs.

    Where the rank is the latent's, also the alignment residual, and beside it the best one that any orthonormal basis
    reaches on these pairs with its own scale (Procrustes'), and the best of any linear map at all.
    """
    captured = energy(basis, moments)
    identity = torch.eye(basis.shape[1], dtype=basis.dtype)
    found = {
        "scale": float(scale),
        "captured_energy": captured,
        "complement_energy": 1 - captured,
        "orthonormality_error": float((basis.mT @ basis - identity).abs().max()),
    }
    if basis.shape[1] == moments.rank:
        best = residual(*procrustes(moments), moments)
        found["alignment_residual"] = residual(basis, scale, moments)
        found["procrustes_residual"] = best
        found["residual_over_procrustes"] = found["alignment_residual"] / max(best, 1e-12)
        found["residual_with_scale_of_images"] = residual(basis, scale_of(basis, moments), moments)
        linear = (moments.xz * torch.linalg.lstsq(moments.zz, moments.xz.mT).solution.mT).sum()
        found["linear_residual"] = float(1 - linear / moments.xx.trace())
    return found


def stability(strata: Strata, fit: Fit) -> dict[str, Any]:
    """What another draw of images would change.

    ``half_split_angle_deg``: largest and mean principal angle between the bases of two random halves.
    ``held_out_residual``: of each half's basis on the other half, averaged, beside ``halves_residual`` on its own.
    ``by_images``: the same basis from a random half, quarter, ... of the images: how many, its angles to the basis
    of all, and its residual on all. When the last rows no longer differ, more images change nothing.
    """
    found: dict[str, Any] = {"half_split_angle_deg": None, "by_images": []}
    halves, whole = [strata.half(0), strata.half(1)], strata.subset(0)
    if all(half.tokens > half.width for half in halves):
        fitted = [fit(half) for half in halves]
        angles = principal_angles(fitted[0][0], fitted[1][0])
        found["half_split_angle_deg"], found["half_split_mean_angle_deg"] = float(angles.max()), float(angles.mean())
        if fitted[0][0].shape[1] == whole.rank:
            pairs = zip(fitted, halves, strict=True)
            found["halves_residual"] = sum(residual(*one, half) for one, half in pairs) / 2
            crossed = zip(fitted, reversed(halves), strict=True)
            found["held_out_residual"] = sum(residual(*one, half) for one, half in crossed) / 2
    basis = fit(whole)[0] if whole.tokens else None
    for level in reversed(range(LEVELS)):
        some = strata.subset(level)
        if basis is not None and some.tokens > some.width:
            part, scale = fit(some)
            angles = principal_angles(part, basis)
            row = {"images": some.images, "angle_deg": float(angles.max()), "mean_angle_deg": float(angles.mean())}
            if part.shape[1] == whole.rank:
                row["residual"] = residual(part, scale, whole)
            found["by_images"].append(row)
    return found


def spectrum(moments: Moments) -> list[float]:
    """Eigenvalues of E[x x^T], largest first."""
    return (torch.linalg.eigvalsh(moments.xx).flip(0).clamp(min=0) / max(moments.tokens, 1)).tolist()


def latent_energy(basis: Tensor, moments: Moments) -> list[float]:
    """E[(a_k^T x)^2] of every basis vector, in the order of the latent's numbers."""
    return (((moments.xx @ basis) * basis).sum(0) / max(moments.tokens, 1)).tolist()


def recovery_error(basis: Tensor, scale: Tensor, seed: int = 0) -> float:
    """How exactly this basis obeys the residual-norm identity, relative, in float64.

    A network error e gives ||x0_hat - x0||^2 = s^2 (tau^2 ||P e||^2 + ||(I - P) e||^2): checked on random tokens.
    """
    flow = AsymFlow(basis.double(), scale.double())
    draw = Generator().manual_seed(seed)
    x0, eps, e = torch.randn(3, 8, 16, basis.shape[0], dtype=torch.float64, generator=draw)
    sigma = torch.linspace(0.02, 0.98, 8, dtype=torch.float64)
    x_t = torch.lerp(x0, eps, sigma[:, None, None])
    tau = flow.calibrate(sigma)[1]
    project = flow.basis @ flow.basis.mT
    # In latent units: the network's exact answer is the one whose recovery is x0.
    k = flow.calibrate(sigma)[0][:, None, None]
    exact_low = (x0 @ project / flow.scale - k * (x_t @ project)) / -tau[:, None, None]
    exact = exact_low - (x0 - x0 @ project) / flow.scale
    got = (denoise(flow, lambda inputs, time: exact + e, x_t, sigma) - x0).square().sum((1, 2))
    low = e @ project
    wanted = flow.scale**2 * (tau**2 * low.square().sum((1, 2)) + (e - low).square().sum((1, 2)))
    return float(((got - wanted) / wanted).abs().max())
