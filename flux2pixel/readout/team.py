"""The processes that share the images of a readout: none started here, only joined."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from flux2pixel.runtime import device, launch


@dataclass(frozen=True)
class Team:
    """This process's place among them, and its device."""

    rank: int
    world: int
    device: torch.device

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def join() -> Iterator[Team]:
    """The process group of a launched run, left when the block ends; a process alone has none."""
    world, place = launch.world_size(), torch.device(str(device.choose()))
    if world == 1:
        yield Team(0, 1, place)
        return
    dist.init_process_group("gloo")  # the sums are added in float64 on the CPU, once
    try:
        yield Team(launch.rank(), world, place)
    finally:
        dist.destroy_process_group()
