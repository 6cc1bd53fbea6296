"""The sums that every part of a readout is solved from. They add: over batches, processes, machines and files.

M  tokens    a block is a matrix of tokens (M, width); blocks run side by side in one row u, and G = sum u u^T

``level``   h (C) | 1 | z (r) | x (D)             at noise levels drawn over [0, 1], in bins
``last``    f (w w (K + r + 1)) | z_hat (r) | x (D) | h (C)    at the sampler's last noise level

Everything is kept twice: over the images that are fitted, and over those held out. An image's content digest decides
which it is, so that sums of several processes, of an interrupted run or of other images simply add. Held-out errors of
any linear readout are quadratic forms in the held-out sums: no image is kept.

The tokens of one image are one float32 product, added in float64; images of fewer than ``SMALL`` tokens, and float64
features, are multiplied in float64 (as the sums of fit-subspace are, and for its reasons).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from scipy.linalg import blas
from torch import Tensor

from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError

FORMAT = "flux2pixel.readout.sums"
SMALL = 256  # images of fewer tokens are multiplied in float64
HELD_OUT = 8  # one image in so many is held out
BINS = (0.0, 0.1, 0.2, 0.3, 0.6, 1.0)  # edges of the noise levels' bins
Widths = tuple[tuple[str, int], ...]


@dataclass
class Gram:
    """G on and above its diagonal, (W, W) float64, of rows of named blocks; ``tokens`` and ``images`` counted."""

    widths: Widths
    upper: Tensor
    tokens: int = 0
    images: int = 0

    @classmethod
    def zeros(cls, widths: Widths, device: torch.device | str = "cpu") -> Gram:
        """Empty sums of rows that are blocks of these widths, side by side."""
        side = sum(width for _, width in widths)
        return cls(widths, torch.zeros(side, side, dtype=torch.float64, device=device))

    def span(self, name: str) -> slice:
        """Where a block is in a row."""
        start = 0
        for block, width in self.widths:
            if block == name:
                return slice(start, start + width)
            start += width
        raise KeyError(name)

    def get(self, rows: str, columns: str) -> Tensor:
        """sum a b^T of two blocks, (width of a, width of b)."""
        a, b = self.span(rows), self.span(columns)
        if a.start > b.start:
            return self.upper[b, a].mT
        block = self.upper[a, b]
        return block.triu() + block.triu(1).mT if a == b else block

    def add(self, *blocks: Tensor) -> None:
        """Add images: every block (B, N, width), in the order of ``widths``. Raises ValueError for other shapes."""
        if tuple(block.shape[-1] for block in blocks) != tuple(width for _, width in self.widths):
            raise ValueError(f"blocks {[tuple(block.shape) for block in blocks]} are not {self.widths}")
        count, tokens = blocks[0].shape[:2]
        exact = tokens < SMALL or any(block.dtype == torch.float64 for block in blocks)
        rows = torch.cat(
            [block.to(self.upper.device, torch.float64 if exact else torch.float32) for block in blocks], -1
        )
        for part in [rows.flatten(0, 1)] if exact else rows:
            self._update(part)
        self.tokens += count * tokens
        self.images += count

    def _update(self, rows: Tensor) -> None:
        if rows.device.type == "cpu":
            syrk = blas.dsyrk if rows.dtype == torch.float64 else blas.ssyrk
            self.upper += torch.from_numpy(syrk(1.0, rows.contiguous().numpy().T, lower=0))
            return
        # TensorFloat-32 would keep 10 bits of the features.
        fast, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
        try:
            for start in range(0, len(self.upper), 512):
                end = min(start + 512, len(self.upper))
                self.upper[:end, start:end] += rows[:, :end].mT @ rows[:, start:end]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = fast

    def __add__(self, other: Gram) -> Gram:
        """Sums over both sets of images. Raises ValueError if their rows differ."""
        if self.widths != other.widths:
            raise ValueError(f"readout: sums of {self.widths} and of {other.widths} do not add")
        added = self.upper + other.upper.to(self.upper.device)
        return Gram(self.widths, added, self.tokens + other.tokens, self.images + other.images)


@dataclass
class Sums:
    """The grams by name, ``fit.level0``, ..., ``held.last``, and the squared errors of the VAE's reconstructions.

    ``vae`` is (sum of squared errors, tokens) over the held-out images. ``directions`` V (C, K) are those of h that the
    last step sees; None where it sees h itself.
    """

    channels: int
    rank: int
    width: int
    window: int
    directions: Tensor | None = None
    grams: dict[str, Gram] = field(default_factory=dict)
    vae: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    @property
    def level_widths(self) -> Widths:
        """Blocks of a row at any noise level."""
        return (("h", self.channels), ("one", 1), ("z", self.rank), ("x", self.width))

    @property
    def last_widths(self) -> Widths:
        """Blocks of a row at the last noise level."""
        seen = self.channels if self.directions is None else self.directions.shape[1]
        features = self.window**2 * (seen + self.rank + 1)
        return (("f", features), ("z_hat", self.rank), ("x", self.width), ("h", self.channels))

    def part(self, name: str, device: torch.device | str = "cpu") -> Gram:
        """The gram called ``name``, made when first asked for."""
        if name not in self.grams:
            widths = self.last_widths if name.endswith("last") else self.level_widths
            self.grams[name] = Gram.zeros(widths, device)
        return self.grams[name]

    @property
    def images(self) -> int:
        """Images in the sums, fitted and held out."""
        return sum(gram.images for name, gram in self.grams.items() if name.endswith("last"))

    def __add__(self, other: Sums) -> Sums:
        """Sums over both sets of images. Raises ValueError if their features or directions differ."""
        same = (self.channels, self.rank, self.width, self.window)
        if same != (other.channels, other.rank, other.width, other.window):
            raise ValueError("readout: sums of other features do not add")
        mine, theirs = self.directions, other.directions
        if (mine is None) != (theirs is None) or (mine is not None and theirs is not None and not mine.equal(theirs)):
            raise ValueError("readout: sums in other directions of the features do not add")
        total = Sums(*same, self.directions, dict(self.grams), self.vae + other.vae)
        for name, gram in other.grams.items():
            total.grams[name] = total.grams[name] + gram if name in total.grams else gram
        return total

    def to(self, device: torch.device | str) -> Sums:
        """The sums on another device."""
        grams = {n: Gram(g.widths, g.upper.to(device), g.tokens, g.images) for n, g in self.grams.items()}
        return Sums(self.channels, self.rank, self.width, self.window, self.directions, grams, self.vae)

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save; only the triangles are kept."""
        named = {"vae": self.vae.clone()} | ({} if self.directions is None else {"directions": self.directions})
        for name, gram in sorted(self.grams.items()):
            side = len(gram.upper)
            rows, columns = torch.triu_indices(side, side)
            named[f"{name}.triangle"] = gram.upper.cpu()[rows, columns]
            named[f"{name}.counts"] = torch.tensor([gram.tokens, gram.images])
        return named


