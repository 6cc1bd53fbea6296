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
        self._tokens, self._seen = tokens, None

    def __enter__(self) -> Features:
        self._handle = self._module.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *failure: object) -> None:
        self._handle.remove()

    def _keep(self, module: Any, given: tuple[Any, ...]) -> None:
        self._seen = given[0].detach()

    @property
    def h(self) -> Tensor:
        """h (B, N, C) of the last call, float32 or float64; of both branches of guidance, (2 B, N, C), if it had both.

        Raises RuntimeError if there was none.
        """
        if self._seen is None:
            raise RuntimeError("features: the network was not called")
        h: Tensor = self._seen[:, : self._tokens]
        return h if h.dtype == torch.float64 else h.float()

    def conditional(self, count: int) -> Tensor:
        """h (B, N, C) of the conditional branch, the first ``count`` images of the call."""
        return self.h[:count]
