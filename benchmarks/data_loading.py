"""Loading keeps up: a training step waits less than 2 % of its time for data from the cache.

    python benchmarks/data_loading.py [--repeats 5] [--steps 40]

Two measurements. On the miniature (whose step is so short that it is the hardest case in images per second): the share
of a run's time that the step stood still for data, the trainer and its loader as they are, first step left out. At
1024 x 1024 with text of klein 9B's size (17 MB an image): the loader alone, against a plain copy of the same bytes out
of the same mapped files, both from the page cache, interleaved.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from flux2pixel import recipe as recipes
from flux2pixel.convert.run import convert
from flux2pixel.data import encode
from flux2pixel.data.cache import INDEX, MANIFEST, Cache, Key, caption_digest
from flux2pixel.finetune import run as stage
from flux2pixel.finetune.data.loader import Loader
from flux2pixel.finetune.data.order import Order
from flux2pixel.models import base as bases
from flux2pixel.runtime import files
from flux2pixel.runtime.processes import Team
from flux2pixel.subspace.run import fit_subspace


def waited_share(steps: int, repeats: int) -> list[float]:
    """Shares of the time of ``steps`` real steps of the miniature that went into waiting, one a repeat."""
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        overrides = ["fit_subspace.images=500", "convert.verify_steps=4", "finetune.images=2000"]
        recipe = recipes.load(None, overrides)
        fit_subspace(recipe, run)
        convert(recipe, run)
        cache = encode.ensure(recipe, run, bases.open_base(recipe.base))
        team = Team(0, 1, torch.device("cpu"))
        trainer = stage.build(recipe, stage.open_source(run / "converted", recipe), team)
        order = Order(cache.counts, recipe.finetune.batch, recipe.seed)
        for _ in range(repeats):
            loader = Loader(cache, order, recipe.finetune.batch, range(steps + 1), caption_dropout=0.1)
            for number, batches in enumerate(loader):
                if number == 1:
                    began, before = time.perf_counter(), loader.waited
                trainer.advance(batches)
            shares.append((loader.waited - before) / (time.perf_counter() - began))
    return shares


def large_cache(folder: Path, images: int, side: int = 1024, text: tuple[int, int] = (512, 12288)) -> Cache:
    """A cache of random content of the sizes that klein 9B's has at 1024 x 1024."""
    image_digests = [hashlib.sha256(f"image {i}".encode()).hexdigest() for i in range(images)]
    captions = ["", *(f"caption {i}" for i in range(images))]
    writer = encode.ShardWriter(folder / "images")
    for digest in image_digests:
        rgb = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
        writer.add(f"{side}x{side}", [digest], {"rgb": rgb, "latents": torch.randn(1, 4096, 128).bfloat16()})
    writer.flush()
    writer = encode.ShardWriter(folder / "text")
    for caption in captions:
        writer.add("", [caption_digest(caption)], {"text": torch.randn(1, *text).bfloat16()})
    writer.flush()
    items = [{"digest": d, "caption": c, "name": c} for d, c in zip(image_digests, captions[1:], strict=True)]
    index = "".join(json.dumps(item) + "\n" for item in items)
    (folder / INDEX).write_text(index)
    key = asdict(Key(1, "", "", 16, side, 0.2, False, "bf16"))
    files.write_json(folder / MANIFEST, {"key": key, "digest": hashlib.sha256(index.encode()).hexdigest()})
    return Cache(folder)


def loader_rate(images: int, repeats: int) -> tuple[list[float], list[float]]:
    """GB/s of the loader and of a plain copy, one pair a repeat."""
    loaded, copied = [], []
    with tempfile.TemporaryDirectory() as folder:
        cache = large_cache(Path(folder), images)
        shards = [s.tensors(n) for s in (cache._images, cache._text) for n in range(len(s.paths))]
        order, unit = Order(cache.counts, 4, 0), 4
        for _ in range(repeats):
            began, size = time.perf_counter(), 0
            for step in Loader(cache, order, unit, range(images // unit)):
                size += sum(t.nbytes for b in step for t in (b.rgb, b.latents, *b.conditioning.values()))
            loaded.append(size / (time.perf_counter() - began) / 1e9)
            began = time.perf_counter()
            for shard in shards:
                for tensor in shard.values():
                    for row in range(0, len(tensor), unit):
                        tensor[row : row + unit].clone()
            total = sum(t.nbytes for shard in shards for t in shard.values())
            copied.append(total / (time.perf_counter() - began) / 1e9)
    return loaded, copied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--images", type=int, default=64, help="of the large cache, 17 MB each")
    args = parser.parse_args()
    torch.set_num_threads(2)
    shares = waited_share(args.steps, args.repeats)
    print(f"miniature: waits {statistics.median(shares):.2%} of its time ({', '.join(f'{s:.2%}' for s in shares)})")
    loaded, copied = loader_rate(args.images, args.repeats + 1)
    loaded, copied = loaded[1:], copied[1:]  # the first reads the page cache's tables
    ratio = statistics.median(a / b for a, b in zip(loaded, copied, strict=True))
    rate = statistics.median(loaded)
    print(f"1024 x 1024: loader {rate:.2f} GB/s, plain copy {statistics.median(copied):.2f} GB/s, ratio {ratio:.2f}")
    print(f"  {rate / 0.0168:.0f} images/s; the paper's training takes about 1 image/s a GPU")


if __name__ == "__main__":
    main()
