"""What a closed-form readout adds at sampling time: a Gaussian prior of the texture, and a linear last step.

B  images    N = h w  tokens    D  pixel token width    r  rank of the basis    C  width of the features
h      what enters the out-projection                                        features      (B, N, C)
m      complement of the clean prediction, (I - P) x0_hat = W_c h             (the detail head: in the network's weights)
S      covariance of what m leaves over, S = Q diag(variance) Q^T             directions Q  (D, q)
f      3 x 3 neighbourhood of [h V, A^T x, 1] on the token grid, zero outside (B, N, w w (K + r + 1))
V      principal directions of h, where C is large; else V = I, K = C         reduction     (C, K)
R      last step: x0 = x0_hat + f R + texture                                 last          (w w (K + r + 1), D)
T      covariance of the texture, from S to what R leaves over                transport     (q, D)

The network sees only A^T x, so neither changes the latent trajectory: the prior moves the complement alone, and after
the last step nothing is asked any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from flux2pixel.asymflow.method import per_token

PREFIX = "readout."
# refine(x0_hat, x, sigma, final): the clean prediction with the readout's parts in it.
Refine = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


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
    """The tensors of a readout beside basis and scale; a part that was not fitted is None.

    ``basis`` is A (D, r). ``offset`` c (D,) is the pixel space's, see :class:`~flux2pixel.asymflow.codec.Codec`.
    """

    basis: Tensor
    offset: Tensor | None = None
    directions: Tensor | None = None
    variance: Tensor | None = None
    last: Tensor | None = None
    reduction: Tensor | None = None
    transport: Tensor | None = None

    def to(self, *args, **kwargs) -> Readout:
        """A copy with every tensor moved or cast as ``Tensor.to`` does."""
        named = {item.name: getattr(self, item.name) for item in fields(self)}
        return Readout(**{name: None if value is None else value.to(*args, **kwargs) for name, value in named.items()})

    def tensors(self) -> dict[str, Tensor]:
        """What is stored beside basis and scale, float32 by name."""
        named = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "basis"}
        return {PREFIX + name: value.float().contiguous() for name, value in named.items() if value is not None}

    @classmethod
    def from_tensors(cls, basis: Tensor, stored: Mapping[str, Tensor]) -> Readout | None:
        """The readout among the tensors of ``asymflow.safetensors``; None if there is none."""
        found = {name.removeprefix(PREFIX): value for name, value in stored.items() if name.startswith(PREFIX)}
        return cls(basis, **found) if found else None

    def texture(self, x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor | None:
        """E[e | x_c] along Q, (B, N, q): the posterior mean of e ~ N(0, S) given x_c = (1 - sigma)(m + e) + sigma eps.

        Exact: S (1 - sigma) [(1 - sigma)^2 S + sigma^2 I]^-1 (x_c - (1 - sigma) m), in the eigenbasis of S, whose
        directions lie in the complement, so that x_c and m need not be split off. None without a prior.
        """
        if self.directions is None or self.variance is None:
            return None
        sigma = per_token(sigma, x0)
        seen = (x.to(x0) - (1 - sigma) * x0) @ self.directions.to(x0)
        variance = self.variance.to(x0)
        return seen * ((1 - sigma) * variance / ((1 - sigma) ** 2 * variance + sigma**2))

    def prior(self, x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """x0_hat (B, N, D) with the expected texture of the complement, at noise levels ``sigma`` () or (B,)."""
        texture = self.texture(x0, x, sigma)
        if texture is None or self.directions is None:
            return x0
        return torch.addmm(x0.flatten(0, -2), texture.flatten(0, -2), self.directions.to(x0).mT).view_as(x0)

    def finish(self, x0: Tensor, x: Tensor, sigma: Tensor, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """The last clean prediction: the linear last step on ``features`` (B, N, C), and what texture it leaves over."""
        if self.last is None:
            return self.prior(x0, x, sigma)
        h = features.to(x0) if self.reduction is None else features.to(x0) @ self.reduction.to(x0)
        window = round((len(self.last) / (h.shape[-1] + self.basis.shape[1] + 1)) ** 0.5)
        found = x0 + local_features(h, x.to(x0) @ self.basis.to(x0), grid, window) @ self.last.to(x0)
        texture = self.texture(x0, x, sigma)
        if texture is None or self.directions is None:
            return found
        carried = self.directions.to(x0).mT if self.transport is None else self.transport.to(x0)
        return found + texture @ carried

    def bind(self, grid: tuple[int, int], features: Callable[[], Tensor]) -> Refine:
        """What a :class:`~flux2pixel.asymflow.denoiser.Denoiser` takes as ``readout``, for images of ``grid`` (h, w).

        ``features()`` is asked once, at the last evaluation, for the h of that evaluation, (B, N, C).
        """

        def refine(x0: Tensor, x: Tensor, sigma: Tensor, final: bool) -> Tensor:
            with torch.autocast(x0.device.type, enabled=False):
                if final and self.last is not None:
                    return self.finish(x0, x, sigma, features(), grid)
                return self.prior(x0, x, sigma)

        return refine
