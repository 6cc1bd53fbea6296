"""How fast a training is against what its device could do: operations of a step, and the peaks of devices."""

from __future__ import annotations

import torch
from torch import nn

from flux2pixel.data.cache import Batch
from flux2pixel.recipe import Finetune

# Dense bf16 operations a second, as the makers state them; the first name that is in the device's counts.
PEAKS = {
    "B200": 2.25e15,
    "GH200": 9.89e14,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100": 9.89e14,
    "A100": 3.12e14,
    "L40S": 3.62e14,
    "RTX 5090": 2.09e14,
    "RTX 4090": 1.65e14,
    "RTX 3090": 7.1e13,
}


def peak(device: torch.device) -> float | None:
    """Dense bf16 operations a second of the device; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for known, rate in PEAKS.items() if known in name), None)


def forwards(settings: Finetune) -> float:
    """What a step costs, in forwards of the network: backward is two more, one where weights are frozen; reference one.

    Recomputing activations is no useful work and is not counted.
    """
    trained = 2 if settings.trainable == "lora" else 3
    return trained + (settings.loss == "variance-reduction")


def operations(network: nn.Module, settings: Finetune, batch: Batch) -> float:
    """Of a step on ``batch``: 2 a weight and token (text too), attention between tokens left out."""
    weights = sum(p.numel() for p in network.parameters() if p.ndim > 1)
    text = batch.conditioning.get("text")
    tokens = batch.grid[0] * batch.grid[1] + (0 if text is None else text.shape[1])
    return 2.0 * weights * tokens * len(batch.rgb) * forwards(settings)
