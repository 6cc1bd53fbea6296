"""Claim: a fit takes little longer than its slowest stage alone, because reading, encoding and adding overlap.

    python benchmarks/fit_end_to_end.py [--images 96] [--rounds 3]

A folder of JPEG files cut from scikit-learn's photographs, resolution 256, the miniature's VAE on the CPU. In one run,
interleaved, medians: decoding alone, the VAE alone on batches decoded before, and the whole fit's pass over the images
(decode, encode, colour, sums, digests). The bar is 1.15 times the slower of the two.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from flux2pixel import recipe as recipes
from flux2pixel.data import Tally
from flux2pixel.models.base import open_base
from flux2pixel.runtime.processes import Team
from flux2pixel.subspace.gather import gather, image_batches


def write_images(folder: Path, count: int) -> None:
    """``count`` JPEG files of 400 x 400 pixels."""
    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for index in range(count):
        photograph = photographs[index % 2]
        top, left = (rng.integers(0, side - 400) for side in photograph.shape[:2])
        Image.fromarray(photograph[top : top + 400, left : left + 400]).save(folder / f"{index:04}.jpg", quality=92)


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    base, alone = open_base("klein-tiny"), Team()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, args.images)
        told = [f'fit_subspace.source="{folder}"', "fit_subspace.resolution=256", "fit_subspace.batch=8"]
        recipe = recipes.load(None, [*told, f"threads={args.threads}"])

        def decoded() -> list[torch.Tensor]:
            return [batch.rgb for batch in image_batches(base, recipe, Tally(), alone)]

        batches = [rgb.float() / 255 for rgb in decoded()]
        base.encode(batches[0])
        stages: dict[str, Callable[[], object]] = {
            "decoding alone": decoded,
            "VAE alone": lambda: [base.encode(rgb) for rgb in batches],
            "the whole pass": lambda: gather(base, recipe, alone, folder / "fit" / "subspace.safetensors"),
        }
        taken: dict[str, list[float]] = {stage: [] for stage in stages}
        for _ in range(args.rounds):
            for stage, work in stages.items():
                taken[stage].append(timed(work))
                for file in (folder / "fit").glob("*"):
                    file.unlink()
    median = {stage: statistics.median(times) for stage, times in taken.items()}
    for stage, times in taken.items():
        print(f"{stage:<16} {median[stage]:7.2f} s   rounds {', '.join(f'{t:.2f}' for t in times)}")
    slowest = max(median["decoding alone"], median["VAE alone"])
    print(f"the whole pass over the slowest stage: {median['the whole pass'] / slowest:.3f}")


if __name__ == "__main__":
    main()