def held_out(digest: str) -> bool:
    """Whether the image of this content digest is held out: one in ``HELD_OUT``, whatever kind of digest it is."""
    return int.from_bytes(hashlib.sha256(f"held out {digest}".encode()).digest()[:8], "little") % HELD_OUT == 0


def bin_of(sigma: float) -> int:
    """The bin of a noise level in [0, 1]."""
    return next(i for i, edge in enumerate(BINS[1:]) if sigma <= edge or i == len(BINS) - 2)


def write_sums(path: Path, sums: Sums, metadata: Mapping[str, object], digests: Sequence[str] = ()) -> None:
    """Save sums as safetensors, atomically, with the digests (hexadecimal, of one length) of their images."""
    from safetensors.torch import save_file

    table = torch.tensor(list(bytes.fromhex("".join(digests))), dtype=torch.uint8).view(max(len(digests), 1), -1)
    shape = f"{sums.channels} {sums.rank} {sums.width} {sums.window}"
    described = {"format": FORMAT, "shape": shape} | {key: str(value) for key, value in metadata.items()}
    files.write(path, lambda temporary: save_file(sums.tensors() | {"digests": table}, temporary, described))


def read_sums(path: Path) -> tuple[Sums, dict[str, str], list[str]]:
    """Read sums, their metadata and their images' digests. Raises Flux2PixelError if ``path`` holds something else."""
    tensors, metadata = files.read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise Flux2PixelError(f"{path}: holds no sums of a readout; fit-readout writes sums.safetensors")
    try:
        channels, rank, width, window = map(int, metadata["shape"].split())
        sums = Sums(channels, rank, width, window, tensors.get("directions"), vae=tensors["vae"])
        for name in sorted(n.removesuffix(".triangle") for n in tensors if n.endswith(".triangle")):
            gram = sums.part(name)
            gram.upper[tuple(torch.triu_indices(*gram.upper.shape))] = tensors[f"{name}.triangle"]
            gram.tokens, gram.images = tensors[f"{name}.counts"].tolist()
        digests = [row.numpy().tobytes().hex() for row in tensors["digests"]] if tensors["digests"].numel() else []
    except (KeyError, ValueError, RuntimeError) as error:
        raise Flux2PixelError(f"{path}: damaged sums ({error}); run fit-readout again") from error
    return sums, dict(metadata), digests
