"""A GPU without one: tensors that claim to be on CUDA, refuse to meet any on the CPU, and hold no numbers.

What asks for a number is given ones; files are read and weights are loaded as real tensors, and moved by whoever moves
them on a real machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)


class Numbers(TorchFunctionMode):
    """Whoever asks a fake tensor for its numbers gets ones, and for its truth ``truth``.

    Autograd's engine wants a driver for each device, so a backward only gives every one of the ``trained`` parameters a
    gradient where it lies.
    """

    ASKS = (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.numpy, torch.Tensor.__float__, torch.Tensor.__bool__)

    trained: Sequence[torch.Tensor] = ()
    truth = True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.backward:
            assert args[0].requires_grad and args[0].device == CUDA
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
            return None
        if func in self.ASKS and isinstance(args[0], FakeTensor):
            if func is torch.Tensor.numpy:
                assert args[0].device.type == "cpu", "NumPy reads host memory"
            if func is torch.Tensor.__bool__:
                return self.truth
            with unset_fake_temporarily(), torch._C.DisableTorchFunction():
                return func(torch.ones(args[0].shape, dtype=args[0].dtype))
        return func(*args, **(kwargs or {}))


class Mode(FakeTensorMode):
    """Never asks a driver, whatever is said to be available."""

    avoid_device_init = True


def real(function):
    """The function outside the fake mode: it reads files."""

    def outside(*args, **options):
        with unset_fake_temporarily():
            return function(*args, **options)

    return outside


def pretend(patched: pytest.MonkeyPatch) -> None:
    """PyTorch says that there is one GPU."""
    patched.setattr(torch.cuda, "is_available", lambda: True)
    patched.setattr(torch.cuda, "device_count", lambda: 1)
    patched.setattr(torch.cuda, "get_device_name", lambda place: "some GPU")
    patched.setattr(torch.cuda, "max_memory_allocated", lambda place: 0)
    patched.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@contextmanager
def fake(numbers: Numbers) -> Iterator[Any]:
    """The fake mode; a module moved to the GPU gets fake parameters there."""
    swap = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with numbers, Mode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(swap)
