"""Which guidance draws best in the miniature, on prompts that the suite does not pose.

    python benchmarks/guidance.py runs/klein-tiny [--threads 2]

For every guidance scale, with and without the part parallel to x0_hat: GenEval over those prompts and the Fréchet
distances to true renders of them, for the run's finetuned model, and plain guidance for its latent base. The recipe's
``[sample]`` was chosen from this table, so that the prompts of the suite never decided a setting.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

import numpy as np
import torch

from flux2pixel import recipe as recipes
from flux2pixel.evaluate.fidelity.measures import measure, summarise
from flux2pixel.evaluate.geneval import judge
from flux2pixel.families.base import take
from flux2pixel.miniature import detector, world
from flux2pixel.models import base as bases
from flux2pixel.models.model import open_model, seeded_noise, to_bytes

FIRST_PROMPT, FIRST_RENDER = 5_000_000, 6_000_000
TAG_PROMPTS, SAMPLES, RENDERS = 20, 2, 480


def prompts() -> list[dict]:
    """Metadata of scenes whose captions the suite does not pose, at most TAG_PROMPTS a tag.

    Tags of few captions (one object, counting, colours) are posed in full by the suite and so are absent here.
    """
    posed = {m["prompt"] for m in world.EVAL_METADATA}
    chosen: dict[str, dict[str, dict]] = {tag: {} for tag in world.TAGS}
    for seed in range(FIRST_PROMPT, FIRST_PROMPT + 4000):
        metadata = world.sample(seed).metadata
        of_tag = chosen[metadata["tag"]]
        if metadata["prompt"] not in posed and len(of_tag) < TAG_PROMPTS:
            of_tag[metadata["prompt"]] = metadata
    return [metadata for of_tag in chosen.values() for metadata in of_tag.values()]


def score(folder: Path, run: Path, posed: list[dict], truth: np.ndarray, settings: dict[str, object]) -> str:
    """One row of the table: the model's GenEval and distances at these ``[sample]`` settings."""
    given = tomllib.loads((run / "recipe.toml").read_text()).get("seed", 0) if (run / "recipe.toml").is_file() else 0
    recipe = recipes.load(None, [f"seed={given}", *(f"sample.{k}={str(v).lower()}" for k, v in settings.items())])
    model = open_model(folder, recipe.sample, subspace=run / "subspace.safetensors")
    text, empty = model.text([m["prompt"] for m in posed]), model.text([""])
    latent = bases.open_base("klein-tiny")
    images, count = [], (world.SIZE // latent.patch_size) ** 2
    for sample in range(SAMPLES):
        noise = seeded_noise([(FIRST_PROMPT + p, sample) for p in range(len(posed))], count, latent.token_width)
        every = take(empty, torch.zeros(len(posed), dtype=torch.long))
        images.append(to_bytes(model(text, every, noise, (world.SIZE, world.SIZE))))
    right: dict[str, list[bool]] = {}
    for batch in images:
        for metadata, image in zip(posed, batch, strict=True):
            verdict = judge(
                metadata, detector.detect(image), lambda _, box, image=image: detector.classify_color(image, box)
            )
            right.setdefault(metadata["tag"], []).append(verdict.correct)
    found = measure(*(summarise(some, latent.patch_size) for some in (np.concatenate(images), truth)))
    overall = np.mean([np.mean(row) for row in right.values()])
    figures = f"{found['patch_frechet']:8.4f} {found['texture_frechet']:8.4f} {found['colour_std_error']:8.4f}"
    return f"{overall:8.3f} {figures}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory with a finetuned model")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    posed = prompts()
    drawn = (
        world.sample(FIRST_RENDER + i, metadata=posed[i % len(posed)], held_out=frozenset()) for i in range(RENDERS)
    )
    truth = np.stack([scene.image for scene in drawn])
    tags = {m["tag"] for m in posed}
    print(f"{len(posed)} prompts of {', '.join(sorted(tags))}; {SAMPLES} images each; {RENDERS} true renders")
    print(f"{'model':<10} {'guidance':>8} {'orthogonal':>10} {'GenEval':>8} {'patch':>8} {'texture':>8} {'colour':>8}")
    base, finetuned = bases.resolve("klein-tiny"), args.run / "finetuned"
    rows = [(base, scale, False) for scale in (2.0, 3.0, 4.0)]
    rows += [(finetuned, scale, orthogonal) for scale in (1.5, 2.0, 3.0, 4.0) for orthogonal in (False, True)]
    for folder, scale, orthogonal in rows:
        row = score(folder, args.run, posed, truth, {"guidance": scale, "orthogonal": orthogonal})
        print(f"{folder.name:<10} {scale:8.1f} {orthogonal!s:>10} {row}", flush=True)


if __name__ == "__main__":
    main()
