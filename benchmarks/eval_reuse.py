"""Text encodings once a prompt, not once an image: ``python benchmarks/eval_reuse.py``.

The conditionings of the miniature's 120 prompts x 4 samples through `Texts` on disk, as eval takes them (each distinct
prompt encoded once, in chunks, and read back for every batch), against one call of the encoder an image. Median of
interleaved repeats, both sides in seconds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flux2pixel.evaluate.store import Texts
from flux2pixel.miniature import world
from flux2pixel.models import base as bases

REPEATS = 3
SAMPLES = 4
BATCH = 120


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(name: str, ours: Callable[[], object], peer: Callable[[], object], repeats: int = REPEATS) -> None:
    """Print one line: medians of both sides, run in turn, and their ratio."""
    pairs = [(seconds(peer), seconds(ours)) for _ in range(repeats)]
    theirs, mine = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{name:<8} {theirs:8.2f} s against {mine:8.2f} s: {theirs / mine:.2f} times", flush=True)


def text() -> None:
    base = bases.open_base("klein-tiny")
    prompts = [m["prompt"] for m in world.EVAL_METADATA for _ in range(SAMPLES)]
    base.text(["warm up"])

    def once() -> None:
        with tempfile.TemporaryDirectory() as folder:
            texts = Texts(Path(folder))
            for chunk in texts.missing("encoder", prompts):
                texts.add("encoder", chunk, base.text)
            for first in range(0, len(prompts), BATCH):
                texts.of("encoder", prompts[first : first + BATCH])

    def every_image() -> None:
        for prompt in prompts:
            base.text([prompt])

    compare("text", once, every_image)


if __name__ == "__main__":
    torch.set_num_threads(2)
    text()
