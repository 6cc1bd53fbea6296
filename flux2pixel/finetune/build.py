"""A training put together: the network, marked, sharded and compiled as the recipe says, its objective, its trainer."""

from __future__ import annotations

import torch
from torch import nn

from flux2pixel.finetune.network import parallel
from flux2pixel.finetune.network.quantise import quantise
from flux2pixel.finetune.network.trainable import prepare
from flux2pixel.finetune.prepare import Source
from flux2pixel.finetune.step.objective import LatentReference, Objective, SharedReference, Velocity
from flux2pixel.finetune.step.perceptual import load_lpips
from flux2pixel.finetune.step.trainer import Trainer
from flux2pixel.models import base as bases
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.processes import Team
from flux2pixel.runtime.progress import log


def build(recipe: Recipe, source: Source, team: Team) -> Trainer:
    """The trainer of a recipe on one of the team's processes; reads the weights."""
    settings, flow = recipe.finetune, source.flow.to(team.device)
    reference: Velocity | None = None
    if settings.loss == "variance-reduction" and settings.trainable == "full":
        # Before the trained network is read: of the two only this one is whole in host memory beside a sharded other.
        reference = LatentReference(source.base, _place(frozen(recipe), recipe, team))
    network = source.base.transformer
    groups = prepare(network, source.base, settings, recipe.seed)
    if settings.frozen_int8:
        quantise(network)
    if settings.checkpointing:
        network.enable_gradient_checkpointing()
    if settings.loss == "variance-reduction" and settings.trainable == "lora":
        reference = SharedReference(source.base, network, flow.basis)
    network = _place(network, recipe, team)
    lpips = load_lpips(team.device) if settings.perceptual else None
    objective = Objective(settings, source.base, flow, reference, lpips, source.stored.codec)
    return Trainer(recipe, network, groups, objective, team)


def frozen(recipe: Recipe) -> nn.Module:
    """The latent base of a full finetuning; read as it is stored, so that it never is in host memory in float32.

    Under bf16 its Linear weights are cast once, where autocast would at every call, to the same bits; all else, norms
    among it, is float32, as autocast has it.
    """
    if recipe.finetune.precision != "bf16":
        whole: nn.Module = bases.open_base(recipe.base, torch.float32).transformer
        return whole
    stored = bases.stored_dtype(bases.resolve(recipe.base) / "transformer")
    network: nn.Module = bases.open_base(recipe.base, stored).transformer
    for module in network.modules():
        dtype = torch.bfloat16 if isinstance(module, nn.Linear) else torch.float32
        module._apply(lambda tensor, dtype=dtype: tensor.to(dtype), recurse=False)
    return network


def _place(network: nn.Module, recipe: Recipe, team: Team) -> nn.Module:
    """Compile and shard ``network``, or move it to the device."""
    if recipe.finetune.compile:
        parallel.compile_blocks(network)
        if recipe.finetune.trainable == "lora":
            log("note: compiled on the CPU, a few small LoRA gradients differ from eager (benchmarks/compiled_step.py)")
    if team.mesh is None:
        return network.to(team.device)
    parallel.shard(network, team.mesh, recipe.finetune.precision)
    return network
