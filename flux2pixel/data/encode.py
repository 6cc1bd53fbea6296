"""Making the cache: decode, encode, write shards; killed and started again, it goes on where the last shard ended.

Processes share nothing but the folder: each takes its part of the source and writes shards of its own, named by what
they hold. The first pass needs the VAE alone, the second the text encoder alone.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux2pixel.data import Buckets, Record, Rules, Tally, open_source, stream
from flux2pixel.data.cache import INDEX, MANIFEST, Cache, Key, Shards, caption_digest, read_manifest
from flux2pixel.data.sources import own_source
from flux2pixel.families.configs import read_config
from flux2pixel.models import base as bases
from flux2pixel.models.base import Base
from flux2pixel.recipe import Recipe
from flux2pixel.runtime import device, files, launch
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.progress import bar, log

FORMAT = 1
# A shard is lost work when a kill comes before it is written, and a file to open when it is read.
SHARD_BYTES, SHARD_ROWS = 512 * 2**20, 2048
MAX_TEXT = 512  # tokens; no family's pipeline takes more by default
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Scenes apart from those of the base's own training and of the subspace fit.
FIRST_SCENE = 2_000_000


@dataclass(frozen=True)
class Made:
    """What one process did: the items of its part, (digest, caption, name), what became of the others, and the names
    of those that ``data.exclude`` left out."""

    items: list[tuple[str, str, str]]
    tally: Tally
    excluded: list[str] = field(default_factory=list)


class ShardWriter:
    """Gathers rows and writes them as one safetensors file, whole or not at all, when they are enough."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._tensors: dict[str, list[Tensor]] = {}
        self._digests: dict[str, list[str]] = {}
        self._bytes = 0

    def add(self, group: str, digests: list[str], tensors: dict[str, Tensor]) -> None:
        """Add rows of one group: tensors (len(digests), ...)."""
        prefix = f"{group}." if group else ""
        for name, tensor in tensors.items():
            self._tensors.setdefault(prefix + name, []).append(tensor.cpu())
            self._bytes += tensor.nbytes
        self._digests.setdefault(group, []).extend(digests)
        if self._bytes >= SHARD_BYTES or sum(map(len, self._digests.values())) >= SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is gathered."""
        from safetensors.torch import save_file

        if not self._digests:
            return
        tensors = {name: torch.cat(parts).contiguous() for name, parts in self._tensors.items()}
        text = json.dumps(self._digests)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
        files.write(path, lambda temporary: save_file(tensors, temporary, {"digests": text}))
        self._tensors, self._digests, self._bytes = {}, {}, 0


def open_encoders(recipe: Recipe) -> Base:
    """The base whose encoders make the cache."""
    return bases.open_base(recipe.base, encoders_dtype(recipe))


def encoders_dtype(recipe: Recipe) -> torch.dtype:
    """Of the text encoder: bf16 where the cache is, as float32 would take 32 GB for klein 9B's."""
    return torch.bfloat16 if recipe.data.dtype == "bf16" else torch.float32


def cache_folder(recipe: Recipe, run: Path) -> Path:
    """Where the recipe's cache is: ``data.cache``, a relative one inside the run directory."""
    return run / recipe.data.cache


