"""What a closed-form readout adds at sampling time: a Gaussian prior of the texture, and a linear last step.

B  images    N = h w  tokens    D  pixel token width    r  rank of the basis    C  width of the features
h      what enters the out-projection                                        features      (B, N, C)
m      complement of the clean prediction, (I - P) x0_hat = W_c h             (detail head: in the network's weights)
S      covariance of what m leaves over, S = Q diag(variance) Q^T             directions Q  (D, q)
f      3 x 3 neighbourhood of [h V, A^T x, 1] on the token grid, zero outside (B, N, w w (K + r + 1))
V      principal directions of h, where C is large; else V = I, K = C         reduction     (C, K)
R      last step: x0 = P x0_hat + f R + texture                                 last          (w w (K + r + 1), D)
T      covariance of the texture, from S to what R leaves over                transport     (q, D)

The network sees only A^T x, so neither changes the latent trajectory: the prior moves the complement alone, and after
the last step nothing is asked any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flux2pixel.asymflow.denoiser import Refine
from flux2pixel.asymflow.method import per_token

PREFIX = "readout."
# Share of the guidance that the last step's features get. All of it takes the picture away from true ones, none of it
# loses what the prompt asked for (benchmarks/readout.md).
LAST_STEP_GUIDANCE = 0.5


def neighbourhood(tokens: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Every token's ``window`` x ``window`` neighbours on the grid, (B, N, C) -> (B, N, C window window), zero outside.

    Channel by channel, each with its neighbours row by row, as ``torch.nn.functional.unfold`` orders them.
    """
    if window == 1:
        return tokens
    return F.unfold(tokens.mT.reshape(len(tokens), -1, *grid), window, padding=window // 2).mT


def local_features(h: Tensor, coordinates: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """f of features h (B, N, K), already reduced, and coordinates A^T x (B, N, r)."""
    one = torch.ones(*h.shape[:2], 1, dtype=h.dtype, device=h.device)
    return neighbourhood(torch.cat([h, coordinates.to(h), one], -1), grid, window)


@dataclass(frozen=True)
class Readout:
    """The tensors of parts 3 and 4 beside the basis A (D, r); a part that was not fitted is None.

    Part 1 is in the network's weights, part 2 in the :class:`~flux2pixel.asymflow.codec.Codec`.
    """

    basis: Tensor
    directions: Tensor | None = None
    variance: Tensor | None = None
    last: Tensor | None = None
    reduction: Tensor | None = None
    transport: Tensor | None = None

    def to(self, device: torch.device) -> Readout:
        """A copy on a device."""
        named: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        moved: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in named.items()}
        return Readout(**moved)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored beside basis and scale, float32 by name."""
        named = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "basis"}
        return {PREFIX + name: value.float().contiguous() for name, value in named.items() if value is not None}

    @staticmethod
    def push(guidance: float) -> float:
        """The scale at which the last step's features are guided, given that of the sampling."""
        return 1 + LAST_STEP_GUIDANCE * (guidance - 1)

    @classmethod
    def from_tensors(cls, basis: Tensor, stored: Mapping[str, Tensor]) -> Readout | None:
        """The readout among the tensors of ``asymflow.safetensors``; None if there is none."""
        found = {name.removeprefix(PREFIX): value for name, value in stored.items() if name.startswith(PREFIX)}
        return cls(basis, **found) if found else None

    def texture(self, x0: Tensor, x: Tensor, sigma: Tensor, final: bool = False) -> Tensor | None:
        """The texture along Q (B, N, q) given x_c = (1 - sigma)(m + e) + sigma eps, e ~ N(0, S); None without a prior.

        E[e | x_c] = S (1 - sigma) [(1 - sigma)^2 S + sigma^2 I]^-1 (x_c - (1 - sigma) m), in the eigenbasis of S, whose
        directions lie in the complement, so that x_c and m need not be split off. ``final``: where the flow from sigma
        to 0 ends, which has covariance S, as a sample of the texture has; the posterior mean would have less.
        """
        if self.directions is None or self.variance is None:
            return None
        sigma = per_token(sigma, x0)
        seen = (x.to(x0) - (1 - sigma) * x0) @ self.directions.to(x0)
        variance = self.variance.to(x0)
        total = (1 - sigma) ** 2 * variance + sigma**2
        return seen * ((variance / total).sqrt() if final else (1 - sigma) * variance / total)

    def prior(self, x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """x0_hat (B, N, D) with the expected texture of the complement, at noise levels ``sigma`` () or (B,)."""
        texture = self.texture(x0, x, sigma)
        if texture is None or self.directions is None:
            return x0
        return x0 + texture @ self.directions.to(x0).mT

    def finish(self, x0: Tensor, x: Tensor, sigma: Tensor, features: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """The last clean prediction: the linear last step on ``features`` (B, N, C), and what texture that leaves over.

        Raises ValueError if there is a last step and no features.
        """
        found = x0
        if self.last is not None:
            if features is None:
                raise ValueError("readout: the last step needs the network's features")
            h = features.to(x0) if self.reduction is None else features.to(x0) @ self.reduction.to(x0)
            window = round((len(self.last) / (h.shape[-1] + self.basis.shape[1] + 1)) ** 0.5)
            # Of the guided prediction only what the latent base has is kept: in the complement guidance would take the
            # picture away from true ones (benchmarks/readout.md).
            inside = (x0 @ self.basis.to(x0)) @ self.basis.to(x0).mT
            found = inside + local_features(h, x.to(x0) @ self.basis.to(x0), grid, window) @ self.last.to(x0)
        texture = self.texture(x0, x, sigma, final=True)
        if texture is None or self.directions is None:
            return found
        return found + texture @ (self.directions.mT if self.transport is None else self.transport).to(x0)

    def bind(self, grid: tuple[int, int], features: Callable[[int], Tensor]) -> Refine:
        """What a :class:`~flux2pixel.asymflow.denoiser.Denoiser` takes as ``readout``, for images of ``grid`` (h, w).

        ``features(B)`` is asked once, at the last evaluation, for the h of that evaluation, (B, N, C).
        """

        def refine(x0: Tensor, x: Tensor, sigma: Tensor, final: bool) -> Tensor:
            with torch.autocast(x0.device.type, enabled=False):
                if not final:
                    return self.prior(x0, x, sigma)
                return self.finish(x0, x, sigma, None if self.last is None else features(len(x)), grid)

        return refine
