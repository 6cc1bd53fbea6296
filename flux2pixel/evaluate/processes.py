"""Several processes that share the work: which one this is, and waiting for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from flux2pixel.runtime.launch import rank, world_size

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # for the slowest process; a dead one is noticed by torchrun, not by this


@dataclass(frozen=True)
class Processes:
    """This process' place among those that torchrun started; (0, 1) without it."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """Every world-th piece of work."""
        return list(work[self.rank :: self.world])

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.world == 1:
            return
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)
        dist.barrier()

    def end(self) -> None:
        """Let the others go."""
        if self.world > 1:
            import torch.distributed as dist

            self.wait()
            dist.destroy_process_group()


def current() -> Processes:
    """Read torchrun's environment."""
    return Processes(rank(), world_size())
