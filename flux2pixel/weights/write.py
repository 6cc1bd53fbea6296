"""Writing safetensors as a stream: tensors are copied or computed a block at a time, hashed and checked on the way.

The library's own writer wants every tensor of a file in memory; here a file of any size takes a few buffers.
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
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from flux2pixel.runtime.progress import Bar
from flux2pixel.weights.checkpoint import DTYPES, Stored, read_exactly

CHUNK = 1 << 20  # bytes copied at a time; what fits in a core's cache is checked and hashed twice as fast as 8 MB
BLOCK = 64 << 20  # bytes computed at a time, at most, if a row is not longer
BUFFERS = 3

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
            return BUFFERS * CHUNK
        share = min(self.length, self._block()) / max(self.length, 1)
        written = math.prod(self.shape) * (8 + DTYPES[self.dtype].itemsize)
        read = self.source.size + math.prod(self.source.shape) * 8
        return int((written + read) * share) + BUFFERS * CHUNK

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


def write_file(
    path: Path, outputs: tuple[Output, ...], metadata: Mapping[str, str], progress: Bar | None = None
) -> tuple[str, list[str]]:
    """Write a safetensors file and sync it; returns its SHA-256 and a list of tensors that are not finite.

    Raises OSError if the disk is full. The file is not renamed into place: the caller writes into a temporary folder.
    """
    broken = []
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        sink = _Sink(file, pool)
        sink.put(memoryview(header(outputs, metadata)))
        for output in outputs:
            finite = _compute(output, sink) if output.rows else _copy(output, sink)
            if not finite:
                broken.append(output.name)
            if progress:
                progress.advance(output.size, note=output.name)
        digest = sink.digest()
        os.fsync(file.fileno())
    return digest, broken


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


class _Sink:
    """A file that is hashed as it is written, on a second thread; buffers are lent until their hash is taken."""

    def __init__(self, file: FileIO, pool: ThreadPoolExecutor):
        self._file, self._pool, self._hash = file, pool, hashlib.sha256()
        self._free = [bytearray(CHUNK) for _ in range(BUFFERS)]
        self._busy: list[Future[None]] = []
        self._turn = 0

    def buffer(self, size: int) -> memoryview:
        """A buffer of ``size`` bytes, at most CHUNK, that the hash is done with."""
        if len(self._busy) == BUFFERS:
            self._busy.pop(0).result()
        self._turn = (self._turn + 1) % BUFFERS
        return memoryview(self._free[self._turn])[:size]

    def put(self, view: memoryview) -> None:
        self._busy.append(self._pool.submit(self._hash.update, view))
        rest = view
        while rest:
            rest = rest[self._file.write(rest) :]

    def settle(self) -> None:
        while self._busy:
            self._busy.pop(0).result()

    def digest(self) -> str:
        self.settle()
        return self._hash.hexdigest()


def _copy(output: Output, sink: _Sink) -> bool:
    """Copy the bytes of a tensor; returns whether all of its values are finite."""
    finite, dtype = True, DTYPES[output.dtype]
    for span in output.source.spans:
        with span.path.open("rb", buffering=0) as file:
            file.seek(span.start)
            for start in range(0, span.size, CHUNK):
                view = sink.buffer(min(CHUNK, span.size - start))
                read_exactly(file, view, span.path)
                finite = all_finite(torch.frombuffer(view, dtype=dtype)) and finite
                sink.put(view)
    return finite


def _compute(output: Output, sink: _Sink) -> bool:
    """Compute and write a tensor block by block; returns whether all of its values are finite."""
    finite = True
    for first, last in output.blocks():
        block = output.block(first, last).to(DTYPES[output.dtype]).contiguous()
        finite = all_finite(block) and finite
        if block.numel():
            sink.put(block.reshape(-1).view(torch.uint8).numpy().data)
            sink.settle()
    return finite
