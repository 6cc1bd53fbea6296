"""Which device a process computes on, and in what dtype: decided once, by the command, and given downwards."""

from __future__ import annotations

import os

import torch

from flux2pixel.runtime.errors import UsageError

KINDS = ("cuda", "mps", "xpu", "cpu")  # in the order in which "auto" takes the first that is there


def count(kind: str) -> int:
    """How many devices of a kind this process could take; the CPU is always one."""
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "xpu":
        return torch.xpu.device_count() if torch.xpu.is_available() else 0
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return 1


def choose(name: str | None = None, float64: bool = False) -> torch.device:
    """The device of this process: ``auto`` (or None) takes CUDA, MPS, XPU or the CPU, the first that is there.

    Of several GPUs it is that of ``LOCAL_RANK`` (0 without a launcher). Raises UsageError for an unknown name, a kind
    that this machine lacks, and for more processes than GPUs. ``float64`` is for work in it, which MPS cannot do.
    """
    name = name or "auto"
    if name not in ("auto", *KINDS):
        raise UsageError(f"--device {name}: unknown; give auto, {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    kind = name if name != "auto" else next(kind for kind in KINDS if count(kind) and not (float64 and kind == "mps"))
    if float64 and kind == "mps":
        raise UsageError(f"--device {name}: this computes in float64, which it cannot; give cpu")
    if kind == "cpu":
        return torch.device("cpu")
    present, wanted = count(kind), int(os.environ.get("LOCAL_RANK", "0"))
    if not present:
        raise UsageError(f"--device {name}: PyTorch finds none on this machine; give auto, or cpu")
    if wanted >= present:
        raise UsageError(
            f"process {wanted} of this machine has no GPU: there are {present}; start {present} processes, "
            f"or use --device cpu"
        )
    return torch.device("mps") if kind == "mps" else torch.device(kind, wanted)


def describe(device: torch.device) -> str:
    """What a user calls it, such as ``cuda:0 (NVIDIA H100)``, or ``the CPU``."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "xpu":
        return f"{device} ({torch.xpu.get_device_name(device)})"
    return {"cpu": "the CPU", "mps": "the Apple GPU (MPS)"}.get(device.type, str(device))


def default_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype to load weights in that are ``stored`` in another: the same, where ``device`` computes in it.

    float64 is computed in float32; eight-bit weights, which nothing multiplies as they are, in bfloat16; float16 on the
    CPU, where it is slow and overflows, in float32.
    """
    if stored == torch.float64 or (stored == torch.float16 and device.type == "cpu"):
        return torch.float32
    return torch.bfloat16 if stored.itemsize == 1 else stored
