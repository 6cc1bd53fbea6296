"""Where images come from. A source is an ordered list of records; a record is decoded later, in a worker thread.

Written in a recipe as one string:

``NAME``                       the endless world of a registered base, with captions
``photographs``                scikit-learn's two sample photographs, with captions: real pixels without a download
``FOLDER``                     every picture below it; a ``.txt`` file of the same name beside it is its caption, a
                               ``.safetensors`` file its latents: ``latents``, (N, r), normalised, tokens row by row
``MANIFEST.jsonl``             one object a line: ``image`` (path, relative to the manifest) and ``caption``
``SHARDS.tar``                 webdataset tars: a path, a glob (``*.tar``) or braces (``{000..099}.tar``)
``hf:NAME?split=train&...``    a Hugging Face dataset: a Hub id or a folder, with ``config``, ``split``, ``revision``,
                               ``image`` and ``caption`` (columns) and ``streaming=true``
"""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from flux2pixel.data.decode import SUFFIXES, Unreadable
from flux2pixel.families import registry
from flux2pixel.runtime.errors import UsageError

IMAGE_KEYS = ("image", "file_name", "path")
CAPTION_KEYS = ("caption", "text", "prompt")


@dataclass(frozen=True)
class Record:
    """``name``, unique in its source and good for a message; ``caption`` or None; and the encoded picture.

    ``content`` is a path, encoded bytes, an (H, W, 3) uint8 array, or the reason why there is no picture; ``latents``
    the safetensors file of its latent tokens, if they were computed before.
    """

    name: str
    caption: str | None
    content: Path | bytes | np.ndarray | Unreadable
    latents: Path | None = None


class Source(Protocol):
    """``name`` for messages; ``count`` of records, None where only reading tells."""

    name: str

    @property
    def count(self) -> int | None: ...

    def records(self, rank: int = 0, world: int = 1, limit: int = 0) -> Iterator[Record]:
        """The part of process ``rank`` of ``world``, of the first ``limit`` records (0: all).

        Parts are disjoint, their union over ranks is the whole, and each is the same at every call.
        """
        ...


def own_source(spec: str) -> Callable[[int], Source] | None:
    """What opens the endless world of a registered base that has one of this name, from a seed on; None for another."""
    plugins = (registry.plugin(name) for name in registry.names())
    return next((plugin.sources[spec] for plugin in plugins if plugin and spec in plugin.sources), None)


def open_source(spec: str, first_seed: int = 0) -> Source:
    """Open what ``spec`` names (see the module). ``first_seed`` is that of the first picture of an endless world.

    Raises UsageError if there is no such source, or nothing in it.
    """
    from flux2pixel.data import remote

    if (own := own_source(spec)) is not None:
        return own(first_seed)
    if spec == "photographs":
        return Photographs()
    if spec.startswith("hf:"):
        return remote.HuggingFace(spec)
    if spec.endswith(".tar") or spec.startswith("pipe:"):
        return remote.Tars(spec)
    path = Path(spec)
    if path.suffix == ".jsonl":
        return Manifest(path)
    if path.is_dir():
        return Folder(path)
    if path.is_file():
        raise UsageError(f"{spec}: is one file; give a folder, a .jsonl manifest, .tar shards, or hf:NAME")
    raise UsageError(
        f"{spec}: no such image source; give a folder, a .jsonl manifest, .tar shards, hf:NAME or photographs"
    )


def part(records: Iterator[Record], rank: int, world: int, limit: int) -> Iterator[Record]:
    """Every ``world``-th record from ``rank``, of the first ``limit``."""
    return itertools.islice(records, rank, limit or None, world)


class Photographs:
    """scikit-learn's two sample photographs, 427 x 640."""

    name = "scikit-learn's sample photographs"
    count = 2

    def records(self, rank: int = 0, world: int = 1, limit: int = 0) -> Iterator[Record]:
        from sklearn.datasets import load_sample_image

        captions = {"china.jpg": "a photo of a Chinese temple", "flower.jpg": "a photo of a flower"}
        named = (Record(name, caption, load_sample_image(name)) for name, caption in captions.items())
        return part(named, rank, world, limit)


class Folder:
    """Every png, jpg and webp below ``path``, in the order of their paths; hidden folders are left out."""

    def __init__(self, path: Path):
        self.path, self.name = path, str(path)
        self.files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in file.relative_to(path).parts)
        )
        if not self.files:
            raise UsageError(f"{path}: no {', '.join(sorted(SUFFIXES))} in this folder or below it")

    @property
    def count(self) -> int:
        return len(self.files)

    def records(self, rank: int = 0, world: int = 1, limit: int = 0) -> Iterator[Record]:
        for file in self.files[rank : limit or None : world]:
            name = file.relative_to(self.path).as_posix()
            beside, latents = file.with_suffix(".txt"), file.with_suffix(".safetensors")
            try:
                caption = beside.read_text(encoding="utf-8").strip() if beside.is_file() else None
                yield Record(name, caption, file, latents if latents.is_file() else None)
            except (OSError, UnicodeDecodeError) as error:
                yield Record(name, None, Unreadable(f"its caption {beside.name} is not UTF-8 text ({error})"))


class Manifest:
    """A jsonl file, one picture a line; relative paths start at the manifest's own folder."""

    def __init__(self, path: Path):
        self.path, self.name = path, str(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: cannot be read as a jsonl manifest ({error})") from error
        self.rows = [self._row(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not self.rows:
            raise UsageError(f"{path}: the manifest is empty")

    def _row(self, number: int, line: str) -> tuple[str, str | None]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{self.path}:{number}: not JSON ({error.msg}); one object a line") from error
        image = first_of(row, IMAGE_KEYS) if isinstance(row, dict) else None
        if not isinstance(image, str):
            raise UsageError(
                f'{self.path}:{number}: no "image" with a path; write {{"image": "a.jpg", "caption": "..."}}'
            )
        caption = first_of(row, CAPTION_KEYS)
        if caption is not None and not isinstance(caption, str):
            raise UsageError(f'{self.path}:{number}: "caption" is not a string')
        return image, caption

    @property
    def count(self) -> int:
        return len(self.rows)

    def records(self, rank: int = 0, world: int = 1, limit: int = 0) -> Iterator[Record]:
        for image, caption in self.rows[rank : limit or None : world]:
            yield Record(image, caption, self.path.parent / image)


def first_of(table: dict, keys: tuple[str, ...]) -> object:
    """The value of the first of ``keys`` that ``table`` has, else None."""
    return next((table[key] for key in keys if key in table), None)


def expand(pattern: str) -> list[str]:
    """A path, glob or braces to the shards it names, sorted; a pipe or URL is left as it is.

    Raises UsageError if a local shard is not there.
    """
    from webdataset.shardlists import expand_urls

    found: list[str] = []
    for url in expand_urls(pattern):
        if ":" in url.partition("/")[0]:  # http:, s3:, pipe:
            found.append(url)
            continue
        matches = sorted(glob.glob(url)) if glob.has_magic(url) else [url] * Path(url).is_file()
        if not matches:
            raise UsageError(f"{url}: no such shard")
        found += matches
    return found
