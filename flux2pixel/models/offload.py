"""What is larger than the accelerator: weights wait on the CPU and come when they are called, or are kept in 8 bits."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Literal

import torch
from torch import nn

from flux2pixel.runtime.errors import UsageError

Offload = Literal["model", "group", "sequential"]
"""Whole models as they are called, or layer by layer, by diffusers (group) or accelerate (sequential, the slowest)."""

Quantize = Literal["int8", "fp8"]
"""Weights of a transformer's Linear layers in 8 bits, a scale a row; what they are multiplied with stays as it is."""


def check(offload: Offload | None, quantize: Quantize | None, device: torch.device) -> None:
    """Raise UsageError for what ``device`` or the other setting makes no sense of."""
    if offload is not None and device.type == "cpu":
        raise UsageError(f"--offload {offload}: the device is the CPU, where all weights are already; leave it out")
    if quantize is not None and offload in ("group", "sequential"):
        raise UsageError(f"--quantize {quantize}: goes with --offload model or none, not with {offload}")


def offloaded(module: Any, how: Offload | None, device: torch.device) -> Any:
    """The module, which is on the CPU, so that its forward runs on ``device``; it is moved there without ``how``."""
    if how is None:
        return module.to(device)
    if how == "model":
        from accelerate import cpu_offload_with_hook

        module, hook = cpu_offload_with_hook(module, device)
        module.offload_hook = hook  # it stays until `rest`
    elif how == "group":
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(module, onload_device=device, offload_type="leaf_level")
    elif how == "sequential":
        from accelerate import cpu_offload

        cpu_offload(module, device)
    return module


def rest(modules: Iterable[Any]) -> None:
    """Send models offloaded whole back to the CPU: their turn is over."""
    for module in modules:
        if hook := getattr(module, "offload_hook", None):
            hook.offload()


def quantised(module: Any, how: Quantize, keep: Collection[str] = (), device: torch.device | None = None) -> Any:
    """The module with the weights of its Linear layers, but those named in ``keep``, in 8 bits; changed in place.

    With ``device`` each layer is moved there before it is quantised, so that no more than 8 bits of all are ever there.
    """
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerRow, quantize_
    except ImportError as error:
        raise UsageError(f"--quantize {how}: needs the package torchao; pip install 'flux2pixel[train]'") from error
    int8 = Int8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
    config = int8 if how == "int8" else Float8WeightOnlyConfig(set_inductor_config=False, granularity=PerRow())

    def chosen(layer: nn.Module, name: str) -> bool:
        return isinstance(layer, nn.Linear) and name not in keep

    for name, layer in module.named_modules():
        if chosen(layer, name):
            layer.register_forward_pre_hook(_cast)
    quantize_(module, config, chosen, device=device)
    return module


def _cast(layer: nn.Module, inputs: Any) -> Any:
    """What autocast does for other weights: torchao would compute, and answer, in the dtype that comes in."""
    kind = inputs[0].device.type
    return (inputs[0].to(torch.get_autocast_dtype(kind)),) if torch.is_autocast_enabled(kind) else inputs
