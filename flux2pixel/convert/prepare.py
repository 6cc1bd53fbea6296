"""From recipe and base to a plan: everything is checked here, and nothing is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.convert.extras import Extras
from flux2pixel.convert.plan import Plan, as_they_are, class_shapes, find_companions, fold_outputs, make_plan
from flux2pixel.families.configs import read_config, stock_config
from flux2pixel.models import base as bases
from flux2pixel.models.base import Base
from flux2pixel.models.folder import companion_parts
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.progress import log
from flux2pixel.weights import bfl
from flux2pixel.weights.adapter import BASIS, Adapter, merge, read_adapter
from flux2pixel.weights.checkpoint import Checkpoint, check_names, open_checkpoint
from flux2pixel.weights.write import Output

SAFETENSORS_DTYPES = {"keep": "keep", "bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True)
class Job:
    """What a conversion works from.

    ``latent`` is what is folded, ``flow`` what it is folded through (an adapter brings its own) and None while only a
    plan is wanted; ``exact`` says that the result must equal the latent model, which an adapter's does not.
    """

    base: Base
    latent: list[Output]
    plan: Plan
    flow: AsymFlow | None
    exact: bool


def prepare(recipe: Recipe, flow: AsymFlow | None, extras: Extras) -> Job:
    """Open the base, check its checkpoint against its class, and plan; without ``flow`` the plan cannot be run.

    Raises UsageError or Flux2PixelError naming everything wrong with the base, or with what ``extras`` names.
    """
    base = bases.open_base(_latent_base(recipe.base))
    source = extras.weights or base.folder / "transformer"
    checkpoint = _stock(open_checkpoint(source)) if extras.weights else open_checkpoint(source)
    check_names(source, checkpoint, class_shapes(base.network_class(), stock_config(base.config)))
    latent = as_they_are(checkpoint)
    for path, strength in extras.loras:
        latent = merge(latent, read_adapter(path), strength)
    adapter = read_adapter(extras.adapter) if extras.adapter else None
    if adapter:
        flow = _flow_of(adapter, base)
    outputs = fold_outputs(base, latent, flow.basis if flow else None)
    if adapter:
        outputs = merge(outputs, adapter)
        kept = [o.name for o in outputs if "in float64" in o.action]
        if kept:
            raise Flux2PixelError(f"{adapter.path}: no pixel-space adapter: it lacks {', '.join(kept)}")
    plan = make_plan(
        outputs,
        checkpoint,
        find_companions(base.folder, companion_parts(base.folder)),
        dtype=SAFETENSORS_DTYPES[recipe.convert.dtype],
        shard_bytes=int(recipe.convert.shard_size * 1e9),
        link=extras.link,
    )
    return Job(base, latent, plan, flow, adapter is None)


def _latent_base(name: str) -> str:
    """The latent base of a converted folder, which is what an adapter is applied to; any other name as it is."""
    described = Path(name) / "asymflow.json"
    if not described.is_file():
        return name
    if (Path(name) / "finetune.json").is_file():
        raise UsageError(f"base: {name} is a finetuned model, not a base; name the base it was made from")
    base = str(read_config(described)["base"])
    log(f"base: {name} was converted from {base}; its latent tensors are taken from there")
    return base


def _stock(checkpoint: Checkpoint) -> Checkpoint:
    """A single file under the stock class's names, whichever of the two namings it has."""
    if bfl.is_bfl(checkpoint.tensors):
        return replace(checkpoint, tensors=bfl.to_stock(checkpoint.tensors))
    plain = {name.removeprefix(bfl.PREFIX): stored for name, stored in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=plain)


def _flow_of(adapter: Adapter, base: Base) -> AsymFlow:
    if adapter.flow is None:
        raise UsageError(f"{adapter.path}: has no {BASIS}, so it is no pixel-space adapter; merge a LoRA with --lora")
    width, found = (base.token_width, base.latent_width), tuple(adapter.flow.basis.shape)
    if found != width:
        raise UsageError(f"{adapter.path}: its basis is {found}, the base needs {width}; it is for another base")
    return adapter.flow
