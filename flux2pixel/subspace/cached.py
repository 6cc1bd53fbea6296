"""Token pairs from a training cache (``flux2pixel cache``): pixels and latents side by side, so that no VAE runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flux2pixel.asymflow import color, tokens
from flux2pixel.data import Tally
from flux2pixel.data.cache import MANIFEST, Shards, read_manifest
from flux2pixel.data.encode import fingerprint
from flux2pixel.models.base import Base
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.processes import Team


@dataclass(frozen=True)
class Pairs:
    """Images as token pairs: ``x`` (B, N, D) and ``z`` (B, N, r), with each image's name and content digest."""

    names: list[str]
    digests: list[str]
    x: Tensor
    z: Tensor


def is_cache(spec: str) -> bool:
    """Whether an image source is the folder of a finished cache."""
    return (Path(spec) / MANIFEST).is_file()


def cached_pairs(base: Base, folder: Path, batch: int, tally: Tally, team: Team, limit: int = 0) -> Iterator[Pairs]:
    """This process's part of the first ``limit`` images of a cache (0: all), in the order in which they are stored.

    Raises UsageError if the cache was made with another VAE or patch size.
    """
    key = read_manifest(folder)["key"]
    if key["vae"] != fingerprint(base.folder, ("vae",)) or key["patch_size"] != base.patch_size:
        raise UsageError(f"{folder}: a cache of another VAE than {base.folder}'s; make one for this base")
    shards = Shards(folder / "images")
    stored = sorted((place, digest) for digest, place in shards.rows.items())
    mine = stored[team.rank : limit or None : team.world]
    for (shard, group), found in itertools.groupby(mine, key=lambda item: item[0][:2]):
        kept = shards.tensors(shard)
        same = list(found)
        for first in range(0, len(same), batch):
            some = same[first : first + batch]
            rows, digests = [place[2] for place, _ in some], [digest for _, digest in some]
            rgb, z = (kept[f"{group}.{name}"][rows].to(team.device) for name in ("rgb", "latents"))
            tally.kept += len(rows)
            yield Pairs(digests, digests, tokens.patchify(color.encode(rgb.float() / 255), base.patch_size), z)
