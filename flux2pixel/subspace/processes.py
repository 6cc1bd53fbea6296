"""The processes that share the images of a fit: none started here, only joined (torchrun, accelerate launch)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from flux2pixel.data import Tally
from flux2pixel.runtime import device, launch
from flux2pixel.subspace.moments import Moments
from flux2pixel.subspace.strata import LEVELS, Strata


@dataclass(frozen=True)
class Processes:
    """This process's place among them, and its device."""

    rank: int
    world: int
    device: str

    def total(self, strata: Strata, tally: Tally) -> tuple[Strata, Tally]:
        """The sums and the tally of all processes, on every one of them."""
        if self.world == 1:
            return strata, tally
        whole = Strata(strata.width, strata.rank)
        for place in [(level, half) for level in range(LEVELS) for half in (0, 1)]:
            part = strata.parts.get(place, Moments.zeros(strata.width, strata.rank)).to("cpu")
            counts = torch.tensor([part.tokens, part.images])
            for tensor in (part.upper, part.total, counts):
                dist.all_reduce(tensor)
            part.tokens, part.images = counts.tolist()
            if part.images:
                whole.parts[place] = part
        tallies: list[Tally] = [tally] * self.world
        dist.all_gather_object(tallies, tally)
        merged = Tally(tally.limit)
        for one in tallies:
            merged.merge(one)
        return whole, merged

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined() -> Iterator[Processes]:
    """The process group of a launched run, left when the block ends; a process alone has none."""
    world = launch.world_size()
    place = str(device.choose())
    if world == 1:
        yield Processes(0, 1, place)
        return
    dist.init_process_group("gloo")  # the sums are added in float64 on the CPU, once
    try:
        yield Processes(launch.rank(), world, place)
    finally:
        dist.destroy_process_group()
