"""The asymmetric flow parameterisation: calibration, recovery, lift and projection (paper: Asymmetric Flow Models).

B  batch     N  tokens     D  pixel token width (3 p p)     r  latent token width
x_t   = (1 - sigma) x0 + sigma eps          (B, N, D)
A     basis, orthonormal columns            (D, r)
s     scale > 0
v     network output, an asymmetric velocity in latent units: P eps - x0 with P = A A^T
"""

from __future__ import annotations

import torch
from torch import Tensor


class AsymFlow:
    """A low-rank patch subspace and its scale; turns a latent flow network's output into pixel predictions.

    Args:
        basis: A, (D, r), orthonormal columns.
        scale: s > 0; a pixel patch is about ``s A z`` for the latent token z.
        sigma_min: floor of the noise level when a velocity is asked for (1e-4 for FLUX.2 klein).

    Tokens are (B, N, D) or (..., D); ``sigma`` is (B,) or broadcastable to the tokens. Recovery runs in float32, or in
    float64 for float64 tokens, whatever the autocast, and is differentiable.

    Raises:
        ValueError: if the basis is not a tall matrix with orthonormal columns, or the scale is not positive.
    """

    def __init__(self, basis: Tensor, scale: Tensor | float, *, sigma_min: float = 1e-4):
        if basis.ndim != 2 or basis.shape[0] < basis.shape[1]:
            raise ValueError(f"basis: shape {tuple(basis.shape)} is not (D, r) with D >= r")
        scale = torch.as_tensor(scale, dtype=basis.dtype, device=basis.device)
        if scale.numel() != 1 or not bool(scale > 0):
            raise ValueError(f"scale: {scale.tolist()} is not one positive number")
        identity = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
        error = (basis.mT @ basis - identity).abs().max().item()
        if not error < 1e-3:
            raise ValueError(f"basis: columns are not orthonormal, A^T A differs from I by {error:.1e}")
        self.basis, self.scale, self.sigma_min = basis, scale.reshape(()), sigma_min

    def to(self, *args, **kwargs) -> AsymFlow:
        """Return a copy with basis and scale moved or cast as ``Tensor.to`` does."""
        moved = object.__new__(AsymFlow)
        moved.basis, moved.scale = self.basis.to(*args, **kwargs), self.scale.to(*args, **kwargs)
        moved.sigma_min = self.sigma_min
        return moved

    def _constants(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        return self.basis.to(tokens.device, dtype), self.scale.to(tokens.device, dtype)

    def calibrate(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(k, tau)``, k = 1 / (s (1 - sigma) + sigma): the network is called at ``k x_t`` and time ``tau``."""
        sigma = sigma if sigma.dtype == torch.float64 else sigma.float()
        scale = self.scale.to(sigma)
        k = 1 / (scale * (1 - sigma) + sigma)
        return k, k * sigma

    def sigma_of(self, tau: Tensor) -> Tensor:
        """Invert the time map: sigma = s tau / (1 - tau + s tau)."""
        lifted = self.scale.to(tau) * tau
        return lifted / (1 - tau + lifted)

    def predict_x0(self, v: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Recover the clean tokens: x0_hat = s (P [(1 - tau) v + k x_t] - v)."""
        with torch.autocast(v.device.type, enabled=False):
            basis, scale = self._constants(x_t)
            v, x_t = v.to(basis.dtype), x_t.to(basis.dtype)
            k, tau = (per_token(c, x_t) for c in self.calibrate(sigma.to(basis.dtype)))
            seen = torch.addcmul(v, tau, v, value=-1).addcmul_(k, x_t)
            return torch.matmul(seen @ basis, basis.mT).sub_(v).mul_(scale)

    def velocity(self, v: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Recover the full velocity: u_hat = (x_t - x0_hat) / max(sigma, sigma_min)."""
        x0 = self.predict_x0(v, x_t, sigma)
        return (x_t.to(x0.dtype) - x0) / per_token(sigma.to(x0.dtype), x0).clamp(min=self.sigma_min)

    def lift(self, z: Tensor) -> Tensor:
        """Latent tokens (..., r) to the low-rank pixel tokens s A z, (..., D)."""
        basis, scale = self._constants(z)
        return scale * (z.to(basis.dtype) @ basis.mT)

    def project(self, x: Tensor) -> Tensor:
        """Pixel tokens (..., D) to latent coordinates A^T x / s, (..., r)."""
        basis, scale = self._constants(x)
        return (x.to(basis.dtype) @ basis) / scale


def per_token(value: Tensor, tokens: Tensor) -> Tensor:
    """View a (B,) value so that it broadcasts over (B, N, D) tokens."""
    return value.reshape(value.shape + (1,) * (tokens.ndim - value.ndim)) if value.ndim == 1 else value
