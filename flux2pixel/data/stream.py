"""From records to batches of one size: reading and decoding in threads, ahead of whoever computes.

B  images of one batch    H, W  its bucket's size
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flux2pixel.data.buckets import Buckets, Placement, Size, fit
from flux2pixel.data.decode import Unreadable, decode, read_bytes
from flux2pixel.data.sources import Record, Source
from flux2pixel.runtime.errors import Flux2PixelError


@dataclass(frozen=True)
class Picture:
    """A decoded record: ``rgb`` (H, W, 3) uint8 of its bucket's size, ``digest``, the SHA-256 of its content, and
    ``latents`` (N, r) if they were beside it."""

    name: str
    caption: str | None
    digest: str
    rgb: np.ndarray
    latents: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """``rgb`` (B, 3, H, W) uint8, with each picture's name, caption and content digest.

    ``latents`` (B, N, r) float32 are those found beside the pictures: all of a batch have them, or none.
    """

    rgb: Tensor
    names: list[str]
    captions: list[str | None]
    digests: list[str]
    latents: Tensor | None = None

    @property
    def unit(self) -> Tensor:
        """sRGB (B, 3, H, W) float32 in [0, 1], what a base encodes."""
        return self.rgb.float() / 255


@dataclass
class Tally:
    """What became of the pictures. More than ``limit`` broken ones fail the run; ``None`` never does."""

    limit: int | None = None
    kept: int = 0
    known: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    enlarged: list[tuple[str, float]] = field(default_factory=list)

    @property
    def seen(self) -> int:
        return self.kept + self.known + len(self.broken) + len(self.dropped)

    def broke(self, name: str, reason: str) -> None:
        """Note an unreadable picture. Raises Flux2PixelError when they are more than the limit."""
        self.broken.append((name, reason))
        if self.limit is not None and len(self.broken) > self.limit:
            shown = "; ".join(f"{n}: {r}" for n, r in self.broken[-3:])
            raise Flux2PixelError(
                f"{len(self.broken)} of {self.seen} images are unreadable, more than the {self.limit} allowed "
                f"({shown}); repair or remove them, or raise max_broken"
            )

    def merge(self, other: Tally) -> None:
        """Add what another process counted."""
        self.kept += other.kept
        self.known += other.known
        for name in ("broken", "dropped", "enlarged"):
            getattr(self, name).extend(getattr(other, name))

    def lines(self, most: int = 5) -> list[str]:
        """The summary for a person: counts, and the first ``most`` names of each kind."""
        out = [f"images: {self.seen} seen, {self.kept + self.known} used"]
        kinds: tuple[tuple[str, list], ...] = (
            ("unreadable, skipped", self.broken),
            ("dropped", self.dropped),
            ("enlarged", [(name, f"x {scale:.2f}") for name, scale in self.enlarged]),
        )
        for what, entries in kinds:
            if entries:
                out.append(f"  {what}: {len(entries)}")
                out += [f"    {name}: {reason}" for name, reason in entries[:most]]
                if len(entries) > most:
                    out.append(f"    and {len(entries) - most} more")
        return out

    def as_dict(self) -> dict[str, Any]:
        """For a JSON report: counts and complete lists."""
        counts = {"seen": self.seen, "used": self.kept + self.known}
        return counts | {"broken": self.broken, "dropped": self.dropped, "enlarged": self.enlarged}


@dataclass(frozen=True)
class Rules:
    """How pictures become batches: the buckets, the largest share of a picture that its bucket may cut off,
    whether one smaller than its bucket is enlarged (else dropped), and whether one without a caption is broken."""

    buckets: Buckets
    max_cut: float = 0.2
    enlarge: bool = False
    captions: bool = False


Known = Callable[[Record, str], bool]


def stream(
    source: Source,
    rules: Rules,
    batch: int,
    tally: Tally,
    *,
    rank: int = 0,
    world: int = 1,
    limit: int = 0,
    known: Known | None = None,
    threads: int = 4,
) -> Iterator[Batch]:
    """Batches of up to ``batch`` pictures, each of one size; the same at every call, whatever ``threads`` is.

    ``known(record, digest)``, called in a worker thread, true leaves a picture out undecoded, as one done already. What
    is broken, dropped or enlarged is noted in ``tally``; raises Flux2PixelError when its limit of broken is passed.
    """
    waiting: dict[tuple[int, int, bool], list[Picture]] = {}
    for record, outcome in _ahead(source.records(rank, world, limit), lambda r: _prepare(r, rules, known), threads):
        if isinstance(outcome, Unreadable):
            tally.broke(record.name, str(outcome))
        elif outcome is None:
            tally.known += 1
        elif isinstance(outcome, str):
            tally.dropped.append((record.name, outcome))
        else:
            picture, scale = outcome
            tally.kept += 1
            if scale > 1:
                tally.enlarged.append((picture.name, round(scale, 3)))
            kind = (*picture.rgb.shape[:2], picture.latents is not None)
            group = waiting.setdefault(kind, [])
            group.append(picture)
            if len(group) == batch:
                yield _stack(waiting.pop(kind))
    for kind in sorted(waiting):
        yield _stack(waiting[kind])


def _prepare(record: Record, rules: Rules, known: Known | None) -> tuple[Picture, float] | Unreadable | str | None:
    """A picture and the factor it was scaled by; or why it is unreadable; or why it is dropped; or None if known."""
    try:
        if isinstance(record.content, Unreadable):
            return record.content
        if rules.captions and not record.caption:
            return Unreadable("has no caption")
        content, digest = read_bytes(record.content)
        if known is not None and known(record, digest):
            return None
        image = decode(content)
    except Unreadable as error:
        return error
    place = rules.buckets.place(image.height, image.width)
    size = f"{image.width} x {image.height}"
    if not place.bucket[0] or not place.bucket[1]:
        return f"{size} is smaller than one {rules.buckets.patch}-pixel patch"
    if place.cut > rules.max_cut and rules.buckets.resolution:
        return f"{size} would lose {place.cut:.0%} to its bucket {place.bucket[1]} x {place.bucket[0]}"
    if place.scale > 1 and not rules.enlarge:
        return f"{size} is smaller than its bucket {place.bucket[1]} x {place.bucket[0]} (x {place.scale:.2f})"
    latents = None
    if record.latents is not None:
        grid = (place.bucket[0] // rules.buckets.patch, place.bucket[1] // rules.buckets.patch)
        try:
            latents = _read_latents(record.latents, grid, place)
        except Unreadable as error:
            return error
    return Picture(record.name, record.caption, digest, fit(image, place), latents), place.scale


def _read_latents(path: Path, grid: Size, place: Placement) -> Tensor:
    """Latents computed before, (N, r) float32. Raises Unreadable unless they fit the picture as it will be used."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            latents: Tensor = file.get_tensor("latents").float()
    except (SafetensorError, OSError) as error:
        raise Unreadable(f"its {path.name} has no readable tensor named latents ({error})") from error
    tokens = grid[0] * grid[1]
    if latents.ndim != 2 or len(latents) != tokens:
        shape = " x ".join(map(str, latents.shape))
        raise Unreadable(
            f"its latents are {shape}, but at {place.bucket[1]} x {place.bucket[0]} it has {tokens} tokens"
        )
    if not torch.isfinite(latents).all():
        raise Unreadable(f"its {path.name} has values that are not finite")
    return latents


def _stack(pictures: list[Picture]) -> Batch:
    rgb = torch.from_numpy(np.stack([p.rgb for p in pictures])).permute(0, 3, 1, 2).contiguous()
    found = [p.latents for p in pictures if p.latents is not None]
    if len({latents.shape for latents in found}) > 1:
        raise Flux2PixelError(f"{', '.join(p.name for p in pictures[:3])}: their latents are not of one width")
    latents = torch.stack(found) if found else None
    return Batch(rgb, [p.name for p in pictures], [p.caption for p in pictures], [p.digest for p in pictures], latents)


def _ahead(records: Iterator[Record], work: Callable[[Record], Any], threads: int) -> Iterator[tuple[Record, Any]]:
    """``work`` of every record in order, up to four records a thread ahead of the consumer."""
    pending: deque[tuple[Record, Future[Any]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for record in records:
                pending.append((record, pool.submit(work, record)))
                if len(pending) >= 4 * threads:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            for _, future in pending:
                future.cancel()