def key_of(recipe: Recipe, base: Base) -> Key:
    """The key of the cache that the recipe asks for; reads the encoders' weights once to fingerprint them."""
    settings = recipe.data
    return Key(
        format=FORMAT,
        vae=fingerprint(base.folder, ("vae",)),
        text_encoder=fingerprint(base.folder, ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer")),
        patch_size=base.patch_size,
        resolution=settings.resolution,
        max_cut=settings.max_cut,
        enlarge=settings.enlarge,
        dtype=settings.dtype,
        text_length=text_length(base),
        encoders=str(base.dtype).removeprefix("torch."),
    )


def text_length(base: Base) -> int:
    """Most tokens of a prompt: what the families' pipelines take, or fewer if the tokenizer says so."""
    path = base.folder / "tokenizer" / "tokenizer_config.json"
    if not path.is_file():
        return MAX_TEXT
    return min(MAX_TEXT, int(read_config(path).get("model_max_length", MAX_TEXT)))


def fingerprint(folder: Path, parts: tuple[str, ...]) -> str:
    """The Hub commit that a snapshot folder is named by, else the SHA-256 of every file of the parts."""
    if folder.parent.name == "snapshots":
        return f"{folder.parent.parent.name}@{folder.name}"
    total = hashlib.sha256()
    for path in sorted(p for part in parts for p in (folder / part).rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(folder)} {files.digest(path)}\n".encode())
    return total.hexdigest()


def ensure(recipe: Recipe, run: Path, base: Base, gpus: int = 1) -> Cache:
    """Open the recipe's cache; make or complete it first if it is not finished or was asked for other images.

    Sample prompts that it lacks are embedded by themselves. To be called before any process group. Raises UsageError
    if the folder holds a cache of another key.
    """
    folder, key = cache_folder(recipe, run), key_of(recipe, base)
    made: dict[str, Any] = read_manifest(folder) if (folder / MANIFEST).is_file() else {"request": None}
    back = set(made.get("excluded", ())) - set(recipe.data.exclude)  # left out when it was made, wanted now
    if made["request"] != _request(recipe) or back:
        return make(recipe, run, base, gpus, key)
    cache = Cache(folder, key)
    if all(map(cache.has_text, recipe.finetune.prompts)):
        return cache
    log(f"cache: {folder}, sample prompts")
    _run_parts(recipe, folder, base, 1, lambda count: None, images=False)
    return Cache(folder, key)


def make(recipe: Recipe, run: Path, base: Base, gpus: int = 1, key: Key | None = None) -> Cache:
    """Make or complete the cache in ``gpus`` processes (of one GPU each; on CPU otherwise) and open it.

    Raises UsageError for a cache of another key or a bad source, Flux2PixelError for too many unreadable images.
    """
    folder, key = cache_folder(recipe, run), key or key_of(recipe, base)
    source = open_source(recipe.data.source, FIRST_SCENE)
    _start(folder, key)
    limit = recipe.finetune.images
    total = min(filter(None, (limit, source.count)), default=None)
    log(f"cache: {folder}, images of {source.name}, {recipe.data.resolution} pixels squared, {recipe.data.dtype}")
    with bar("cache", total, unit="images") as progress:
        parts = _run_parts(recipe, folder, base, gpus, progress.advance)
    tally, items, excluded = Tally(recipe.data.max_broken), set(), set()
    for part in parts:
        tally.merge(part.tally)
        excluded.update(part.excluded)
        items.update(part.items)
    for line in tally.lines():
        log(line)
    if len(tally.broken) > recipe.data.max_broken:
        raise Flux2PixelError(
            f"{len(tally.broken)} images are unreadable, more than data.max_broken {recipe.data.max_broken}"
        )
    _finish(folder, key, recipe, items, tally, excluded)
    cache = Cache(folder, key)
    log(f"wrote {folder}: {len(cache)} images in {len(cache.buckets)} buckets")
    return cache


def _start(folder: Path, key: Key) -> None:
    """Refuse a folder of another key, even one whose making was killed; note the key before the first shard."""
    begun = folder / "key.json"
    if begun.is_file():
        key.check(json.loads(begun.read_text()), folder)
    elif folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder}: exists and is not a cache; name another data.cache or empty it")
    for name in ("images", "text"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for leftover in (folder / name).glob("*.tmp"):
            leftover.unlink()
    files.write_json(begun, asdict(key))


def _request(recipe: Recipe) -> dict[str, Any]:
    request: dict[str, Any] = {"source": recipe.data.source, "images": recipe.finetune.images}
    if own_source(recipe.data.source):
        request["first_scene"] = FIRST_SCENE
    return request


def _finish(
    folder: Path,
    key: Key,
    recipe: Recipe,
    items: Iterable[tuple[str, str, str]],
    tally: Tally,
    excluded: Collection[str],
) -> None:
    """Write the index and then the manifest. One image with one caption is one item, however often it comes."""
    stored = Shards(folder / "images").rows
    unique = {(digest, caption): name for digest, caption, name in sorted(items, reverse=True) if digest in stored}
    lines = [{"digest": d, "caption": c, "name": unique[d, c]} for d, c in sorted(unique)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files.write(folder / INDEX, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    buckets: dict[str, int] = {}
    for digest, _ in unique:
        group = stored[digest][1]
        buckets[group] = buckets.get(group, 0) + 1
    manifest: dict[str, Any] = {"key": asdict(key), "request": _request(recipe)}
    manifest |= {"digest": hashlib.sha256(text.encode()).hexdigest(), "items": len(lines)}
    manifest |= {"repeated": tally.kept + tally.known - len(lines), "buckets": buckets, "images": tally.as_dict()}
    manifest |= {"excluded": sorted(excluded)}
    files.write_json(folder / MANIFEST, manifest)


def _work(
    recipe: Recipe, folder: Path, base: Path, dtype: torch.dtype | None, rank: int, world: int, images: bool
) -> Made:
    launch.set_threads(recipe.threads, world)
    place = device.choose(recipe.device)
    if place.type in ("cuda", "xpu"):  # no launcher has numbered these processes
        place = torch.device(place.type, rank)
    opened = bases.open_base(base, dtype, device=place)
    return make_part(recipe, folder, opened, rank, world, launch.advance, images=images)


def _run_parts(
    recipe: Recipe, folder: Path, base: Base, world: int, advance: Callable[[int], object], *, images: bool = True
) -> list[Made]:
    """All parts: here if it is one, else in processes of their own; the first failure ends them all.

    A GPU's part always has its own process: what follows, a training, would find this one's memory still taken.
    """
    if world == 1 and device.choose(recipe.device).type == "cpu":
        return [make_part(recipe, folder, base, 0, 1, advance, images=images)]
    parts = [partial(_work, recipe, folder, base.folder, base.dtype, rank, world, images) for rank in range(world)]
    return launch.pooled("cache", parts, advance)


def make_part(
    recipe: Recipe,
    folder: Path,
    base: Base,
    rank: int,
    world: int,
    advance: Callable[[int], object],
    *,
    images: bool = True,
) -> Made:
    """The part of process ``rank`` of ``world``: what is not yet there is encoded and written.

    Sample prompts are captions like any other; without ``images`` they alone are made.
    """
    made = Made([], Tally())
    if images:
        made = _make_images(recipe, folder, base, rank, world, advance)
    captions = {"", *(caption for _, caption, _ in made.items), *recipe.finetune.prompts[rank::world]}
    _make_text(recipe, folder, base, sorted(captions))
    return made


def _make_images(
    recipe: Recipe, folder: Path, base: Base, rank: int, world: int, advance: Callable[[int], object]
) -> Made:
    settings, dtype = recipe.data, DTYPES[recipe.data.dtype]
    done = set(Shards(folder / "images").rows)
    items: list[tuple[str, str, str]] = []
    excluded: list[str] = []
    lock = threading.Lock()

    def known(record: Record, digest: str) -> bool:
        with lock:
            if named := {record.name, digest}.intersection(settings.exclude):
                excluded.extend(named)
                return True
            if digest not in done:
                done.add(digest)  # a second file with the same content
                return False
            items.append((digest, record.caption or "", record.name))
        advance(1)
        return True

    rules = Rules(Buckets(settings.resolution, base.patch_size), settings.max_cut, settings.enlarge, captions=True)
    source, tally = open_source(settings.source, FIRST_SCENE), Tally(settings.max_broken)
    writer = ShardWriter(folder / "images")
    batches = stream(
        source,
        rules,
        settings.batch,
        tally,
        rank=rank,
        world=world,
        limit=recipe.finetune.images,
        known=known,
        threads=max(2, (os.cpu_count() or 1) // world),
    )
    for batch in batches:
        height, width = batch.rgb.shape[-2:]
        latents = base.encode(batch.unit.to(base.device)).to(dtype)
        _finite(latents, f"the VAE gave latents that are not finite in {dtype} for one of", batch.names)
        writer.add(f"{height}x{width}", batch.digests, {"rgb": batch.rgb, "latents": latents})
        items += zip(batch.digests, [caption or "" for caption in batch.captions], batch.names, strict=True)
        advance(len(batch.names))
    writer.flush()
    base.__dict__.pop("vae", None)  # free its memory for the text encoder
    gc.collect()
    return Made(items, tally, excluded)


def _make_text(recipe: Recipe, folder: Path, base: Base, captions: list[str]) -> None:
    """Embed and write what is missing, as many captions at a time as ``data.text_tokens`` allow."""
    dtype, count = DTYPES[recipe.data.dtype], max(1, recipe.data.text_tokens // text_length(base))
    done = Shards(folder / "text").rows
    missing = [caption for caption in captions if caption_digest(caption) not in done]
    writer, shapes = ShardWriter(folder / "text"), None
    for start in range(0, len(missing), count):
        some = missing[start : start + count]
        stored = {n: v.to(dtype) if v.is_floating_point() else v for n, v in base.text(some).items()}
        for name, value in stored.items():
            _finite(value, f"text embeddings {name!r} overflow {dtype}; set data.dtype = bf16; of", some)
        if shapes not in (None, shapes := {name: value.shape[1:] for name, value in stored.items()}):
            writer.flush()  # one shard, one length of text
        writer.add("", [caption_digest(caption) for caption in some], stored)
    writer.flush()


def _finite(values: Tensor, what: str, names: list[str]) -> None:
    if not torch.isfinite(values).all():
        raise Flux2PixelError(f"cache: {what} {', '.join(names[:3])} ...")
