"""The perceptual term of the finetuning loss: LPIPS per pixel, gated by how much the variance reduction trusts a patch.

L_P = mean( w rms_c(lam) / max(sigma, sigma_min)^2 LPIPS(rgb(x0_hat), rgb(x0)) ); LPIPS (Zhang et al., 2018) is a map.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flux2pixel.asymflow.codec import Codec
from flux2pixel.runtime.errors import UsageError

WEIGHTS = "vgg16-397923af.pth"


def perceptual(
    network: Any,
    codec: Codec,
    x0: Tensor,
    x0_hat: Tensor,
    lam: Tensor,
    weight: Tensor,
    sigma: Tensor,
    grid: tuple[int, int],
    sigma_min: float = 0.05,
) -> Tensor:
    """The term, ().

    Args:
        network: LPIPS with ``spatial``: (image, image) in [-1, 1], (B, 3, H, W) -> distances (B, 1, H, W).
        codec: of the model's pixel space.
        x0, x0_hat: clean tokens and their prediction, (B, N, D), normalised Oklab.
        lam: (B, N, channels) and ``weight`` (B,), of the variance reduction.
        sigma: (B,).
        grid: (h, w) with h w = N.
    """
    height, width = (side * codec.patch for side in grid)
    pictures = (codec.decode(t.float(), height, width) * 2 - 1 for t in (x0_hat, x0))
    distance = network(*pictures)
    gate = lam.square().mean(-1).sqrt().unflatten(1, grid).unsqueeze(1)  # (B, 1, h, w)
    gate = F.interpolate(gate, scale_factor=codec.patch, mode="nearest")
    level = weight / sigma.clamp(min=sigma_min).square()
    return (level.view(-1, 1, 1, 1) * gate * distance).mean()


def weights_file() -> Path:
    """Where torchvision looks for VGG16's weights before it downloads them."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS


def load_lpips(device: torch.device | str = "cpu") -> Any:
    """LPIPS on VGG16, frozen. Its weights are looked up, else downloaded; UsageError with one clear line if neither."""
    try:
        import lpips
    except ImportError as error:
        raise UsageError(
            "finetune.perceptual needs lpips: pip install 'flux2pixel[train]', or set finetune.perceptual = 0"
        ) from error
    try:
        network = lpips.LPIPS(net="vgg", spatial=True, verbose=False)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"finetune.perceptual: VGG16's weights are not at {weights_file()} and cannot be downloaded ({error}); "
            f"copy {WEIGHTS} there, or set finetune.perceptual = 0"
        ) from error
    return network.to(device).eval().requires_grad_(False)
