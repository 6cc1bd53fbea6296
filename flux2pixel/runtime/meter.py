"""Memory measured without weights: operations run on fake tensors, and the storages that they make are counted."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive, while the mode is on.

    ``peak`` is the most of ``current`` minus what :meth:`exempt` took out, plus ``share`` of it: gradients, which a
    sharded training keeps only a part of.
    """

    def __init__(self, share: float = 1.0):
        super().__init__()
        self.share, self.current, self.exempted, self.peak = share, 0, 0, 0
        self._alive: dict[int, int] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Never count these: what was there before."""
        for tensor in (piece for whole in tensors for piece in pieces(whole)):
            self._alive.setdefault(tensor.untyped_storage()._cdata, 0)

    def exempt(self, tensor: Tensor) -> None:
        """Count a tensor at ``share`` from now on."""
        self.exempted += tensor.untyped_storage().nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.current += storage.nbytes()
        weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, round(self.current - (1 - self.share) * self.exempted))

    def _free(self, key: int) -> None:
        self.current -= self._alive.pop(key, 0)


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that one is made of: those of a quantised one, else itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from pieces(getattr(tensor, name))


def nbytes(module: nn.Module, recurse: bool = True) -> int:
    """Bytes of a module's parameters and buffers, those of the modules in it too if ``recurse``."""
    tensors = (*module.parameters(recurse), *module.buffers(recurse))
    return sum(piece.nbytes for tensor in tensors for piece in pieces(tensor))


def faked(network: Any, mode: FakeTensorMode, low: torch.dtype | None = None) -> Any:
    """Replace every meta tensor of ``network`` by a fake one that claims to be on the CPU, of dtype ``low`` if given.

    In place, parameters that are tied stay so; returns the network.
    """
    made: dict[int, nn.Parameter] = {}
    with mode:
        for module in network.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    if id(parameter) not in made:
                        empty = torch.empty(parameter.shape, dtype=low or parameter.dtype)
                        made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                    module._parameters[name] = made[id(parameter)]
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return network
