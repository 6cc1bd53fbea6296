"""What making a cache will need, before a weight is loaded: memory of a GPU and of the host."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flux2pixel.data.buckets import Buckets
from flux2pixel.models.base import Base
from flux2pixel.models.plan import Pass, empty_vae, measured, plan_text
from flux2pixel.recipe import Recipe


def plan_cache(recipe: Recipe, base: Base) -> list[Pass]:
    """The passes of a cache: pictures through the VAE, then captions through the text encoders.

    Raises UsageError if the base's folder lacks a configuration or the tokenizer.
    """
    sizes = Buckets(recipe.data.resolution, base.patch_size).sizes
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def images() -> None:
        base.encode(torch.rand(recipe.data.batch, 3, height, width))

    name = f"pictures, {recipe.data.batch} of {height} x {width}"
    return [
        measured(name, base, mode, images, {"vae": empty_vae(base, mode)}),
        plan_text(base, recipe.data.text_tokens, recipe.data.text_tokens),
    ]
