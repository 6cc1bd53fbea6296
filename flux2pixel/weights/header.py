"""Headers of safetensors files, read by hand: no tensor is loaded, and a broken file gets a sentence."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from flux2pixel.runtime.errors import Flux2PixelError

_MAX_HEADER = 100_000_000  # bytes; the limit of the format
_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16}
_BITS |= {"I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8}


@dataclass(frozen=True)
class Header:
    """What a safetensors file declares: its metadata, and by tensor name dtype and shape, first and last byte."""

    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    spans: dict[str, tuple[int, int]]

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(math.prod(shape) for _, shape in self.tensors.values())


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file and check it against the file's length.

    Raises ``Flux2PixelError`` naming the file when it is truncated or not safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8:
            raise Flux2PixelError(f"{path}: not a safetensors file: only {size} bytes; download or write it again")
        if length > _MAX_HEADER or length < 2:
            raise Flux2PixelError(f"{path}: not a safetensors file: its first 8 bytes are no header length")
        raw = file.read(length)
    if len(raw) < length:
        # A file of another format has arbitrary bytes where the header would open with a brace.
        if not raw.startswith(b"{"):
            raise Flux2PixelError(f"{path}: not a safetensors file: no header after its first 8 bytes")
        raise Flux2PixelError(f"{path}: truncated: its header has {length} bytes, {len(raw)} are there; get it again")
    try:
        entries = json.loads(raw)
        notes = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
        tensors = {name: _tensor(entry) for name, entry in entries.items()}
        spans = {name: _span(entry, 8 + length) for name, entry in entries.items()}
        end = max((last for _, last in spans.values()), default=8 + length) - 8 - length
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise Flux2PixelError(f"{path}: not a safetensors file: its header is malformed") from error
    found = size - 8 - length
    if found < end:
        raise Flux2PixelError(f"{path}: truncated: tensors need {end} bytes, {found} are there; get it again")
    if found > end:
        raise Flux2PixelError(f"{path}: damaged: {found - end} bytes after the last tensor; get it again")
    ordered = sorted(spans.values())
    if any(before[1] != after[0] for before, after in pairwise([(0, 8 + length), *ordered])):
        raise Flux2PixelError(f"{path}: damaged: its tensors overlap or leave gaps; get it again")
    return Header(notes, tensors, spans)


def _tensor(entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """Return dtype and shape of a header entry; ``ValueError`` where they disagree with its place in the file."""
    dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError("dtype, shape or offsets of a wrong type")
    if dtype in _BITS and (end - start) * 8 != math.prod(shape) * _BITS[dtype]:
        raise ValueError("shape and offsets disagree")
    return dtype, shape


def _span(entry: Mapping[str, Any], origin: int) -> tuple[int, int]:
    first, last = entry["data_offsets"]
    return origin + first, origin + last
