"""Contact sheets: all images of one prompt in one small WebP, models as rows, samples as columns.

The page embeds one sheet a prompt and decodes it only while its card is near the view. A sheet is kept on disk under
the digests of its images, so that a report written again decodes none of them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from PIL import Image

from flux2pixel.evaluate.store import Digests
from flux2pixel.evaluate.suite import Sample
from flux2pixel.runtime import files

SIDE = 128  # pixels of a thumbnail, at most
SIDE_OF_MANY = 64  # beyond MANY images: the page stays under about 40 MB
MANY = 12_000
QUALITY = 80
EMPTY = (128, 128, 128)


@dataclass(frozen=True)
class Sheet:
    """WebP bytes of ``rows`` x ``columns`` square cells."""

    webp: bytes
    rows: int
    columns: int


def side_for(images: int) -> int:
    """The largest thumbnail side for a page of so many images."""
    return SIDE if images <= MANY else SIDE_OF_MANY


def sheet(rows: Sequence[Sequence[Sample]], side: int, digests: Digests, cache: Path) -> Sheet:
    """Draw a sheet, or take it from ``cache``. Images of at most ``side`` pixels are kept lossless at their size."""
    columns = max((len(row) for row in rows), default=0)
    marks = [[(digests.of_file(s.path), s.box) for s in row] for row in rows]
    path = cache / f"{sha256(repr((side, marks)).encode()).hexdigest()}.webp"
    if not path.is_file():
        data = _draw(rows, columns, side)
        files.write(path, lambda temporary: temporary.write_bytes(data))
        return Sheet(data, len(rows), columns)
    return Sheet(path.read_bytes(), len(rows), columns)


def sheets(prompts: Sequence[Sequence[Sequence[Sample]]], side: int, digests: Digests, cache: Path, workers: int = 4):
    """Yield the sheet of each prompt in order, several drawn at once, few held in memory."""
    with ThreadPoolExecutor(workers) as pool:
        for first in range(0, len(prompts), 8 * workers):
            some = prompts[first : first + 8 * workers]
            yield from pool.map(lambda rows: sheet(rows, side, digests, cache), some)


def thumbnail(sample: Sample, side: int) -> Image.Image:
    """A sample as an RGB image of at most ``side`` pixels a side."""
    with Image.open(sample.path) as file:
        image = file.convert("RGB") if sample.box is None else file.crop(sample.box).convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return image


def _draw(rows: Sequence[Sequence[Sample]], columns: int, side: int) -> bytes:
    shots = [[thumbnail(sample, side) for sample in row] for row in rows]
    cell = max((max(shot.size) for row in shots for shot in row), default=1)
    canvas = Image.new("RGB", (max(1, columns) * cell, max(1, len(rows)) * cell), EMPTY)
    for y, row in enumerate(shots):
        for x, shot in enumerate(row):
            canvas.paste(shot, (x * cell + (cell - shot.width) // 2, y * cell + (cell - shot.height) // 2))
    stream = io.BytesIO()
    if cell < side:
        canvas.save(stream, format="WEBP", lossless=True, quality=20, method=0)
    else:
        canvas.save(stream, format="WEBP", quality=QUALITY, method=2)
    return stream.getvalue()
