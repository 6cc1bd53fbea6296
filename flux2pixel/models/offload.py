"""What is larger than the accelerator: weights wait on the CPU and come when they are called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch

Offload = Literal["model", "group", "sequential"]
"""Whole models as they are called, blocks of a model, or single layers: less memory and less speed in this order."""


def offloaded(module: Any, how: Offload | None, device: torch.device) -> Any:
    """The module, which is on the CPU, so that its forward runs on ``device``; as it is without ``how``."""
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
