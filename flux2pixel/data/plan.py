"""What making a cache will need, before a weight is loaded: memory of a GPU and of the host.

The encoders are built from their configurations without weights, and one batch of pictures and one of captions run
through them on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from flux2pixel.data.buckets import Buckets
from flux2pixel.data.encode import text_length
from flux2pixel.models.base import Base
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.errors import UsageError
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
    count = max(1, recipe.data.text_tokens // text_length(base))
    captions = [f"a photo, number {number} of {count}" for number in range(count)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def images() -> None:
        base.encode(torch.rand(recipe.data.batch, 3, height, width))

    return [
        _measured(f"pictures, {recipe.data.batch} of {width} x {height}", base, mode, images, ("vae",)),
        _measured(f"captions, {count} of {text_length(base)} tokens", base, mode, lambda: base.text(captions)),
    ]


def _measured(
    name: str, base: Base, mode: FakeTensorMode, work: Callable[[], object], attributes: tuple[str, ...] = ()
) -> Pass:
    """Run ``work`` with encoders that have no weights: once to load them, once to be counted."""
    made: list[Any] = []

    def load(part: str, loader: Any, **options: Any) -> Any:
        if not part.startswith(("vae", "text_encoder")):
            return type(base).load(base, part, loader, **options)
        made.append(_empty(base, part, loader, options, mode))
        return made[-1]

    before = dict(base.__dict__)
    try:
        base.__dict__["load"] = load
        with mode:
            work()
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


def _empty(base: Base, part: str, loader: Any, options: dict[str, Any], mode: FakeTensorMode) -> Any:
    """The model of a sub-folder's configuration on fake tensors, in the dtype that it would be loaded in."""
    quiet_libraries()
    folder, dtype = base.folder / part, options.get("dtype", options.get("torch_dtype", torch.float32))
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with unset_fake_temporarily(), torch.device("meta"):
            if hasattr(loader, "load_config"):  # diffusers
                network = loader.from_config(loader.load_config(folder))
            else:
                network = loader(loader.config_class.from_pretrained(folder))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: has no readable configuration to plan with ({error})") from error
    finally:
        torch.set_default_dtype(default)
    return faked(network.eval(), mode)


def lines(recipe: Recipe, passes: list[Pass], gpus: int) -> list[str]:
    """The plan for a person."""
    rows = [f"plan: cache of {recipe.base}, {gpus} process{'es' * (gpus > 1)}, one pass after the other"]
    rows += [f"memory of a process (GiB){'':<23}{'weights':>9} {'batch':>9} {'peak':>9}"]
    rows += [f"  {p.name:<46}{p.weights / GIB:>9.3f} {p.added / GIB:>9.3f} {p.peak / GIB:>9.3f}" for p in passes]
    host = gpus * max(p.weights for p in passes)
    return [*rows, f"host memory (GiB): {host / GIB:.3f} while weights are read, and 1 a process for decoded pictures"]
