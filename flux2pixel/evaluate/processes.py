"""Several processes that share the work: which one this is, waiting for all, and starting them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from flux2pixel.errors import Flux2PixelError

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
    return Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def launch(count: int, words: Sequence[str]) -> None:
    """Run ``flux2pixel <words>`` in ``count`` processes of this machine and wait; Flux2PixelError if one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    # Without the "--", torchrun would take abbreviations of its own options out of ours.
    done = subprocess.run([*command, "-m", "flux2pixel", "--", *words])
    if done.returncode:
        raise Flux2PixelError(f"{count} processes: one failed (exit {done.returncode}); its own line above says why")
