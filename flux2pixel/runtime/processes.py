"""The team of processes of a run, the same for fit-subspace, cache, finetune and eval.

Nothing is started here: a launcher did that (``--gpus N``, torchrun, accelerate; see :mod:`launch`), and :func:`join`
makes one team of its processes. A process alone is a team of one, and has no process group.

Time-outs: work between two collectives (:meth:`Team.sum`, ``gather``, ``broadcast``, and those of sharded weights) may
differ by ``STEP`` from process to process; a process that is later than that counts as dead. What one process does
while the others have nothing to do (preparing, fitting, writing a model) may take any time: those wait at a
:meth:`Team.barrier`, which is no collective, and has no limit.

Failures: the first process that fails prints its one line and ends at once, without leaving the process group, since
that can hang while others are inside a collective. The launcher, or the broken connection, then ends the others, and
these print nothing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from flux2pixel.runtime import device as devices
from flux2pixel.runtime import launch
from flux2pixel.runtime.errors import FailedElsewhere, Flux2PixelError, ProcessFailed, exit_code

T = TypeVar("T")

# Longer than a process's part of a checkpoint, shorter than anybody wants to pay for a dead machine.
STEP = timedelta(minutes=20)
CPU = torch.device("cpu")
BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}
_FAILED, _PREPARED = "failed", "prepared"
_joins = itertools.count()  # every process joins the same teams in the same order


@dataclass(frozen=True)
class Team:
    """The processes of this run as one of them sees it, and its device; ``mesh`` is for who shards a network."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU
    mesh: DeviceMesh | None = None
    store: dist.Store | None = field(default=None, repr=False, compare=False)
    _barriers: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """This process's part of ``work``: every world-th piece."""
        return list(work[self.rank :: self.world])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes, in float64, so that counts and flags stay exact."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast(self, value: T) -> T:
        """The leading process's value, in every process."""
        if self.world == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait for all processes, however long they take; raises FailedElsewhere if one of them fails instead."""
        if self.store is None:
            return
        name = f"barrier/{next(self._barriers)}"
        if self.store.add(name, 1) == self.world:
            self.store.set(f"{name}/open", "yes")
        _wait(self.store, f"{name}/open")


@contextmanager
def join(
    prepare: Callable[[], object] | None = None, device: str | None = None, float64: bool = False
) -> Iterator[Team]:
    """The team of this run while the block runs, each process on a device of its own (:func:`device.choose`).

    ``prepare`` runs first, in the leading process alone, before any process group, while the others wait for it however
    long it takes. Collectives of tensors on the CPU go through gloo, of those on a GPU through NCCL.

    Raises what ``prepare`` or the block raises, in a run of several processes as ProcessFailed, and FailedElsewhere in
    all processes but the first that failed.
    """
    if launch.world_size() == 1:
        place = devices.choose(device, float64)
        if prepare is not None:
            prepare()
        yield Team(device=place)
        return
    store, rank, world = next(dist.rendezvous("env://", timeout=STEP))
    store = dist.PrefixStore(f"flux2pixel/{next(_joins)}", store)
    with _failing_once(store, rank, world):
        place = devices.choose(device, float64)
        if prepare is not None and rank == 0:
            prepare()
            store.set(_PREPARED, "yes")
        elif prepare is not None:
            _wait(store, _PREPARED)
        if place.index is not None:
            torch.get_device_module(place).set_device(place)
        group = dist.PrefixStore("group", store)
        backend = BACKENDS.get(place.type, "gloo")
        dist.init_process_group(backend, timeout=STEP, world_size=world, rank=rank, store=group)
        try:
            yield Team(rank, world, place, store=store)
        except SystemExit:  # all of them leave in order
            dist.destroy_process_group()
            raise
        dist.destroy_process_group()


@contextmanager
def _failing_once(store: dist.Store, rank: int, world: int) -> Iterator[None]:
    """Name the process that fails first in the store; only there is the error what its message will be."""
    try:
        yield
    except Exception as error:
        told: Exception = error
        if "by peer" in str(error) and not isinstance(error, Flux2PixelError):  # gloo's words
            told = Flux2PixelError("another process is gone; its own message, or the launcher's, says why")
        mine = f"{rank} {exit_code(told)}"
        try:
            first = store.compare_set(_FAILED, "", mine).decode()
        except dist.DistError:  # without torchrun's agent the leading process keeps the store, and takes it along
            raise (ProcessFailed(rank, world, told) if rank == 0 else _elsewhere(error)) from error
        if first != mine:
            raise FailedElsewhere(int(first.split()[1])) from error
        raise ProcessFailed(rank, world, told) from error


def _elsewhere(error: Exception) -> FailedElsewhere:
    return error if isinstance(error, FailedElsewhere) else FailedElsewhere(1)


def _wait(store: dist.Store, key: str) -> None:
    """Return once ``key`` is set; FailedElsewhere if a process failed or took the store along. Signals are heard."""
    pause = 0.001
    try:
        while not store.check([key]):
            if store.check([_FAILED]):
                raise FailedElsewhere(int(store.get(_FAILED).split()[1]))
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
    except dist.DistError as error:
        raise FailedElsewhere from error
