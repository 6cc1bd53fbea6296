"""Before a training: what it starts from, every mistake that can be found without a step, and the cache.

``prepare`` runs in one process, before any process group. ``compare`` says how a run differs from its checkpoint's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.data import encode
from flux2pixel.data.cache import Cache
from flux2pixel.families.configs import stock_config
from flux2pixel.finetune.network import checkpoint, export, parallel
from flux2pixel.finetune.network.trainable import lora_modules, optimizer_class
from flux2pixel.finetune.step.perceptual import load_lpips
from flux2pixel.finetune.watch.log import check_trackers
from flux2pixel.models import base as bases
from flux2pixel.models.base import Base
from flux2pixel.models.folder import PixelFolder, is_pixel_folder, read_folder
from flux2pixel.recipe import Recipe, as_dict
from flux2pixel.runtime import launch
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.progress import log


@dataclass(frozen=True)
class Source:
    """A converted folder: its base (for the network), the method's constants, and what identifies it."""

    folder: Path
    base: Base
    stored: PixelFolder
    digest: str

    @property
    def flow(self) -> AsymFlow:
        """The method's basis and scale."""
        return self.stored.flow

    @property
    def patch(self) -> int:
        """Pixels along the side of a token."""
        return self.stored.codec.patch


def open_source(folder: Path, recipe: Recipe) -> Source:
    """Open a converted folder without its weights. Raises UsageError if it is not one."""
    stored = read_folder(folder)
    # Frozen weights are read in the precision they are used in; trained ones become float32 later.
    settings = recipe.finetune
    half = settings.trainable == "lora" and settings.precision == "bf16"
    base = bases.open_base(folder, torch.bfloat16 if half else torch.float32)
    return Source(folder, base, stored, export.digest_of([stored.flow.basis, stored.flow.scale]))


def start(run: Path) -> Path:
    """What a training starts from where nothing is named: the run's readout if it has one, else its conversion."""
    return run / "readout" if is_pixel_folder(run / "readout") else run / "converted"


def open_data(recipe: Recipe, run: Path) -> Cache:
    """The finished cache of the recipe, without the images of ``data.exclude``."""
    return Cache(encode.cache_folder(recipe, run), exclude=recipe.data.exclude)


def prepare(recipe: Recipe, run: Path, model: Path | None = None, gpus: int = 1) -> None:
    """Find what is wrong and make the cache, sample prompts included: in one process, before any process group.

    Raises UsageError or Flux2PixelError with one line. Prints how the recipe differs from a checkpoint's.
    """
    settings = recipe.finetune
    parallel.check_world(settings, gpus)
    check_trackers(settings.trackers)
    optimizer_class(settings)
    source = open_source(model or start(run), recipe)
    if settings.trainable == "lora":
        with torch.device("meta"):
            network = source.base.network_class()(**stock_config(source.base.config))
        lora_modules(network, source.base, settings.lora_targets)
    if settings.perceptual:
        if settings.loss != "variance-reduction":
            raise UsageError("finetune.perceptual is gated by the variance reduction; set finetune.loss to that")
        load_lpips()
    encode.ensure(recipe, run, encode.open_encoders(recipe), launch.here(gpus))
    cache = open_data(recipe, run)
    if recipe.data.exclude:
        log(f"data.exclude: {cache.excluded} of {cache.excluded + len(cache)} images are left out")
    found = checkpoint.newest(run / "checkpoints")
    if found is not None:
        compare(found, recipe, identity(source, cache), gpus)


def identity(source: Source, cache: Cache) -> dict[str, str]:
    """What a checkpoint must be of, to be gone on from: this converted model, these images."""
    return {"model": source.digest, "data": cache.digest}


def compare(path: Path, recipe: Recipe, present: dict[str, str], world: int) -> None:
    """Say how this run differs from the checkpoint's; UsageError where it cannot go on from it."""
    manifest, settings = checkpoint.read_manifest(path), recipe.finetune
    if manifest["model"] != present["model"]:
        raise UsageError(f"{path}: is a checkpoint of another converted model; use another --run")
    if manifest["data"] != present["data"]:
        if not settings.accept_new_data:
            raise UsageError(
                f"{path}: is a checkpoint of another training cache; set finetune.accept_new_data = true to go on with "
                f"the present images, take single ones out by data.exclude, or use another --run"
            )
        log(f"data: other images than before step {manifest['step']}; accepted, as finetune.accept_new_data says")
    changes = _changes(manifest["recipe"], recipe)
    for key, before, now in changes:
        log(f"recipe: {key} was {before!r} at the checkpoint, is {now!r} now")
    if refused := [key for key, _, _ in changes if checkpoint.fixed(key, settings.accept_new_data)]:
        raise UsageError(
            f"{path}: is a checkpoint of another recipe ({', '.join(refused)}), and a run cannot go on under other "
            f"values of that; restore them or use another --run"
        )
    if changes:
        log(f"recipe: the recipe wins over the checkpoint from step {manifest['step']} on")
    if manifest["processes"] != world:
        again = "" if settings.micro_batch else "; batches are cut otherwise, as finetune.micro_batch = 0 says"
        log(
            f"finetune: the checkpoint is of {manifest['processes']} process(es), now {world}: resharded; sums of "
            f"gradients are taken in another order, so results agree to rounding, not bit by bit{again}"
        )


def _changes(stored: dict[str, Any], recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """Settings of a training that differ; keys that the checkpoint's recipe did not know yet are no difference."""
    sections = ("base", "seed", "data", "finetune")
    before, now = ({name: table[name] for name in sections} for table in (stored, as_dict(recipe)))
    return [change for change in checkpoint.differences(before, now) if checkpoint.known(before, change[0])]
