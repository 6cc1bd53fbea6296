"""What a fit will cost, counted from shapes before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path

from flux2pixel.models.base import open_base
from flux2pixel.models.folder import read_folder
from flux2pixel.readout.sums import BINS
from flux2pixel.recipe import Recipe
from flux2pixel.weights.checkpoint import open_checkpoint

PEAK = 989e12  # FLOP/s of one H100 in dense bf16
SHARE = 0.4  # of that peak, which a frozen forward reaches
FLOAT64 = 40e12  # FLOP/s of one H100's float64 matrix products, as they come out
TEXT_TOKENS = 512
FEATURE_TOKENS = 20  # tokens a feature of the last step, for a fit that is not optimistic


def lines(recipe: Recipe, source: Path) -> list[str]:
    """Time, memory and images of a fit to the converted folder ``source``, a line each."""
    settings, pixel, stored = recipe.readout, open_base(source), read_folder(source)
    tensors = open_checkpoint(source / "transformer").tensors
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    channels = tensors[f"{pixel.pixel_name(pixel.projections.output)}.weight"].shape[1]
    width, rank = stored.flow.basis.shape
    kept = min(channels, settings.directions)
    features = settings.window**2 * (kept + rank + 1)
    last, level = features + rank + width + channels, channels + 1 + rank + width
    side = settings.resolution or round((stored.sampler.height * stored.sampler.width) ** 0.5)
    tokens = (side // stored.codec.patch) ** 2
    forward = 2 * 2 * parameters * (tokens + TEXT_TOKENS)  # an image is seen at two noise levels
    products = tokens * (last**2 + level**2)  # a triangle each, multiply and add
    seconds = settings.images * (forward / (SHARE * PEAK) + products / FLOAT64)
    sums = 8 * 2 * (last**2 + (len(BINS) - 1) * level**2)
    weights = sum(tensor.size for tensor in tensors.values())
    wanted = -(-FEATURE_TOKENS * features // tokens)
    flops, solve = settings.images * forward, 24 * last**2
    return [
        f"network  {parameters / 1e9:.3g} billion parameters, features {channels} wide",
        f"last     {features} features: {settings.window} x {settings.window} of ({kept} directions, {rank}, 1)",
        f"memory   {weights / 1e9:.3g} GB of weights, {sums / 1e9:.3g} GB of sums, {solve / 1e9:.3g} GB to solve",
        f"images   {settings.images} of {side} x {side}; at least {wanted} for {FEATURE_TOKENS} tokens a feature",
        f"time     {_time(seconds)} on one H100: {flops:.2g} FLOP at {SHARE:.0%} of its peak,"
        f" {settings.images * products:.2g} of sums",
    ]


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
