"""The training cache: pixels, latents and text embeddings on disk, read without copying what is not asked for.

    cache.json             the key (what everything was made with), the request (which images), counts and losses
    index.jsonl            one item a line: content digest, caption, name; the order of the items
    images/*.safetensors   per bucket ``HxW.rgb`` (M, 3, H, W) uint8 and ``HxW.latents`` (M, N, r); digests as metadata
    text/*.safetensors     every tensor of a Conditioning, (K, ...), of one length; captions' digests as metadata; the
                           empty caption and the sample prompts are among them

The index is sorted by content, so it depends neither on the number of processes that made the cache nor on any kill.

    B  images    N = h w  tokens    r  latent width    D = 3 p p  pixel token width
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flux2pixel.asymflow.codec import Codec
from flux2pixel.families.base import Conditioning, stack
from flux2pixel.runtime.errors import Flux2PixelError, UsageError

Size = tuple[int, int]
MANIFEST, INDEX = "cache.json", "index.jsonl"
NOTED_LATER = ("text_length", "encoders")
OPEN_SHARDS = 256  # kept mapped at a time; every one holds a file descriptor


@dataclass(frozen=True)
class Key:
    """What a cache's tensors depend on, besides each image's content and caption. Equal keys, equal tensors.

    ``text_length``: most tokens of a caption; ``encoders``: the dtype that the text encoders computed in.
    """

    format: int
    vae: str
    text_encoder: str
    patch_size: int
    resolution: int
    max_cut: float
    enlarge: bool
    dtype: str
    text_length: int = 0
    encoders: str = ""

    def check(self, stored: dict[str, Any], where: Path) -> None:
        """Raise UsageError naming the first field in which the cache at ``where`` differs from this key.

        A cache that was made before a field was noted is taken at its word.
        """
        for name, wanted in asdict(self).items():
            if stored.get(name, wanted if name in NOTED_LATER else None) != wanted:
                raise UsageError(
                    f"{where}: was made with {name} {stored.get(name)!r}, but now it is {wanted!r}; "
                    "name another data.cache, or delete this one"
                )


@dataclass(frozen=True)
class Batch:
    """Images of one bucket: ``rgb`` (B, 3, H, W) uint8, ``latents`` (B, N, r), ``conditioning`` of (B, ...) tensors.

    ``number`` is the unit's in the training order, a seed that does not depend on the number of processes; ``dropped``
    (B,) tells whose caption was left out.
    """

    rgb: Tensor
    latents: Tensor
    conditioning: Conditioning
    names: list[str]
    patch_size: int
    number: int = -1
    dropped: np.ndarray | None = None

    @property
    def grid(self) -> Size:
        """(h, w) tokens."""
        height, width = self.rgb.shape[-2:]
        return height // self.patch_size, width // self.patch_size

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; copies from pinned memory go on beside computation."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self.conditioning.items()}
        rgb, latents = (t.to(device, non_blocking=True) for t in (self.rgb, self.latents))
        return Batch(rgb, latents, moved, self.names, self.patch_size, self.number, self.dropped)

    def pin(self) -> Batch:
        """The batch in page-locked memory."""
        pinned = {name: value.pin_memory() for name, value in self.conditioning.items()}
        rgb, latents = self.rgb.pin_memory(), self.latents.pin_memory()
        return Batch(rgb, latents, pinned, self.names, self.patch_size, self.number, self.dropped)

    def pixels(self, codec: Codec | None = None) -> Tensor:
        """The images as tokens of a model's pixel space, (B, N, D) float32, on the batch's device."""
        return (codec or Codec(self.patch_size)).encode(self.rgb.float() / 255)


def caption_digest(caption: str) -> str:
    """The key of a caption's embedding."""
    return hashlib.sha256(caption.encode()).hexdigest()


class Shards:
    """The safetensors files of one folder and what they hold, by the digests in their metadata.

    Raises Flux2PixelError naming a file that is damaged.
    """

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self.paths = sorted(folder.glob("*.safetensors"))
        # digest -> (shard, group, row); the group is a bucket's "HxW", or "" for text.
        self.rows: dict[str, tuple[int, str, int]] = {}
        self._open: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._lock = threading.Lock()
        for shard, path in enumerate(self.paths):
            try:
                with safe_open(path, framework="pt") as file:
                    digests = json.loads(file.metadata()["digests"])
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                raise Flux2PixelError(f"{path}: is damaged ({error}); delete it and make the cache again") from error
            for group, names in digests.items():
                self.rows.update({name: (shard, group, row) for row, name in enumerate(names)})

    def tensors(self, shard: int) -> dict[str, Tensor]:
        """All tensors of a shard, mapped: only rows that are read come into memory."""
        from safetensors import safe_open

        with self._lock:  # the loader's thread and a validation may read at once
            if shard in self._open:
                self._open.move_to_end(shard)
            else:
                with safe_open(self.paths[shard], framework="pt") as file:
                    self._open[shard] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)
            return self._open[shard]

    def rows_at(self, group: str, places: np.ndarray) -> list[dict[str, Tensor]]:
        """The rows at ``places`` (B, 2) of (shard, row): for each its (1, ...) tensors, without the group's name."""
        prefix = f"{group}." if group else ""
        return [
            {n.removeprefix(prefix): t[row : row + 1] for n, t in self.tensors(shard).items() if n.startswith(prefix)}
            for shard, row in places.tolist()
        ]


