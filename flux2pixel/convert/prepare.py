"""From recipe and base to a plan: everything is checked here, from headers alone, and nothing is written.

The plan of a base on the Hub can be made without downloading its weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.convert.plan import Plan, as_they_are, class_shapes, find_companions, fold_outputs, make_plan
from flux2pixel.families import registry
from flux2pixel.families.configs import read_config
from flux2pixel.families.known import KNOWN
from flux2pixel.models.base import Base, open_base
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.progress import log
from flux2pixel.weights import bfl
from flux2pixel.weights.adapter import BASIS, Adapter, merge, read_adapter
from flux2pixel.weights.checkpoint import Checkpoint, check_names, open_checkpoint
from flux2pixel.weights.remote import Remote, open_remote
from flux2pixel.weights.write import Output

SAFETENSORS_DTYPES = {"keep": "keep", "bf16": "BF16", "fp16": "F16", "fp32": "F32"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Extras:
    """What changes a conversion beyond its recipe.

    Args:
        link: share unchanged weight files with the base by hard links.
        weights: a single file to take the transformer's tensors from, in diffusers' or Black Forest Labs' names.
        loras: LoRA files to merge into the latent weights before the fold, with their strengths.
        adapter: a pixel-space adapter with a basis of its own, in the released format.
    """

    link: bool = False
    weights: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    adapter: Path | None = None


@dataclass(frozen=True)
class Job:
    """What a conversion works from.

    ``checkpoint`` has the latent tensors as they are stored, ``latent`` what is folded (LoRA merged), ``outputs`` what
    becomes of each, ``flow`` what they are folded through (an adapter brings its own), None while only a plan is
    wanted; ``loras`` with their strengths and the ``adapter`` are what changes tensors beside the fold.
    """

    base: Base
    checkpoint: Checkpoint
    latent: list[Output]
    outputs: list[Output]
    plan: Plan
    flow: AsymFlow | None
    loras: tuple[tuple[Adapter, float], ...] = ()
    adapter: Adapter | None = None


def prepare(recipe: Recipe, flow: AsymFlow | None, extras: Extras, *, fetch: bool = True) -> Job:
    """Open the base, check its checkpoint against its class, and plan; without ``flow`` the plan cannot be run.

    Without ``fetch`` the weights of a base on the Hub are not downloaded: their headers are read there.
    Raises UsageError or Flux2PixelError naming everything wrong with the base, or with what ``extras`` names.
    """
    name = _latent_base(recipe.base)
    remote = None if fetch else _on_hub(name)
    base = open_base(name, parts=()) if remote else open_base(name)
    source = extras.weights or base.folder / "transformer"
    if extras.weights:
        checkpoint = _stock(open_checkpoint(source))
    else:
        checkpoint = remote.checkpoint() if remote else open_checkpoint(source)
    check_names(source, checkpoint, class_shapes(base.network_class(), base.config))
    latent = as_they_are(checkpoint)
    loras = tuple((read_adapter(path, base.family), strength) for path, strength in extras.loras)
    for lora, strength in loras:
        latent = merge(latent, lora, strength)
    adapter = read_adapter(extras.adapter, base.family) if extras.adapter else None
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
        find_companions(base, remote.sizes if remote else None),
        dtype=SAFETENSORS_DTYPES[recipe.convert.dtype],
        shard_bytes=int(recipe.convert.shard_size * 1e9),
        link=extras.link,
        remote=remote is not None,
    )
    return Job(base, checkpoint, latent, outputs, plan, flow, loras, adapter)


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


def _on_hub(name: str) -> Remote | None:
    """The files of a base that is on the Hub and in no folder here; None where it is local or cannot be listed.

    What the Hub refuses, and a Hub that cannot be reached, is for the download to explain, or to answer from its cache.
    """
    from huggingface_hub.errors import HfHubHTTPError

    plain, at, revision = name.partition("@")
    known = KNOWN.get(plain)
    repo = known.hub + at + revision if known and not known.refused else name
    if plain in registry.names() or Path(name).exists() or not HUB_ID.fullmatch(repo):
        return None
    try:
        return open_remote(repo)
    except (HfHubHTTPError, OSError) as error:
        log(f"base: {repo}: the Hub cannot be asked ({next(iter(str(error).splitlines()), 'no reason given')})")
        return None


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
