"""Which device a process computes on: chosen once, by its caller, and said aloud."""

from __future__ import annotations

import os

import torch


def choose() -> torch.device:
    """The GPU of this process (``LOCAL_RANK`` under torchrun, else the first), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def describe(device: torch.device) -> str:
    """What a user calls it, such as ``cuda:0 (NVIDIA H100)``, or ``the CPU``."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "the CPU"
