"""From images to sums: read and decoded ahead in threads, encoded in batches, added, and saved every minute.

A run that is stopped goes on where it was, with any number of processes: what is saved holds the digests of the images
that are in the sums.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from flux2pixel.asymflow import color, tokens
from flux2pixel.data import Batch, Buckets, Record, Rules, Source, Tally, open_source, stream
from flux2pixel.data.sources import own_source
from flux2pixel.models.base import Base
from flux2pixel.models.digest import vae_digest
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.errors import Flux2PixelError
from flux2pixel.runtime.launch import threads
from flux2pixel.runtime.processes import Team
from flux2pixel.runtime.progress import bar, log
from flux2pixel.subspace.cached import Pairs, cached_pairs, is_cache
from flux2pixel.subspace.moments import Moments
from flux2pixel.subspace.strata import LEVELS, Strata, read_strata, write_strata

# Scenes beyond the miniature's own training set (seeds below 100 000).
FIRST_SCENE = 1_000_000
SAVE_SECONDS = 60.0
_DIGEST = 16  # bytes kept of each image's SHA-256


def image_batches(
    base: Base, recipe: Recipe, tally: Tally, team: Team, done: Counter[str] | None = None
) -> Iterator[Batch]:
    """This process's batches of the recipe's images; those in ``done`` are counted and left out.

    Raises UsageError if the source or the resolution is none, Flux2PixelError if too many images are broken.
    """
    settings = recipe.fit_subspace
    lock = threading.Lock()

    def known(_: Record, digest: str) -> bool:
        with lock:  # decoding threads ask at the same time
            if done is None or not done[digest[: 2 * _DIGEST]]:
                return False
            done[digest[: 2 * _DIGEST]] -= 1
            return True

    # Pictures of their own sizes seldom share one, and would be held back waiting for company.
    batch = settings.batch if settings.resolution or own_source(settings.source) else 1
    rules = Rules(Buckets(settings.resolution, base.patch_size))
    source, limit = open_images(settings.source), settings.images
    place = {"rank": team.rank, "world": team.world}
    yield from stream(source, rules, batch, tally, **place, limit=limit, known=known, threads=threads(recipe.threads))


def open_images(spec: str) -> Source:
    """The image source of a fit. Raises UsageError if there is none."""
    return open_source(spec, FIRST_SCENE)


def token_pairs(base: Base, rgb: Tensor, latents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """sRGB in [0, 1] (B, 3, H, W) to pixel tokens x (B, N, D) in the model's colours and latent tokens z (B, N, r).

    ``latents`` are z, where they were computed before. Raises ValueError if they are not of the base's width.
    """
    if latents is not None and latents.shape[-1] != base.latent_width:
        raise ValueError(f"latents beside it are {latents.shape[-1]} wide, those of the base {base.latent_width}")
    z = base.encode(rgb) if latents is None else latents.to(rgb)
    return tokens.patchify(color.encode(rgb), base.patch_size), z


def token_batches(base: Base, recipe: Recipe, tally: Tally, team: Team, done: list[str]) -> Iterator[Pairs]:
    """This process's token pairs, of images through the VAE or of a training cache, less the images in ``done``."""
    settings = recipe.fit_subspace
    if is_cache(settings.source):
        cached = cached_pairs(base, Path(settings.source), settings.batch, tally, team, settings.images)
        summed = set(done)
        for pairs in cached:
            left = [row for row, digest in enumerate(pairs.digests) if digest[: 2 * _DIGEST] not in summed]
            if left:
                names, digests = ([of[row] for row in left] for of in (pairs.names, pairs.digests))
                yield Pairs(names, digests, pairs.x[left], pairs.z[left])
        return
    for batch in image_batches(base, recipe, tally, team, Counter(done)):
        try:
            x, z = token_pairs(base, batch.unit.to(team.device), batch.latents)
        except ValueError as error:
            raise Flux2PixelError(f"{', '.join(batch.names[:3])}: {error}") from error
        yield Pairs(batch.names, batch.digests, x, z)