class Cache:
    """A finished cache, opened for reading. Buckets run from the most filled to the least.

    ``buckets`` are (height, width) in pixels, ``counts`` the images in each; an image is (bucket, index). Images whose
    name or content digest is in ``exclude`` are left out; ``excluded`` counts them. Raises UsageError if ``folder``
    holds no finished cache, or one of another ``key`` (None: any), or if nothing of that name was ever in it;
    Flux2PixelError if it is damaged.
    """

    def __init__(self, folder: Path, key: Key | None = None, exclude: Collection[str] = ()):
        self.folder, self.manifest = folder, read_manifest(folder)
        if key is not None:
            key.check(self.manifest["key"], folder)
        self.patch_size = int(self.manifest["key"]["patch_size"])
        self._images, self._text = Shards(folder / "images"), Shards(folder / "text")
        places: dict[Size, list[tuple[int, int, int, int]]] = {}
        names: dict[Size, list[str]] = {}
        index = (folder / INDEX).read_bytes()
        if hashlib.sha256(index).hexdigest() != self.digest:
            raise Flux2PixelError(f"{folder}: {INDEX} is not the one that {MANIFEST} names; run flux2pixel cache again")
        unknown, self.excluded = set(exclude) - set(self.manifest.get("excluded", ())), 0
        for line in index.decode().splitlines():
            item = json.loads(line)
            if named := {item["name"], item["digest"]}.intersection(exclude):
                unknown -= named
                self.excluded += 1
                continue
            try:
                shard, group, row = self._images.rows[item["digest"]]
                text_shard, _, text_row = self._text.rows[caption_digest(item["caption"])]
            except KeyError as error:
                raise Flux2PixelError(
                    f"{folder}: the shard with {item['name']} is missing; make the cache again"
                ) from error
            size = parse_size(group)
            places.setdefault(size, []).append((shard, row, text_shard, text_row))
            names.setdefault(size, []).append(item["name"])
        if unknown:
            raise UsageError(f"data.exclude: no image is called {sorted(unknown)[0]!r} in {folder / INDEX}")
        if not places:
            raise UsageError(f"{folder}: the cache holds no image; its {MANIFEST} says what was dropped or skipped")
        self.buckets = tuple(sorted(places, key=lambda size: (-len(places[size]), size)))
        self.counts = tuple(len(places[size]) for size in self.buckets)
        self._places = [np.array(places[size], np.int32) for size in self.buckets]
        self._names = [names[size] for size in self.buckets]
        shard, _, row = self._text.rows[caption_digest("")]
        self._empty = np.array([shard, row], np.int32)

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def digest(self) -> str:
        """SHA-256 of the index: which images, with which captions, in which order."""
        return str(self.manifest["digest"])

    def names(self, bucket: int, indices: Sequence[int] | np.ndarray) -> list[str]:
        """The images' names, for messages."""
        return [self._names[bucket][int(index)] for index in indices]

    def load(self, bucket: int, indices: Sequence[int] | np.ndarray, dropped: np.ndarray | None = None) -> Batch:
        """Images ``indices`` of ``bucket``; those of ``dropped`` (len(indices),) bool get the empty caption."""
        places = self._places[bucket][np.asarray(indices)]
        height, width = self.buckets[bucket]
        images = self._images.rows_at(f"{height}x{width}", places[:, :2])
        captions = places[:, 2:] if dropped is None else np.where(dropped[:, None], self._empty, places[:, 2:])
        rgb, latents = (torch.cat([image[name] for image in images]) for name in ("rgb", "latents"))
        text = stack(*self._text.rows_at("", captions))
        return Batch(rgb, latents, text, self.names(bucket, indices), self.patch_size, dropped=dropped)

    def empty(self) -> Conditioning:
        """The Conditioning of the empty caption, (1, ...)."""
        return self.text([""])

    def has_text(self, caption: str) -> bool:
        """Whether the caption's embedding is here."""
        return caption_digest(caption) in self._text.rows

    def text(self, captions: Sequence[str]) -> Conditioning:
        """The Conditioning of captions or sample prompts that are here, in their order."""
        rows = [self._text.rows[caption_digest(caption)] for caption in captions]
        return stack(*self._text.rows_at("", np.array([(shard, row) for shard, _, row in rows])))


def parse_size(group: str) -> Size:
    """``"HxW"`` to (H, W)."""
    height, width = group.split("x")
    return int(height), int(width)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The ``cache.json`` of a finished cache. Raises UsageError if there is none."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{folder}: no finished cache ({MANIFEST}) here; make it with flux2pixel cache") from error
    except ValueError as error:
        raise Flux2PixelError(f"{path}: is not JSON; make the cache again") from error
    return manifest
