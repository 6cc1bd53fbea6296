"""What passes between a suite and the rest of ``eval``: prompts, samples, and the records that a judge makes of them.

A judge answers one `Record` an image. A record is plain JSON and holds all that the summary needs, so records can be
kept on disk, scoring can stop and go on, and summing up again does no model work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image, ImageOps

from flux2pixel.runtime.errors import Flux2PixelError

T = TypeVar("T")
Size = tuple[int, int]  # height, width, in pixels
Rgb = np.ndarray  # (H, W, 3) uint8


@dataclass(frozen=True)
class Prompt:
    """One prompt of a suite.

    ``id`` is unique in the suite and names the files in its official layout; ``text`` is generated from; ``group`` is
    the tag or category it counts in; ``samples`` how many images the protocol wants; ``data`` the suite's own row.
    """

    id: str
    text: str
    group: str
    samples: int
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One image made from a prompt: number ``index`` from 0, in ``path``, or in the pixels ``box`` of that file."""

    prompt: Prompt
    index: int
    path: Path
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom


@dataclass(frozen=True)
class Record:
    """The score of one image, in the suite's own unit; ``reason`` is empty where the suite gives none."""

    prompt: str
    index: int
    group: str
    score: float
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values; ``Record(**r.as_dict()) == r``."""
        return asdict(self)


class Judge(Protocol):
    """A suite with its networks loaded: what `Suite.open_judge` opens."""

    def score(self, samples: Iterable[Sample]) -> Iterator[Record]:
        """Score the samples in order, in batches, reading ahead.

        Raises Flux2PixelError naming the file if an image cannot be decoded whole.
        """

    def provenance(self) -> dict[str, Any]:
        """Say what decides the scores: who judges ("official" or another name), digests of prompts and weights."""


def read_rgb(sample: Sample, orient: bool = True) -> Rgb:
    """Decode to 8-bit RGB, ``orient`` by the EXIF tag; Flux2PixelError if it is absent, cut off or no image."""
    try:
        with Image.open(sample.path) as file:
            file.load()
            image = ImageOps.exif_transpose(file) if orient else file
            if sample.box is not None:
                if sample.box[2] > image.width or sample.box[3] > image.height:
                    raise Flux2PixelError(
                        f"{sample.path}: is {image.width}x{image.height}, too small to hold the sample at {sample.box}"
                    )
                image = image.crop(sample.box)
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise Flux2PixelError(f"{sample.path}: no such image; generate it, or take its prompt out") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises depends on the format and the damage
        raise Flux2PixelError(f"{sample.path}: not a whole image ({error}); make it again") from error


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Cut ``items`` into lists of ``size``; the last may be shorter. Takes no item before it is needed."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def read_ahead(
    samples: Iterable[Sample], read: Callable[[Sample], T], batch: int, workers: int = 4
) -> Iterator[tuple[list[Sample], list[T]]]:
    """Yield batches of samples with what ``read`` makes of them, decoding one batch ahead in threads."""
    with ThreadPoolExecutor(workers) as pool:
        ahead: tuple[list[Sample], list[Future[T]]] | None = None
        for group in batches(samples, batch):
            started = group, [pool.submit(read, sample) for sample in group]
            if ahead is not None:
                yield ahead[0], [future.result() for future in ahead[1]]
            ahead = started
        if ahead is not None:
            yield ahead[0], [future.result() for future in ahead[1]]
