"""The exact test at the published widths: D = 768, the real rank, real heads, one block of each kind, random weights.

The families' unit tests prove the identities on tiny models; this runs them where sizes, and so rounding, are the real
ones. Prints one line of JSON per base: the largest absolute error of coupled Euler sampling in float64.

    python benchmarks/exact_at_full_width.py flux2-klein-4b sd3.5-medium
"""

from __future__ import annotations

import json
import sys
import time

import torch

from flux2pixel.asymflow.linalg import polar
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.convert.fold import exactness, fold
from flux2pixel.convert.plan import latent_config, pixel_config
from flux2pixel.families.known import KNOWN
from flux2pixel.models.base import Base, published

STEPS, GRID = 8, (3, 4)
KL = {"latent_channels": 16, "block_out_channels": [128, 256, 512, 512]}
VAE = {
    "Flux2Transformer2DModel": KL | {"latent_channels": 32, "patch_size": [2, 2]},
    "Flux3Transformer2DModel": KL | {"latent_channels": 32, "patch_size": [2, 2]},
    "QwenImageTransformer2DModel": {"z_dim": 16, "temperal_downsample": [False, True, True]},
}


@torch.no_grad()
def error(base: Base) -> tuple[float, int]:
    """Largest error of the identities, and the parameters of the shallow model."""
    generator = torch.Generator().manual_seed(0)
    config = base.shallow(latent_config(base))
    torch.set_default_dtype(torch.float64)
    latent = base.network_class()(**config).eval().requires_grad_(False)
    for parameter in latent.parameters():
        parameter.normal_(std=0.5 / parameter.shape[-1] ** 0.5, generator=generator)
    state = latent.state_dict()
    basis = polar(torch.randn(base.token_width, base.latent_width, generator=generator))
    flow = AsymFlow(basis, 1.7)
    with torch.device("meta"):
        pixel = base.network_class()(**pixel_config(base, config))
    pixel.load_state_dict(fold(state, basis, base.projections, base.pixel_name), assign=True)
    # What a constructor computes and does not save is the latent model's.
    pixel.eval().pos_embed = getattr(latent, "pos_embed", None) if base.family != "sd3" else pixel.pos_embed
    cond = base.random_conditioning(config, 2, generator)
    noise = torch.randn(2, GRID[0] * GRID[1], base.token_width, generator=generator)
    worst = exactness(
        lambda z, t: base.call(latent, z, t, cond, GRID),
        lambda x, t: base.call(pixel, x, t, cond, GRID),
        flow,
        noise,
        STEPS,
    )
    return worst, sum(p.numel() for p in latent.parameters())


def main() -> None:
    for alias in sys.argv[1:] or [
        "sd3.5-medium",
        "flux1-dev",
        "z-image",
        "qwen-image",
        "flux3-klein",
        "flux2-klein-4b",
    ]:
        begun = time.perf_counter()
        worst, parameters = error(published(KNOWN[alias]))
        record = {"base": alias, "error": worst, "parameters": parameters, "steps": STEPS, "tokens": GRID[0] * GRID[1]}
        print(json.dumps(record | {"seconds": round(time.perf_counter() - begun, 1)}), flush=True)


if __name__ == "__main__":
    main()
