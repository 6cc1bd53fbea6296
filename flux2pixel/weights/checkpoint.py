"""A checkpoint as its headers declare it: which file holds each tensor, where, and whether the whole is sound.

Nothing is loaded to plan a conversion: names, dtypes, shapes and byte ranges are enough. Reading is by ``pread`` into
plain buffers, not by mapping, so that the memory a conversion takes is the memory it shows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.weights.header import read_header

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SINGLE = "diffusion_pytorch_model.safetensors"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LISTED = 12  # problems of one kind that an error names before it only counts


class Span(NamedTuple):
    """``size`` bytes of a file from ``start``."""

    path: Path
    start: int
    size: int


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: ``dtype`` as safetensors spells it, and its bytes, which may lie in several places."""

    dtype: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return sum(span.size for span in self.spans)

    @property
    def length(self) -> int:
        """Rows along the leading dimension; a scalar is its own only row."""
        return self.shape[0] if self.shape else 1

    def slice(self, first: int, last: int) -> Stored:
        """Rows ``first`` to ``last`` of the leading dimension, not read yet."""
        row = self.size // self.length if self.length else 0
        spans, offset = [], 0
        for span in self.spans:
            low, high = max(first * row, offset), min(last * row, offset + span.size)
            if low < high:
                spans.append(Span(span.path, span.start + low - offset, high - low))
            offset += span.size
        return Stored(self.dtype, (last - first, *self.shape[1:]) if self.shape else (), tuple(spans))

    def read(self) -> Tensor:
        """Read the tensor, in its own dtype."""
        buffer = bytearray(self.size)
        view, filled = memoryview(buffer), 0
        for span in self.spans:
            with span.path.open("rb", buffering=0) as file:
                file.seek(span.start)
                read_exactly(file, view[filled : filled + span.size], span.path)
            filled += span.size
        if not buffer:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        return torch.frombuffer(buffer, dtype=DTYPES[self.dtype]).reshape(self.shape)


def joined(*tensors: Stored) -> Stored:
    """Tensors one after another along the leading dimension, not read yet."""
    shape = (sum(tensor.length for tensor in tensors), *tensors[0].shape[1:])
    return Stored(tensors[0].dtype, shape, tuple(span for tensor in tensors for span in tensor.spans))


def read_exactly(file: RawIOBase, view: memoryview, path: Path) -> None:
    """Fill ``view`` from ``file``. Raises Flux2PixelError if the file ends first."""
    while view:
        count = file.readinto(view)
        if not count:
            raise Flux2PixelError(f"{path}: became shorter while it was read; get it again")
        view = view[count:]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and the files that hold them in reading order."""

    files: tuple[Path, ...]
    tensors: Mapping[str, Stored]
    metadata: Mapping[Path, Mapping[str, str]]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())


def open_checkpoint(path: Path) -> Checkpoint:
    """Read every header of a safetensors file, or of a folder with one file or with shards and their index.

    Raises UsageError if there is no such checkpoint, and one Flux2PixelError that lists everything wrong with it: an
    index that names absent files or files outside the folder, tensors it misplaces, a truncated or damaged shard, a
    tensor in two shards.
    """
    if path.is_file():
        names, placed = [path.name], None
        folder = path.parent
    else:
        folder = path
        names, placed = _contents(folder)
    problems: list[str] = []
    tensors: dict[str, Stored] = {}
    metadata: dict[Path, Mapping[str, str]] = {}
    found: Counter[str] = Counter()
    for name in names:
        file = folder / name
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            problems.append(f"the index names {name}, which is outside the folder")
            continue
        if not file.is_file():
            problems.append(f"{name} is missing")
            continue
        try:
            header = read_header(file)
        except Flux2PixelError as error:
            problems.append(str(error).removeprefix(f"{folder}/"))
            continue
        metadata[file] = header.metadata
        for tensor, (dtype, shape) in header.tensors.items():
            first, last = header.spans[tensor]
            found[tensor] += 1
            if dtype not in DTYPES:
                problems.append(f"{tensor} has dtype {dtype}, which cannot be read")
            elif placed is not None and placed.get(tensor, name) != name:
                problems.append(f"{tensor} is in {name}, the index says {placed[tensor]}")
            tensors[tensor] = Stored(dtype, shape, (Span(file, first, last - first),))
    problems += [f"{tensor} is in {count} shards" for tensor, count in found.items() if count > 1]
    if placed is not None and not any("missing" in problem or "truncated" in problem for problem in problems):
        problems += [f"{tensor} is in the index and in no shard" for tensor in placed if tensor not in tensors]
        problems += [f"{tensor} is in a shard and not in the index" for tensor in tensors if tensor not in placed]
    refuse(path, problems)
    return Checkpoint(tuple(metadata), tensors, metadata)


def check_names(path: Path, checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes with those of the model class; one Flux2PixelError lists all that differs."""
    have = checkpoint.tensors
    problems = [f"{name} {shape} is missing" for name, shape in expected.items() if name not in have]
    problems += [f"{name} {stored.shape} is extra" for name, stored in have.items() if name not in expected]
    problems += [
        f"{name} has shape {have[name].shape}, the configuration says {shape}"
        for name, shape in expected.items()
        if name in have and have[name].shape != shape
    ]
    refuse(path, problems)


def refuse(path: Path, problems: list[str]) -> None:
    """Raise one Flux2PixelError that lists ``problems``, if there are any."""
    if problems:
        listed = "; ".join(problems[:LISTED]) + (f"; and {len(problems) - LISTED} more" if problems[LISTED:] else "")
        raise Flux2PixelError(f"{path}: unsound checkpoint: {listed}; get it again")


def _contents(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """File names of a checkpoint folder, and the index's map from tensor to file if there is one."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    index = folder / INDEX if folder / INDEX in indices else (indices[0] if len(indices) == 1 else None)
    if index is not None:
        try:
            placed = {str(key): str(value) for key, value in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Flux2PixelError(f"{index}: not a shard index; get it again") from error
        return list(dict.fromkeys(placed.values())), placed
    if (folder / SINGLE).is_file():
        return [SINGLE], None
    singles = [file.name for file in sorted(folder.glob("*.safetensors"))]
    if len(singles) == 1:
        return singles, None
    if singles:
        raise UsageError(f"{folder}: {len(singles)} safetensors files and no index; which is the model? get it again")
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.ckpt")])
    if pickles:
        raise UsageError(f"{pickles[0]}: a pickle, which is never opened here; get the model as safetensors")
    raise UsageError(f"{folder}: no safetensors file in it; get the model again")
