"""What making a cache will need, before a weight is loaded: memory of a GPU and of the host.

The encoders are built from their configurations without weights, and one batch of pictures and one of captions run
through them on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flux2pixel.data.buckets import Buckets
from flux2pixel.data.encode import text_length
from flux2pixel.models.base import Base, stored_dtype
from flux2pixel.models.text import empty_encoder, load_tokenizer
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.meter import Meter, faked
from flux2pixel.runtime.progress import quiet_libraries

GIB = 2**30


@dataclass(frozen=True)
class Pass:
    """One of the two passes over the images: bytes of its encoders' weights, and the most that a batch adds."""

    name: str
    weights: int
    added: int

    @property
    def peak(self) -> int:
        """The most at any time."""
        return self.weights + self.added


def plan_cache(recipe: Recipe, base: Base) -> list[Pass]:
    """The passes of a cache: pictures through the VAE, then captions through the text encoders.

    Raises UsageError if the base's folder lacks a configuration or the tokenizer.
    """
    sizes = Buckets(recipe.data.resolution, base.patch_size).sizes
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    length = text_length(base)
    count = max(1, recipe.data.text_tokens // length)
    captions = [f"a photo, number {number} of {count}" for number in range(count)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def images() -> None:
        base.encode(torch.rand(recipe.data.batch, 3, height, width))

    return [
        _measured(f"pictures, {recipe.data.batch} of {width} x {height}", base, mode, images, _vae(base, mode)),
        _measured(f"captions, {count} of {length} tokens", base, mode, lambda: base.text(captions), _text(base, mode)),
    ]


def _measured(name: str, base: Base, mode: FakeTensorMode, work: Callable[[], object], parts: dict[str, Any]) -> Pass:
    """Count what ``work`` holds with ``parts``, which have no weights, in the place of the base's own."""
    made = [part for value in parts.values() for part in (value.values() if isinstance(value, dict) else (value,))]
    made = [part for part in made if isinstance(part, nn.Module)]
    before = dict(base.__dict__)
    try:
        base.__dict__.update(parts)
        with mode:
            work()  # what a first call makes once is no part of every batch
            meter = Meter()
            for model in made:
                meter.ignore(model.parameters())
                meter.ignore(model.buffers())
            with meter:
                work()
    finally:
        base.__dict__.clear()
        base.__dict__.update(before)
    weights = sum(t.nbytes for model in made for t in (*model.parameters(), *model.buffers()))
    return Pass(name, weights, meter.peak)


def _vae(base: Base, mode: FakeTensorMode) -> dict[str, Any]:
    with torch.device("meta"):
        network = nn.Module.to(base.vae_class().from_config(base.vae_config), base.vae_dtype)
    return {"vae": faked(network.eval(), mode)}


def _text(base: Base, mode: FakeTensorMode) -> dict[str, Any]:
    quiet_libraries()
    parts: dict[str, Any] = {
        part: load_tokenizer(base.folder / part, kind) for part, kind in base.facts.tokenizers.items()
    }
    for part, encoder in base.facts.encoders.items():
        dtype = base.dtype or stored_dtype(base.folder / part)
        parts[part] = faked(empty_encoder(base.folder / part, encoder, dtype), mode)
    return {"text_parts": parts}


def lines(recipe: Recipe, passes: list[Pass], gpus: int) -> list[str]:
    """The plan for a person."""
    rows = [f"plan: cache of {recipe.base}, {gpus} process{'es' * (gpus > 1)}, one pass after the other"]
    rows += [f"memory of a process (GiB){'':<23}{'weights':>9} {'batch':>9} {'peak':>9}"]
    rows += [f"  {p.name:<46}{p.weights / GIB:>9.3f} {p.added / GIB:>9.3f} {p.peak / GIB:>9.3f}" for p in passes]
    host = gpus * max(p.weights for p in passes)
    return [*rows, f"host memory (GiB): {host / GIB:.3f} while weights are read, and 1 a process for decoded pictures"]
