"""Folding a basis into the in- and out-projection, and the exact test that the result is the same model.

W_in' = W_in A^T    (inner, D)        W_out' = A W_out    (D, inner)        b_out' = A b_out    (D,)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flux2pixel.asymflow.denoiser import Denoiser
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.asymflow.solvers import sample
from flux2pixel.families.base import Order, Projections
from flux2pixel.runtime.errors import UsageError

Network = Callable[[Tensor, Tensor], Tensor]
RGB = 3  # channels of a pixel token
LATENT_PATCH = 2  # latents along the side of a token, in every family whose Linear wants ph,pw,c


def fold_in(weight: Tensor, basis: Tensor, order: Order = "c,ph,pw") -> Tensor:
    """W_in' = W_in A^T of a Linear (inner, r) -> (inner, D), or of a convolution (inner, c, p, p) -> (inner, 3, P, P).

    ``basis`` is A, (D, r), in c,ph,pw order on both sides; ``order`` is how the Linear flattens a token, before and
    after. The product is in float64, the result in the weight's dtype. Raises UsageError if the rank does not fit.
    """
    _check_rank(weight[0].numel(), basis)
    rows = weight.flatten(1).double()
    if order == "ph,pw,c":
        rows = rows[:, _channel_first(rows.shape[1], LATENT_PATCH)]
    wide = rows @ basis.double().to(weight.device).mT
    side = math.isqrt(basis.shape[0] // RGB)
    if order == "ph,pw,c":
        wide = wide[:, _channel_first(basis.shape[0], side).argsort()]
    if weight.ndim == 4:
        wide = wide.unflatten(1, (RGB, side, side))
    return wide.to(weight.dtype).contiguous()


def fold_out(tensor: Tensor, basis: Tensor, order: Order = "c,ph,pw") -> Tensor:
    """W_out' = A W_out, (r, inner) -> (D, inner), and b_out' = A b_out, (r,) -> (D,); orders and dtypes as above."""
    _check_rank(len(tensor), basis)
    rows = tensor.double()
    if order == "ph,pw,c":
        rows = rows[_channel_first(len(rows), LATENT_PATCH)]
    wide = basis.double().to(tensor.device) @ rows
    if order == "ph,pw,c":
        wide = wide[_channel_first(len(wide), math.isqrt(len(wide) // RGB)).argsort()]
    return wide.to(tensor.dtype).contiguous()


def folded_names(projections: Projections) -> frozenset[str]:
    """Names, in the latent checkpoint, of the tensors that folding changes; biases are absent in some families."""
    output = projections.output
    return frozenset({f"{name}.weight" for name in projections.inputs} | {f"{output}.weight", f"{output}.bias"})


def fold_tensor(name: str, tensor: Tensor, basis: Tensor, projections: Projections) -> Tensor:
    """Fold the tensor that the latent checkpoint calls ``name``; one that folding does not concern comes back as is."""
    if name not in folded_names(projections):
        return tensor
    if name.rpartition(".")[0] == projections.output:
        return fold_out(tensor, basis, projections.output_order)
    return fold_in(tensor, basis, projections.input_order)


def fold(
    state: Mapping[str, Tensor], basis: Tensor, projections: Projections, rename: Callable[[str], str] = str
) -> dict[str, Tensor]:
    """The state dict of the pixel model; ``rename`` is the family's ``pixel_name``."""
    return {rename(name): fold_tensor(name, tensor, basis, projections) for name, tensor in state.items()}


def _channel_first(width: int, side: int) -> Tensor:
    """The permutation that takes a (side, side, c) token of ``width`` numbers to c,ph,pw: ``first = last[index]``."""
    return torch.arange(width).view(side, side, -1).permute(2, 0, 1).flatten()


def _check_rank(width: int, basis: Tensor) -> None:
    if width != basis.shape[1]:
        raise UsageError(
            f"subspace: rank {basis.shape[1]} does not fit the base, whose latent tokens have {width} numbers"
        )


class Float64Throughout(TorchFunctionMode):
    """While active, float64 tensors stay float64 where a network would cast them to float32.

    Stock classes do so in rotary embeddings, time embeddings and norms, to be safe in half precision. In float64 it
    turns a difference in the last bit into one of 1e-8 wherever a value lies next to a rounding boundary of float32,
    so that the exact test would measure luck.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.float, Tensor.to) and args[0].dtype == torch.float64:
            args = tuple(arg for arg in args if arg is not torch.float32)
            kwargs = {name: value for name, value in kwargs.items() if value is not torch.float32}
            if func is Tensor.float or not (args[1:] or kwargs):
                return args[0]
        return func(*args, **kwargs)


@torch.no_grad()
def exactness(
    latent: Network,
    pixel: Network,
    flow: AsymFlow,
    noise: Tensor,
    steps: int,
    on_step: Callable[[], object] = lambda: None,
) -> float:
    """Sample both models from coupled noise on matched grids; return the largest absolute error of the identities.

    ``latent(z, tau)`` and ``pixel(x, tau)`` are the two networks on tokens; ``noise`` is eps, (B, N, D) float64, on the
    networks' device. After every Euler step A^T x = z / k and (I - P) x = sigma (I - P) eps must hold (AsymFlow's
    acceptance test); then ``on_step`` is called.
    """
    with Float64Throughout():
        return _exactness(latent, pixel, flow.to(noise.device), noise, steps, on_step)


def _exactness(
    latent: Network, pixel: Network, flow: AsymFlow, noise: Tensor, steps: int, on_step: Callable[[], object]
) -> float:
    basis, scale = flow.basis.to(noise.dtype), flow.scale.to(noise.dtype)
    taus = torch.linspace(1, 0, steps + 1, dtype=noise.dtype, device=noise.device)
    sigmas = flow.sigma_of(taus)
    off_plane = noise - (noise @ basis) @ basis.mT
    z, worst = noise @ basis, 0.0

    def check(i: int, x: Tensor) -> Tensor:
        nonlocal z, worst
        z = z + (taus[i + 1] - taus[i]) * latent(z, taus[i].expand(len(z)))
        k_next = 1 / (scale * (1 - sigmas[i + 1]) + sigmas[i + 1])
        inside = (x @ basis - z / k_next).abs().max()
        outside = (x - (x @ basis) @ basis.mT - sigmas[i + 1] * off_plane).abs().max()
        worst = max(worst, inside.item(), outside.item())
        on_step()
        return x

    sample(Denoiser(lambda inputs, time: (pixel(inputs, time), None), flow), noise, sigmas, on_step=check)
    return worst
