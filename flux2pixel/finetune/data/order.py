"""The order of the training data: a pure function of (seed, step, rank, world), so that a resumed run repeats it.

The quantum is the unit: ``unit`` images of one bucket, the micro-batch of one process. Units are numbered from 0 on
through all epochs; step s takes units s U to (s + 1) U, U = batch / unit, and process r of w takes every w-th of them.
What a unit holds does not depend on the number of processes, so neither does the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from flux2pixel.runtime.errors import UsageError

# Streams of random numbers apart from each other: np.random.default_rng([seed, stream, ...]).
_EPOCH, _BUCKET, _DROPOUT = 1, 2, 3


@dataclass(frozen=True)
class Order:
    """Shuffled units over buckets that hold ``counts`` images.

    In an epoch every image comes once; a bucket's last unit is filled up with images from the start of its shuffle.
    """

    counts: tuple[int, ...]
    unit: int
    seed: int

    @cached_property
    def units_per_epoch(self) -> int:
        """Units that show every image once."""
        return sum(-(-count // self.unit) for count in self.counts)

    def __getitem__(self, number: int) -> tuple[int, np.ndarray]:
        """Bucket and the ``unit`` indices within it of unit ``number``."""
        epoch, place = divmod(number, self.units_per_epoch)
        bucket, indices = _epoch(self, epoch)[place]
        return bucket, indices

    def dropped(self, number: int, share: float) -> np.ndarray:
        """Which of the unit's captions are left out: (unit,) bool, each with probability ``share``."""
        return np.random.default_rng([self.seed, _DROPOUT, number]).random(self.unit) < share


@lru_cache(maxsize=2)
def _epoch(order: Order, epoch: int) -> list[tuple[int, np.ndarray]]:
    units = []
    for bucket, count in enumerate(order.counts):
        shuffled = np.random.default_rng([order.seed, _BUCKET, epoch, bucket]).permutation(count)
        whole = np.resize(shuffled, -(-count // order.unit) * order.unit)
        units += [(bucket, indices) for indices in whole.reshape(-1, order.unit)]
    sequence = np.random.default_rng([order.seed, _EPOCH, epoch]).permutation(len(units))
    return [units[index] for index in sequence]


def units_of(step: int, batch: int, unit: int, rank: int = 0, world: int = 1) -> range:
    """The unit numbers of process ``rank`` at ``step``: its micro-batches, batch / (unit world) of them.

    Raises UsageError if a step's ``batch`` images do not divide evenly.
    """
    if batch % (unit * world):
        raise UsageError(
            f"finetune: a batch of {batch} images is not a multiple of {unit} images x {world} processes; "
            f"{-(-batch // (unit * world)) * unit * world} is"
        )
    per_step = batch // unit
    return range(step * per_step + rank, (step + 1) * per_step, world)
