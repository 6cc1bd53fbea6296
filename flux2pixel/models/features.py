"""The features of a network: what enters its out-projection, read beside an ordinary call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flux2pixel.models.base import Base


class Features:
    """A context in which h of the network's last call is kept.

    Args:
        base: whose family names the out-projection.
        network: the latent or the pixel transformer.
        tokens: N of the images; the tokens of text or references that follow them are cut off.
    """

    def __init__(self, base: Base, network: Any, tokens: int):
        name = base.projections.output
        modules = dict(network.named_modules())
        # A latent network has the module by its own name, a pixel network by the family's name for it.
        self._module = modules[name] if name in modules else modules[base.pixel_name(name)]
        self._tokens, self._seen = tokens, list[tuple[Tensor, Tensor]]()

    def __enter__(self) -> Features:
        self._seen.clear()
        self._handle = self._module.register_forward_hook(self._keep)
        return self

    def __exit__(self, *failure: object) -> None:
        self._handle.remove()

    def _keep(self, module: Any, given: tuple[Any, ...], made: Tensor) -> None:
        self._seen.append((given[0].detach()[:, : self._tokens], made.detach()[:, : self._tokens]))

    def align(self, *branches: Tensor | None) -> None:
        """Put h into the order of the images, after the call that gave these v (B, N, D), one branch after the other.

        A family whose network takes texts of one length at a time (FLUX.3) calls it several times for one batch.
        """
        if len(self._seen) > 1:
            h, made = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
            v = torch.cat([branch for branch in branches if branch is not None])
            rows = torch.stack([(made - one.to(made)).flatten(1).abs().amax(1).argmin() for one in v])
            self._seen[:] = [(h[rows], made[rows])]

    @property
    def h(self) -> Tensor:
        """h (B, N, C) of the last call, float32 or float64; of both branches of guidance, (2 B, N, C), if it had both.

        Raises RuntimeError if there was none.
        """
        if not self._seen:
            raise RuntimeError("features: the network was not called")
        h = torch.cat([h for h, _ in self._seen])
        return h if h.dtype == torch.float64 else h.float()

    def guided(self, count: int, scale: float) -> Tensor:
        """h (B, N, C) of the ``count`` images, guided by ``scale``; 1, or a call of one branch: as they are."""
        h = self.h
        return h if len(h) == count else h[count:] + scale * (h[:count] - h[count:])
