"""From recipe and base to a plan: everything is checked here, and nothing is written."""

from __future__ import annotations

from dataclasses import dataclass

from flux2pixel import bases
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.bases.base import Base, stock_config
from flux2pixel.convert.checkpoint import Checkpoint, check_names, open_checkpoint
from flux2pixel.convert.extras import Extras
from flux2pixel.convert.folder import companion_parts
from flux2pixel.convert.plan import Plan, as_they_are, class_shapes, find_companions, fold_outputs, make_plan
from flux2pixel.convert.write import Output
from flux2pixel.recipe import Recipe

SAFETENSORS_DTYPES = {"keep": "keep", "bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True)
class Job:
    """What a conversion works from: the base, its checkpoint, the latent tensors to fold, and the plan."""

    base: Base
    checkpoint: Checkpoint
    latent: list[Output]
    plan: Plan


def prepare(recipe: Recipe, flow: AsymFlow | None, extras: Extras) -> Job:
    """Open the base, check its checkpoint against its class, and plan; without ``flow`` the plan cannot be run.

    Raises UsageError or Flux2PixelError naming everything wrong with the base.
    """
    base = bases.open_base(recipe.base)
    source = base.folder / "transformer"
    checkpoint = open_checkpoint(source)
    check_names(source, checkpoint, class_shapes(base.network_class(), stock_config(base.config)))
    latent = as_they_are(checkpoint)
    plan = make_plan(
        fold_outputs(base, latent, flow.basis if flow else None),
        checkpoint,
        find_companions(base.folder, companion_parts(base.folder)),
        dtype=SAFETENSORS_DTYPES[recipe.convert.dtype],
        shard_bytes=int(recipe.convert.shard_size * 1e9),
        link=extras.link,
    )
    return Job(base, checkpoint, latent, plan)
