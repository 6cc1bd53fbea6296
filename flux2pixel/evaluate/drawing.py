"""Images of a suite on disk: which are there already, and drawing those that are not.

An image depends on its prompt, its seed and the settings in its digest, never on the batch or process that drew it:
the seed is that of (prompt's place in the suite, sample). A file whose digest is the wanted one is not drawn again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np

from flux2pixel.evaluate import png
from flux2pixel.evaluate.layout import GRID, ImageFile
from flux2pixel.evaluate.suite import Prompt, Size

WRITERS = 4  # threads that compress; zlib works outside the interpreter's lock
AHEAD = 64  # encoded images that may wait for the disk
FORMAT = 2  # of the settings below: a change of what draws the noise or the pixels must raise it

Key = tuple[int, int]  # what seeds an image: (seed and prompt, sample)


class Drawer(Protocol):
    """A loaded model that draws; `close` lets its weights go."""

    def draw(self, prompts: Sequence[str], keys: Sequence[Key], size: Size) -> np.ndarray:
        """One image a prompt and key: (B, H, W, 3) uint8. Equal prompt, key and size give the equal image."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Order:
    """What decides the images of one model in one suite.

    ``model`` is the digest of its weights and configuration, ``settings`` how it is sampled, ``places`` a prompt's
    number in the whole suite (a subset keeps its seeds), ``size_of`` the size a prompt is drawn at.
    """

    model: str
    settings: Mapping[str, Any]
    seed: int
    places: Mapping[str, int]
    size_of: Callable[[Prompt], Size]

    def key(self, prompt: Prompt, index: int) -> Key:
        """The seed of one sample. Suites have fewer than a million prompts, so no two seeds share a key."""
        return (self.seed * 1_000_000 + self.places[prompt.id], index)

    def digest(self, file: ImageFile) -> str:
        """Digest of everything that decides the file's pixels."""
        keys = [self.key(file.prompt, index) for index in file.indices]
        what = {"model": self.model, "settings": self.settings, "prompt": file.prompt.text}
        return png.settings_digest(what | {"size": self.size_of(file.prompt), "keys": keys, "format": FORMAT})


def stale(order: Order, files: Sequence[ImageFile]) -> list[ImageFile]:
    """The files that are absent, damaged or made with other settings."""
    with ThreadPoolExecutor(WRITERS) as pool:
        found = pool.map(lambda file: png.read_digest(file.path), files)
        return [file for file, digest in zip(files, found, strict=True) if digest != order.digest(file)]


def batches(order: Order, files: Sequence[ImageFile], batch: int) -> list[list[ImageFile]]:
    """Cut files into runs of one size and at most ``batch`` samples (at least one file)."""
    found: list[list[ImageFile]] = []
    for _, run in groupby(files, key=lambda file: order.size_of(file.prompt)):
        group: list[ImageFile] = []
        for file in run:
            if group and sum(len(f.indices) for f in group) + len(file.indices) > batch:
                found.append(group)
                group = []
            group.append(file)
        found.append(group)
    return found


@dataclass
class Clock:
    """Seconds spent drawing, without writing and scoring, and the images they made."""

    seconds: float = 0.0
    images: int = 0


def draw(
    order: Order, work: Sequence[Sequence[ImageFile]], drawer: Drawer, batch: int, clock: Clock
) -> Iterator[ImageFile]:
    """Draw and write the files of ``work`` batch by batch; yields each once it is whole on disk."""
    waiting: deque[tuple[ImageFile, Future[None]]] = deque()

    def written(limit: int) -> Iterator[ImageFile]:
        while waiting and (len(waiting) > limit or waiting[0][1].done()):
            file, future = waiting.popleft()
            future.result()
            yield file

    with ThreadPoolExecutor(WRITERS) as pool:
        for group in work:
            size = order.size_of(group[0].prompt)
            shots = [(file.prompt, index) for file in group for index in file.indices]
            parts = []
            for first in range(0, len(shots), batch):
                some = shots[first : first + batch]
                began = time.perf_counter()
                parts.append(drawer.draw([p.text for p, _ in some], [order.key(p, i) for p, i in some], size))
                clock.seconds += time.perf_counter() - began
                clock.images += len(some)
            images = iter(np.concatenate(parts))
            for file in group:
                image = _sheet([next(images) for _ in file.indices])
                waiting.append((file, pool.submit(png.write, file.path, image, order.digest(file))))
            yield from written(AHEAD)
        yield from written(0)


def _sheet(images: list[np.ndarray]) -> np.ndarray:
    """One image, or several in a grid filled row by row (black where there is none)."""
    if len(images) == 1:
        return images[0]
    height, width, _ = images[0].shape
    sheet = np.zeros((GRID * height, GRID * width, 3), dtype=np.uint8)
    for place, image in enumerate(images):
        y, x = place // GRID * height, place % GRID * width
        sheet[y : y + height, x : x + width] = image
    return sheet
