"""Parallelism, outside the model: FSDP2 on the stock network, over the processes of a run.

``fully_shard`` is device-agnostic: NCCL on GPUs, gloo on CPU. The basis and the scale of the method are plain float32
tensors outside the network, so they are never sharded nor cast.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from flux2pixel.recipe import Finetune
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.processes import Team


def unit(settings: Finetune, world: int) -> int:
    """Images of one process's forward."""
    return settings.micro_batch or settings.batch // world


def check_world(settings: Finetune, world: int) -> None:
    """Raise UsageError if the recipe is not meant for, or does not divide over, ``world`` processes."""
    if settings.processes not in (0, world):
        raise UsageError(
            f"finetune: {world} processes, but the recipe says finetune.processes = {settings.processes}; "
            f"launch that many, or set it to 0 for any"
        )
    if world % settings.replicas:
        raise UsageError(f"finetune: {world} processes do not divide into finetune.replicas = {settings.replicas}")
    each = unit(settings, world)
    if each == 0 or settings.batch % (each * world):
        raise UsageError(
            f"finetune: finetune.batch = {settings.batch} is not a multiple of {each or 1} images x {world} processes"
        )
    if settings.frozen_int8 and (world > 1 or settings.trainable != "lora"):
        raise UsageError("finetune: finetune.frozen_int8 is for a LoRA training in one process; turn it off")


def meshed(team: Team, replicas: int) -> Team:
    """``team`` with the mesh over which a network is sharded, as it is for a process alone."""
    return team if team.world == 1 else replace(team, mesh=mesh(team.device.type, team.world, replicas))


def mesh(device_type: str, world: int, replicas: int) -> DeviceMesh:
    """One axis to shard over; with ``replicas`` > 1 an outer one of full copies, whose gradients are all-reduced."""
    if replicas == 1:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def blocks(network: Any) -> list[nn.Module]:
    """The network's repeated blocks, by the class names that diffusers gives for compilation."""
    found = [module for module in network.modules() if type(module).__name__ in network._repeated_blocks]
    if not found:
        raise UsageError(f"finetune: {type(network).__name__} names no repeated blocks to shard; use one process")
    return found


def compile_blocks(network: Any) -> None:
    """Compile every block in place; one compilation serves all blocks of a class."""
    for block in blocks(network):
        block.compile()


def shard(network: Any, mesh: DeviceMesh, precision: str) -> None:
    """Shard ``network`` in place: every block is a unit that is gathered when needed, the rest is the root's.

    With ``bf16`` weights are gathered in bf16 and gradients are summed in float32. Inputs are not cast: autocast does
    that where it is safe, and noise levels must stay float32.
    """
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks(network):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)


def sync_gradients(network: nn.Module, wanted: bool) -> None:
    """Whether the next backward reduces gradients; only the last micro-batch of a step needs to."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(wanted)


def reshard(network: nn.Module) -> None:
    """Give up gathered weights: the root keeps its own after a forward, and then its parameters are not the shards."""
    if isinstance(network, FSDPModule):
        network.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
