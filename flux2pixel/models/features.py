"""The features of a network: what enters its out-projection, read beside an ordinary call."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor

from flux2pixel.families.base import Base


class Features:
    """While entered, keeps h of the network's last call.

    Args:
        base: whose family names the out-projection.
        network: the latent or the pixel transformer.
        tokens: N of the images; text or reference tokens after them are cut off.
    """

    def __init__(self, base: Base, network: Any, tokens: int):
        self._module = network.get_submodule(base.pixel_name(base.projections.output))
        self._tokens, self._seen, self._handle = tokens, None, None

    def __enter__(self) -> Features:
        self._handle = self._module.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._handle.remove()
        self._seen = None

    def _keep(self, module: Any, given: tuple[Any, ...]) -> None:
        self._seen = given[0]

    @property
    def h(self) -> Tensor:
        """h (B, N, C) of the last call, float32 or better; (2 B, N, C) where one call was both branches of guidance."""
        if self._seen is None:
            raise RuntimeError("features: the network has not been called")
        h = self._seen if self._seen.ndim == 3 else self._seen[None]
        return h[:, : self._tokens].to(h.dtype if h.dtype.itemsize == 8 else Tensor.float(h).dtype)

    def conditional(self, batch: int) -> Tensor:
        """h (B, N, C) of the conditional branch, which leads in a call of both."""
        return self.h[:batch]