def gather(base: Base, recipe: Recipe, team: Team, path: Path) -> tuple[Strata, Tally]:
    """The sums over all images of the recipe, by all processes; ``path`` is where the unfinished sums are saved."""
    saved = Saved(path, fingerprint(base, recipe), team)
    strata, done = saved.read(base)
    tally = Tally(recipe.fit_subspace.max_broken)
    summed = list(done) if team.leads else []
    clock = time.monotonic()
    with bar("fit-subspace", _expected(recipe, team), team.leads, "images") as progress:
        for pairs in token_batches(base, recipe, tally, team, done):
            try:
                strata.add(pairs.digests, pairs.x, pairs.z)
            except ValueError as error:
                raise Flux2PixelError(f"{', '.join(pairs.names[:3])}: {error}") from error
            summed += [digest[: 2 * _DIGEST] for digest in pairs.digests]
            progress.advance(len(pairs.names))
            if time.monotonic() - clock > SAVE_SECONDS:
                saved.write(strata, summed)
                clock = time.monotonic()
    # Another process may still fail; what this one did is kept until the basis is written.
    saved.write(strata, summed)
    return total(strata, tally, team)


def total(strata: Strata, tally: Tally, team: Team) -> tuple[Strata, Tally]:
    """The sums and the tally of all processes, on every one of them; added in float64 on the CPU, once."""
    if team.world == 1:
        return strata, tally
    team.barrier()  # images are of any size, so one process may have read for hours longer
    whole = Strata(strata.width, strata.rank)
    for place in [(level, half) for level in range(LEVELS) for half in (0, 1)]:
        part = strata.parts.get(place, Moments.zeros(strata.width, strata.rank)).to("cpu")
        counts = torch.tensor([part.tokens, part.images])
        for tensor in (part.upper, part.total, counts):
            dist.all_reduce(tensor)
        part.tokens, part.images = counts.tolist()
        if part.images:
            whole.parts[place] = part
    merged = Tally(tally.limit)
    for one in team.gather(tally):
        merged.merge(one)
    return whole, merged


def _expected(recipe: Recipe, team: Team) -> int:
    source, limit = recipe.fit_subspace.source, recipe.fit_subspace.images
    count = None if is_cache(source) else open_images(source).count
    total = min(count, limit) if count and limit else count or limit
    return -(-total // team.world)


def fingerprint(base: Base, recipe: Recipe) -> str:
    """What the sums depend on besides the images: settings of the source, and the VAE's weights."""
    settings = recipe.fit_subspace
    parts = [settings.source, settings.images, settings.resolution, base.patch_size, base.color_space, vae_digest(base)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Saved:
    """Unfinished sums beside ``path``, one file a process: ``subspace.partial-0.safetensors``.

    When a run goes on, its first process takes over all sums and notes whose, so that a file of an earlier process that
    a kill left behind is not counted twice. Machines must share the folder.
    """

    def __init__(self, path: Path, fingerprint: str, team: Team):
        self.fingerprint, self.team = fingerprint, team
        self.stem, self.folder = path.name.removesuffix(".safetensors"), path.parent
        self.id, self.absorbed = uuid.uuid4().hex, set[str]()

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.stem}.partial-*.safetensors"))

    def read(self, base: Base) -> tuple[Strata, list[str]]:
        """The sums so far, all in the first process, and the digests of their images, known to every process."""
        total, done = Strata(base.token_width, base.latent_width), list[str]()
        found = [(file, *read_strata(file)) for file in self.files]
        for file, _, metadata, _ in found:
            if metadata.get("fingerprint") == self.fingerprint:
                self.absorbed.update(metadata["absorbed"].split())
            elif self.team.leads:
                log(f"{file}: sums of other images or settings, left out")
        for _, strata, metadata, extra in found:
            if metadata.get("fingerprint") == self.fingerprint and metadata["id"] not in self.absorbed:
                total = total + strata
                done += [row.numpy().tobytes().hex() for row in extra["digests"]]
                self.absorbed.add(metadata["id"])
        self.team.barrier()  # no file is replaced before all have read it
        if self.team.leads and done:
            log(f"resuming: {len(done)} images are in the sums already")
            self.write(total, done)
        self.team.barrier()
        mine = total if self.team.leads else Strata(base.token_width, base.latent_width)
        return mine.to(self.team.device), done

    def write(self, strata: Strata, digests: list[str]) -> None:
        """Replace this process's file."""
        table = torch.tensor(list(bytes.fromhex("".join(digests))), dtype=torch.uint8).view(-1, _DIGEST)
        mine = self.folder / f"{self.stem}.partial-{self.team.rank}.safetensors"
        absorbed = " ".join(sorted(self.absorbed)) if self.team.leads else ""
        metadata = {"fingerprint": self.fingerprint, "id": self.id, "absorbed": absorbed}
        write_strata(mine, strata, metadata, {"digests": table})

    def remove(self) -> None:
        """Forget the unfinished sums, the first process's last; for when the basis is written."""
        for file in reversed(self.files):
            file.unlink(missing_ok=True)
