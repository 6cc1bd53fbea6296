"""Writing safetensors as a stream: tensors are copied or computed a block at a time, hashed and checked on the way.

The library's own writer wants every tensor of a file in memory; here a file of any size takes a few buffers. Bytes that
do not change are copied by the kernel, which on some file systems only notes that two files share them, and while the
next ones are copied, threads read both sides back: they must be equal, and every value finite.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from flux2pixel.runtime.errors import Flux2PixelError
from flux2pixel.runtime.progress import Bar
from flux2pixel.weights.checkpoint import DTYPES, Span, Stored, read_exactly

CHUNK = 4 << 20  # bytes copied and checked at a time
BLOCK = 64 << 20  # bytes computed at a time, at most, if a row is not longer
BUFFERS = 4  # pairs of chunks that are read back at a time
CHECKERS = 2  # threads that read back; a third one hashes
# What the kernel says where it cannot copy between these two files; bytes then go through a buffer.
NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)

Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Output:
    """A tensor to write: the bytes of ``source``, or, if given, what ``rows(first, last)`` computes, cast to ``dtype``.

    ``action`` says in a few words what happens to it; it is empty for a tensor that is copied as it is. ``whole`` says
    that ``rows`` computes all rows at once however it is asked, so it is asked once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Stored
    rows: Rows | None = None
    action: str = ""
    whole: bool = False

    @property
    def size(self) -> int:
        """Bytes of the written tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def working_memory(self) -> int:
        """Bytes, about, that writing it takes: the copy's buffers, or float64 in and out of the largest block."""
        if self.rows is None:
            return 2 * BUFFERS * CHUNK
        share = min(self.length, self._block()) / max(self.length, 1)
        written = math.prod(self.shape) * (8 + DTYPES[self.dtype].itemsize)
        read = self.source.size + math.prod(self.source.shape) * 8
        return int((written + read) * share) + 2 * BUFFERS * CHUNK

    @property
    def length(self) -> int:
        """Rows along the leading dimension; a scalar is its own only row."""
        return self.shape[0] if self.shape else 1

    def block(self, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` of the written tensor, not cast yet."""
        return self.rows(first, last) if self.rows else self.source.slice(first, last).read()

    def read(self) -> Tensor:
        """The whole tensor, as it is written."""
        parts = [self.block(first, last).to(DTYPES[self.dtype]) for first, last in self.blocks()]
        return torch.cat(parts) if len(parts) > 1 else parts[0].reshape(self.shape)

    def _block(self) -> int:
        return self.length if self.whole else max(1, BLOCK * self.length // max(math.prod(self.shape) * 8, 1))

    def blocks(self) -> list[tuple[int, int]]:
        """Ranges of rows that are computed at a time."""
        step = max(1, self._block())
        return [(first, min(first + step, self.length)) for first in range(0, self.length, step)]


def header(outputs: tuple[Output, ...], metadata: Mapping[str, str]) -> bytes:
    """The length and header of a safetensors file that holds ``outputs`` in this order."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for output in outputs:
        entries[output.name] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [offset, offset + output.size],
        }
        offset += output.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class Written:
    """A file that was written: its SHA-256 (None if it was not asked for), and the tensors that are not finite."""

    digest: str | None
    broken: list[str]


def write_file(
    path: Path, outputs: tuple[Output, ...], metadata: Mapping[str, str], progress: Bar | None = None
) -> Written:
    """Write a safetensors file that holds ``outputs`` in this order, and read back what was copied.

    Raises OSError if the disk is full, Flux2PixelError if what was copied is not what it was copied from. The file is
    neither synced nor renamed into place: the caller writes into a temporary folder.
    """
    with path.open("wb", buffering=0) as file, _Stream(file, path) as stream:
        stream.put(memoryview(header(outputs, metadata)))
        for output in outputs:
            if output.rows:
                for first, last in output.blocks():
                    block = output.block(first, last).to(DTYPES[output.dtype]).contiguous()
                    stream.judge(output.name, all_finite(block))
                    if block.numel():
                        stream.put(block.reshape(-1).view(torch.uint8).numpy().data)
            else:
                for span in output.source.spans:
                    stream.copy(span, output.name, output.dtype)
            if progress:
                progress.advance(output.size, note=output.name)
        return stream.finish()


def copy_file(
    source: Path, path: Path, outputs: tuple[Output, ...], digest: str | None, progress: Bar | None = None
) -> Written:
    """Copy a whole safetensors file, whose tensors ``outputs`` are; ``digest`` is its SHA-256 where that is known.

    The copy is equal byte for byte, header and all, and read back as in :func:`write_file`.
    """
    with path.open("wb", buffering=0) as file, _Stream(file, path, hashed=digest is None) as stream:
        ordered = sorted(outputs, key=lambda output: output.source.spans[0].start)
        stream.copy(Span(source, 0, ordered[0].source.spans[0].start if ordered else source.stat().st_size), "", "U8")
        for output in ordered:
            stream.copy(output.source.spans[0], output.name, output.dtype)
            if progress:
                progress.advance(output.size, note=output.name)
        written = stream.finish()
    return Written(digest or written.digest, written.broken)


def link_or_copy(source: Path, target: Path) -> bool:
    """Hard-link ``target`` to the file behind ``source``, or copy it where that is impossible; True if linked."""
    real = source.resolve()  # a link to one of the Hub cache's symlinks would be a symlink into the cache
    try:
        os.link(real, target)
        return True
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            raise
    shutil.copyfile(real, target)
    return False


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; one pass without a temporary of the tensor's size."""
    if not values.dtype.is_floating_point or not values.numel():
        return True
    if values.dtype.itemsize == 1:
        values = values.to(torch.bfloat16)
    # A value that is not finite always shows in the sum, which is the faster; a sum may also overflow by itself.
    return bool(values.sum().isfinite()) or all(bool(bound.isfinite()) for bound in torch.aminmax(values))


def copy_range(source: FileIO, target: FileIO, start: int, size: int) -> None:
    """Append ``size`` bytes of ``source`` from ``start`` to ``target``: by the kernel where it can, else in chunks."""
    source.seek(start)
    left = size
    while left and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(source.fileno(), target.fileno(), left)
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
            break
        if not count:  # the source ended, or its file system copies nothing this way: reading tells which
            break
        left -= count
    while left:
        buffer = memoryview(bytearray(min(left, CHUNK)))
        read_exactly(source, buffer, Path(str(source.name)))
        _put(target, buffer)
        left -= len(buffer)


def same_bytes(one: memoryview, other: memoryview) -> bool:
    """Whether two buffers of one length are equal; by words of 8 bytes, which is the fastest way that frees the GIL."""
    whole = len(one) // 8 * 8
    if whole and not torch.equal(*(torch.frombuffer(side[:whole], dtype=torch.int64) for side in (one, other))):
        return False
    return one[whole:] == other[whole:]


@dataclass
class _Stream:
    """A file that is read back and hashed while it is written; leaves nothing running, however the block ends."""

    file: FileIO
    path: Path
    hashed: bool = True
    broken: dict[str, None] = field(default_factory=dict)

    def __enter__(self) -> _Stream:
        self._hash = hashlib.sha256()
        self._checkers, self._hasher = ThreadPoolExecutor(CHECKERS), ThreadPoolExecutor(1)
        self._pairs: SimpleQueue[tuple[bytearray, bytearray]] = SimpleQueue()
        for _ in range(BUFFERS):
            self._pairs.put((bytearray(CHUNK), bytearray(CHUNK)))
        self._running: list[Future[None]] = []
        self._place, self._sources = 0, dict[Path, FileIO]()
        return self

    def __exit__(self, *_: object) -> None:
        self._checkers.shutdown(cancel_futures=True)
        self._hasher.shutdown(cancel_futures=True)
        for source in self._sources.values():
            source.close()

    def judge(self, name: str, finite: bool) -> None:
        """Note a tensor that is not finite."""
        if not finite:
            self.broken[name] = None

    def put(self, view: memoryview) -> None:
        """Write bytes from memory, which are lent until this returns."""
        pending = self._hasher.submit(self._hash.update, view) if self.hashed else None
        _put(self.file, view)
        self._place += len(view)
        if pending:
            pending.result()

    def copy(self, span: Span, name: str, dtype: str) -> None:
        """Copy a span of another file, of values of ``dtype`` of the tensor ``name``."""
        if span.path not in self._sources:
            self._sources[span.path] = span.path.open("rb", buffering=0)
        for start in range(span.start, span.start + span.size, CHUNK):
            size = min(CHUNK, span.start + span.size - start)
            pair = self._pairs.get()
            try:
                copy_range(self._sources[span.path], self.file, start, size)
            except BaseException:
                self._pairs.put(pair)
                raise
            part = Span(span.path, start, size)
            checked = self._checkers.submit(self._check, part, self._place, pair, name, dtype)
            self._running.append(self._hasher.submit(self._settle, checked, pair, self._place, size))
            self._place += size
            while self._running and self._running[0].done():
                self._running.pop(0).result()

    def finish(self) -> Written:
        """Wait for what is still being read back. Raises what a thread raised."""
        while self._running:
            self._running.pop(0).result()
        return Written(self._hash.hexdigest() if self.hashed else None, sorted(self.broken))

    def _check(self, span: Span, place: int, pair: tuple[bytearray, bytearray], name: str, dtype: str) -> None:
        """Read a chunk back beside its source: equal, and every value finite."""
        meant, found = (memoryview(side)[: span.size] for side in pair)
        for path, start, view in ((span.path, span.start, meant), (self.path, place, found)):
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                read_exactly(file, view, path)
        if not same_bytes(meant, found):
            raise Flux2PixelError(
                f"{self.path}: {name or 'its header'} is not what was copied from {span.path}; is the disk sound? "
                "nothing was written"
            )
        self.judge(name, all_finite(torch.frombuffer(found, dtype=DTYPES[dtype])))

    def _settle(self, checked: Future[None], pair: tuple[bytearray, bytearray], place: int, size: int) -> None:
        """Hash a chunk that was read back, in the order of the file, and lend its buffers again."""
        try:
            checked.result()
            if self.hashed:
                self._hash.update(memoryview(pair[1])[:size])
            if hasattr(os, "posix_fadvise"):
                # Nobody reads it again: the disk may begin to write it now, while the next chunks are copied.
                os.posix_fadvise(self.file.fileno(), place, size, os.POSIX_FADV_DONTNEED)
        finally:
            self._pairs.put(pair)


def _put(file: FileIO, view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]
