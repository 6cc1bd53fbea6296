"""Sums kept apart by chance, so that one pass over the images also tells how far the basis can be trusted.

An image's content digest puts it into one of two halves and, by halving again and again, on a level: the images of
level k or above are a random 2^-k of all. Where an image goes depends on nothing else, so that strata of several
processes, of an interrupted run or of other data simply add.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError
from flux2pixel.subspace.moments import FORMAT, Moments

LEVELS = 6  # the smallest nested subset is 1/32 of the images


class Strata:
    """Moments by (level, half). ``width`` is D, ``rank`` is r."""

    def __init__(self, width: int, rank: int, device: torch.device | str = "cpu"):
        self.width, self.rank, self.device = width, rank, device
        self.parts: dict[tuple[int, int], Moments] = {}

    def add(self, digests: Sequence[str], x: Tensor, z: Tensor) -> None:
        """Add images by content digest: x (B, N, D), z (B, N, r). Raises ValueError as :meth:`Moments.add` does."""
        places: dict[tuple[int, int], list[int]] = {}
        for row, digest in enumerate(digests):
            places.setdefault(_place(digest), []).append(row)
        for place, rows in places.items():
            whole = len(rows) == len(x)
            self._part(place).add(x if whole else x[rows], z if whole else z[rows])

    def _part(self, place: tuple[int, int]) -> Moments:
        if place not in self.parts:
            self.parts[place] = Moments.zeros(self.width, self.rank, self.device)
        return self.parts[place]

    def subset(self, level: int) -> Moments:
        """The sums over a random 2^-level of the images; level 0 is all of them."""
        return self._sum(place for place in self.parts if place[0] >= level)

    def half(self, half: int) -> Moments:
        """The sums over half 0 or half 1."""
        return self._sum(place for place in self.parts if place[1] == half)

    def _sum(self, places: Iterable[tuple[int, int]]) -> Moments:
        # Sorted, so that the rounding of these additions does not depend on the order in which images came.
        return sum((self.parts[place].to("cpu") for place in sorted(places)), Moments.zeros(self.width, self.rank))

    def to(self, device: torch.device | str) -> Strata:
        """Return the sums on another device."""
        moved = Strata(self.width, self.rank, device)
        moved.parts = {place: part.to(device) for place, part in self.parts.items()}
        return moved

    def __add__(self, other: Strata) -> Strata:
        """Sums over both data sets. Raises ValueError if their tokens differ in width."""
        if (self.width, self.rank) != (other.width, other.rank):
            raise ValueError(f"moments: D, r = {self.width}, {self.rank} and {other.width}, {other.rank} do not add")
        joined = self.to("cpu")
        for place, part in other.to("cpu").parts.items():
            joined.parts[place] = joined.parts[place] + part if place in joined.parts else part
        return joined

    def tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors to save."""
        named: dict[str, Tensor] = {}
        for (level, half), part in sorted(self.parts.items()):
            named |= {f"{level}.{half}.{name}": tensor for name, tensor in part.to("cpu").tensors().items()}
        return named


def _place(digest: str) -> tuple[int, int]:
    # Hashed once more: an image's own digest may be of any kind, and must not be hoped to be uniform.
    number = int.from_bytes(hashlib.sha256(digest.encode()).digest()[:8], "little")
    half, rest = number & 1, number >> 1
    level = next((bit for bit in range(LEVELS - 1) if rest >> bit & 1), LEVELS - 1)
    return level, half


def write_strata(
    path: Path, strata: Strata, metadata: Mapping[str, object], extra: Mapping[str, Tensor] | None = None
) -> None:
    """Save sums as safetensors, atomically; ``metadata`` is stored as strings, ``extra`` tensors beside the sums."""
    from safetensors.torch import save_file

    described = {"format": FORMAT, "width": str(strata.width), "rank": str(strata.rank)}
    described |= {key: str(value) for key, value in metadata.items()}
    files.write(path, lambda temporary: save_file(strata.tensors() | dict(extra or {}), temporary, described))


def read_strata(path: Path) -> tuple[Strata, dict[str, str], dict[str, Tensor]]:
    """Read sums, their metadata and the extra tensors. Raises Flux2PixelError if ``path`` holds something else."""
    tensors, metadata = files.read_tensors(path)
    if metadata.get("format") != FORMAT:
        kind = metadata.get("format", "another kind of file")
        raise Flux2PixelError(f"{path}: holds no sums but {kind}; fit-subspace writes <name>.moments.safetensors")
    try:
        strata = Strata(int(metadata["width"]), int(metadata["rank"]))
        grouped: dict[tuple[int, int], dict[str, Tensor]] = {}
        extra = {}
        for name, tensor in tensors.items():
            level, _, rest = name.partition(".")
            half, _, part = rest.partition(".")
            if level.isdigit() and half.isdigit():
                grouped.setdefault((int(level), int(half)), {})[part] = tensor
            else:
                extra[name] = tensor
        strata.parts = {place: Moments.from_tensors(found) for place, found in grouped.items()}
    except (KeyError, ValueError) as error:
        raise Flux2PixelError(f"{path}: damaged sums ({error}); run fit-subspace again") from error
    return strata, dict(metadata), extra
