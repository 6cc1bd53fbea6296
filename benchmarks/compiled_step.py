"""Claim: with ``finetune.compile`` every block is compiled once a class, and the training is the eager one.

    python benchmarks/compiled_step.py [--steps 3] [--repeats 9]

The miniature, trained in full and by LoRA, float32, on the CPU by inductor, with the trainer's own step: losses and
gradient norms of the first steps, compiled against eager from the same weights; seconds that the first step takes for
compiling; then the compiled step against the eager one, in turn, medians, CPU time of this process in one thread.

Found with torch 2.14.1: full training agrees to float32's rounding. With LoRA inductor's gradients of a few lora_B
differ from eager's by up to a quarter of their (small) norm, 6e-5 of the whole gradient's, while ``aot_eager`` gives
eager's bits: the difference is in inductor's kernels, not in what is traced; its cause is not known.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from finetune_step import LORA, interleaved, networks, random_batch

from flux2pixel import recipe as recipes
from flux2pixel.finetune.network.parallel import compile_blocks
from flux2pixel.finetune.network.trainable import prepare
from flux2pixel.finetune.step.objective import LatentReference, Objective, SharedReference, Velocity
from flux2pixel.finetune.step.trainer import Trainer
from flux2pixel.runtime.processes import Team

OUT = Path(__file__).with_suffix(".json")


def trainer(lora: bool, compiled: bool) -> Trainer:
    """The miniature's trainer, as ``stage.build`` makes it, from the same weights every time."""
    base, latent, pixel, flow = networks(wide=False)
    settings = ["finetune.steps=1000", "finetune.precision=fp32", *(LORA if lora else ())]
    recipe = recipes.load(None, settings)
    groups = prepare(pixel, base, recipe.finetune, 0)
    reference: Velocity
    if lora:
        reference = SharedReference(base, pixel, flow.basis)
    else:
        reference = LatentReference(base, latent)
        if compiled:
            compile_blocks(latent)
    if compiled:
        compile_blocks(pixel)
    return Trainer(
        recipe, pixel, groups, Objective(recipe.finetune, base, flow, reference), Team(0, 1, torch.device("cpu"))
    )


def compare(lora: bool, steps: int, repeats: int) -> dict[str, float]:
    """Largest relative differences over the steps, seconds of compiling, ratio of a step."""
    batch = random_batch(16)
    eager, compiled = trainer(lora, compiled=False), trainer(lora, compiled=True)
    found = {"loss": 0.0, "grad_norm": 0.0}
    began = time.perf_counter()
    for step in range(steps):
        theirs = compiled.advance([batch])
        if step == 0:
            found["first_step_seconds"] = time.perf_counter() - began
        ours = eager.advance([batch])
        for name in ("loss", "grad_norm"):
            error = abs(getattr(theirs, name) / getattr(ours, name) - 1)
            found[name] = max(found[name], error)
    pairs = zip(eager.trained, compiled.trained, strict=True)
    found["weights"] = max(float(((a - b).norm() / a.norm().clamp(min=1e-12)).detach()) for a, b in pairs)
    seconds = interleaved(
        {"eager": lambda: eager.advance([batch]), "compiled": lambda: compiled.advance([batch])}, repeats
    )
    return found | seconds | {"ratio": seconds["compiled"] / seconds["eager"]}


def main() -> None:
    """Print and write the differences and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows = {what: compare(what == "lora", args.steps, args.repeats) for what in ("full", "lora")}
    for what, row in rows.items():
        print(
            f"{what}: {args.steps} steps compiled against eager: loss within {row['loss']:.1e}, gradient norm "
            f"{row['grad_norm']:.1e}, weights {row['weights']:.1e} relative; first step "
            f"{row['first_step_seconds']:.0f} s; then {row['compiled'] * 1e3:.0f} ms against "
            f"{row['eager'] * 1e3:.0f} ms, ratio {row['ratio']:.3f}"
        )
    OUT.write_text(json.dumps({"steps": args.steps, "repeats": args.repeats} | rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
