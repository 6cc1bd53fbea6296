"""The world as a source of training images."""

from __future__ import annotations

from collections.abc import Iterator

from flux2pixel.data.sources import Record
from flux2pixel.miniature import world as scenes
from flux2pixel.runtime.errors import UsageError


class Scenes:
    """The miniature's scenes from seed ``start`` on; endless, so it needs a limit."""

    name = "the miniature's scenes"
    count = None

    def __init__(self, start: int):
        self.start = start

    def records(self, rank: int = 0, world: int = 1, limit: int = 0) -> Iterator[Record]:
        """Every ``world``-th scene from ``rank``, of the first ``limit``."""
        if not limit:
            raise UsageError("scenes: there is no end to them; say how many")
        for seed in range(self.start + rank, self.start + limit, world):
            scene = scenes.sample(seed)
            yield Record(f"scene {seed}", scene.caption, scene.image)
