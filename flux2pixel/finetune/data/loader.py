"""Batches in training order, read and prepared by a thread ahead of the step that needs them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from flux2pixel.data.cache import Batch, Cache
from flux2pixel.finetune.data.order import Order, units_of


class Loader:
    """Iterates over steps from ``first`` to ``last``: each gives this process's micro-batches, a list of Batch.

    ``waited`` is the time in seconds that the consumer stood still for data so far, the first step's included. An
    error of the thread is raised where the batch would have come.
    """

    def __init__(
        self,
        cache: Cache,
        order: Order,
        batch: int,
        steps: range,
        *,
        caption_dropout: float = 0.0,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        ahead: int = 3,
    ):
        units_of(0, batch, order.unit, rank, world)
        self.cache, self.order, self.batch, self.steps = cache, order, batch, steps
        self.caption_dropout, self.rank, self.world = caption_dropout, rank, world
        self.device, self.ahead = torch.device(device), ahead
        self.waited = 0.0

    def load(self, step: int) -> list[Batch]:
        """The micro-batches of one step, in host memory."""
        batches = []
        for number in units_of(step, self.batch, self.order.unit, self.rank, self.world):
            bucket, indices = self.order[number]
            loaded = self.cache.load(bucket, indices, self.order.dropped(number, self.caption_dropout))
            loaded = replace(loaded, number=number)
            batches.append(loaded.pin() if self.device.type == "cuda" else loaded)
        return batches

    def __iter__(self) -> Iterator[list[Batch]]:
        ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(self.ahead)
        stop = threading.Event()

        def put(value: list[Batch] | BaseException) -> None:
            while not stop.is_set():
                try:
                    return ready.put(value, timeout=0.1)
                except queue.Full:
                    continue

        def fill() -> None:
            try:
                for step in self.steps:
                    put(self.load(step))
                    if stop.is_set():
                        return
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=fill, name="loader", daemon=True)
        thread.start()
        try:
            for _ in self.steps:
                began = time.perf_counter()
                value = ready.get()
                self.waited += time.perf_counter() - began
                if isinstance(value, BaseException):
                    raise value
                yield [batch.to(self.device) for batch in value]
        finally:
            stop.set()
            thread.join()
