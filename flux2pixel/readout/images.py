"""The images of a fit: the user's, or pictures that the base draws itself, decoded by its VAE.

Every random draw is a function of (seed, image), so that no figure depends on batches, their order or who makes them.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from flux2pixel.data import Buckets, Record, Rules, Tally, open_source, stream
from flux2pixel.models.base import Base
from flux2pixel.models.model import open_model
from flux2pixel.models.sampler import Sampler
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.launch import threads
from flux2pixel.runtime.processes import Team

DIGEST = 16  # bytes kept of each image's SHA-256
FIRST_SCENE = 5_000_000  # apart from the miniature's scenes of training, of the subspace and of the true images


@dataclass(frozen=True)
class Images:
    """``rgb`` sRGB in [0, 1] (B, 3, H, W), with captions, digests (hexadecimal), and z (B, N, r) if known already."""

    rgb: Tensor
    captions: list[str]
    digests: list[str]
    z: Tensor | None = None

    def singly(self) -> Iterator[Images]:
        """Each image as a batch of its own."""
        for row, (caption, digest) in enumerate(zip(self.captions, self.digests, strict=True)):
            z = None if self.z is None else self.z[row : row + 1]
            yield Images(self.rgb[row : row + 1], [caption], [digest], z)


def short(digest: str) -> str:
    """The part of a content digest that is kept."""
    return digest[: 2 * DIGEST]


def batches(recipe: Recipe, base: Base, sampler: Sampler, tally: Tally, team: Team, done: set[str]) -> Iterator[Images]:
    """This process's images of the recipe, but for those in ``done``; each content comes once.

    Raises UsageError if the source is none, Flux2PixelError if too many images are broken.
    """
    if not recipe.readout.source:
        yield from _drawn(recipe, base, sampler, team, done)
        return
    settings, seen, lock = recipe.readout, set(done), threading.Lock()

    def known(_: Record, digest: str) -> bool:
        with lock:  # decoding threads ask at the same time
            repeated = short(digest) in seen
            seen.add(short(digest))
            return repeated

    side = settings.resolution or round((sampler.height * sampler.width) ** 0.5)
    rules = Rules(Buckets(side, base.patch_size))
    place = {"rank": team.rank, "world": team.world, "limit": settings.images}
    source = open_source(settings.source, FIRST_SCENE)
    for batch in stream(source, rules, settings.batch, tally, **place, known=known, threads=threads(recipe.threads)):
        captions = [caption or "" for caption in batch.captions]
        yield Images(batch.unit.to(team.device), captions, [short(d) for d in batch.digests], batch.latents)


def _drawn(recipe: Recipe, base: Base, sampler: Sampler, team: Team, done: set[str]) -> Iterator[Images]:
    """Pictures by the base: of ``readout.prompts`` in turn, with its own guidance, else of the empty prompt without."""
    settings, prompts = recipe.readout, read_prompts(recipe.readout.prompts)
    model = open_model(base.folder, device=team.device)
    if not settings.prompts:
        model = replace(model, sampler=replace(model.sampler, guidance=1.0))
    size = (sampler.height, sampler.width)
    name = f"{base.folder.name} {model.sampler} {settings.prompts} {recipe.seed}"
    digests = [short(hashlib.sha256(f"{name} {index}".encode()).hexdigest()) for index in range(settings.images)]
    mine = [i for i in range(team.rank, settings.images, team.world) if digests[i] not in done]
    for first in range(0, len(mine), settings.batch):
        some = mine[first : first + settings.batch]
        captions = [prompts[index % len(prompts)] for index in some]
        text, empty = model.text(captions), model.text([""] * len(some))
        keys = [(recipe.seed * 1_000_003 + 17, index) for index in some]
        rgb = model(text, empty, model.noise(keys, size), size)
        yield Images(rgb, captions, [digests[index] for index in some])


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file, one a line; without a file, the empty prompt. Raises UsageError if unreadable."""
    if not path:
        return [""]
    try:
        found = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"readout.prompts: {path}: cannot be read as text ({error})") from error
    if not found:
        raise UsageError(f"readout.prompts: {path}: holds no prompt; write one a line")
    return found


def draw(seed: int, digest: str, what: str, tokens: int, rank: int) -> tuple[float, Tensor]:
    """A uniform number and Gaussian noise (N, r) float32 that depend on (seed, image, what) alone."""
    number = hashlib.sha256(f"{seed} {digest} {what}".encode()).digest()[:8]
    generator = Generator().manual_seed(int.from_bytes(number, "little") >> 1)
    level = float(torch.rand((), generator=generator, dtype=torch.float64))
    return level, torch.randn(tokens, rank, generator=generator)
