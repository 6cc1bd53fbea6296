"""Parallelism, outside the model: the processes of a run, and FSDP2 on the stock network.

``fully_shard`` is device-agnostic: NCCL on GPUs, gloo on CPU. The basis and the scale of the method are plain float32
tensors outside the network, so they are never sharded nor cast.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from flux2pixel.recipe import Finetune
from flux2pixel.runtime.device import choose
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.launch import launched, world_size

# Making a cache may take days; a collective that takes longer than the writing of a model is a dead process.
PATIENCE, TIMEOUT = timedelta(days=30), timedelta(hours=1)


class LeaderFailed(UsageError):
    """Raised in the other processes when the leading one could not start."""


@dataclass(frozen=True)
class Team:
    """The processes of this run as one of them sees it; ``mesh`` is None for a process alone."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes, in float64."""
        if self.mesh is None:
            return list(values)
        # NCCL reduces on the GPU, gloo on the CPU; float64 so that counts and flags stay exact.
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in order of rank."""
        if self.mesh is None:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.mesh is not None:
            dist.barrier()


def check_launch(gpus: int) -> None:
    """Raise UsageError if a launcher started another number of processes than ``gpus``; 1 says nothing."""
    if gpus not in (1, world_size()):
        raise UsageError(f"--gpus {gpus}: the launcher started {world_size()} processes; leave --gpus out under one")


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


@contextmanager
def team(settings: Finetune, prepare: Callable[[], object]) -> Iterator[Team]:
    """The process group of a launched run, left when the block ends; a process alone has none.

    ``prepare`` runs first, in the leading process alone, while the others wait for it however long it takes; what it
    raises is raised here, and the others leave with :class:`LeaderFailed`.
    """
    if not launched():
        prepare()
        yield Team(0, 1, choose())
        return
    store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
    _lead(store, rank, prepare)
    group = {"store": dist.PrefixStore("group", store), "rank": rank, "world_size": world}
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=TIMEOUT, **group)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=TIMEOUT, **group)
    try:
        yield Team(rank, world, device, mesh(device.type, world, settings.replicas))
    except SystemExit:  # all processes leave together
        dist.destroy_process_group()
        raise
    # After a failure the others may wait in a collective, and to take the group down would wait for them.
    dist.destroy_process_group()


def _lead(store: dist.Store, rank: int, prepare: Callable[[], object]) -> None:
    """Run ``prepare`` in process 0 and tell the others, through the store, how it went."""
    if rank:
        try:
            prepared = store.get("prepared") == b"yes"
        except dist.DistError:  # without torchrun's agent the leading process keeps the store, and takes it along
            prepared = False
        if not prepared:
            raise LeaderFailed("finetune: the leading process failed; its message says why")
        return
    try:
        prepare()
    except BaseException:
        store.set("prepared", "no")
        raise
    store.set("prepared", "yes")


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
