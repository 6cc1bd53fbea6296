"""Claim: a training step costs at most 1.08 times its lower bound, and the reference forward costs what it must.

    python benchmarks/finetune_step.py [--repeats 15] [--threads 2]

The lower bound is measured alone in the same process: the trained network's forward and backward, and the frozen base's
forward, on ready inputs. The step is the trainer's own: colours and patches of the images, noise, both forwards, the
loss, backward, global gradient norm, AdamW, the weight average. The two are interleaved; medians are compared. Shapes:
the miniature and a random network of the same class, 512 wide, where the transformer dominates; batch 64.

Seconds are of this process's CPU time in one thread, which other processes of the machine hardly change; ``--wall``
takes the wall clock and ``--threads``.

With LoRA (rank 16) the same: the bound's trained half is the adapted network, its reference half the same network with
adapters off and the original projections.

Then the reference forward in four ways that give the same d_L: by its definition (a converted copy at x_t^L, weights
cast by autocast at every call), by the latent identity of ``objective.py``, the same with the Linear weights cast once,
and with the trained network's own weights, adapters off. Errors are against the first, in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux2pixel import recipe as recipes
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.convert.fold import fold
from flux2pixel.data.cache import Batch
from flux2pixel.finetune.network.trainable import prepare
from flux2pixel.finetune.step.objective import (
    LatentReference,
    Objective,
    SharedReference,
    Velocity,
    autocast,
    draw,
    original,
)
from flux2pixel.finetune.step.trainer import Trainer
from flux2pixel.models import base as bases
from flux2pixel.models.base import Base
from flux2pixel.runtime.processes import Team
from flux2pixel.subspace.estimators import polar

CLOCK = [time.process_time]
OUT = Path(__file__).with_suffix(".json")
WIDE = {"num_attention_heads": 8, "attention_head_dim": 64, "axes_dims_rope": (16, 16, 16, 16), "num_layers": 1}
WIDE |= {"num_single_layers": 3}
LORA = ["finetune.trainable=lora", "finetune.lora_rank=16"]


def networks(wide: bool) -> tuple[Base, nn.Module, nn.Module, AsymFlow]:
    """Base, latent network and its converted one."""
    base = bases.open_base("klein-tiny")
    torch.manual_seed(0)
    flow = AsymFlow(polar(torch.randn(192, 16, dtype=torch.float64)).float(), 1.6)
    config = {k: v for k, v in base.config.items() if not k.startswith("_")} | (WIDE if wide else {})
    latent = base.network_class()(**config) if wide else base.transformer
    pixel = base.network_class()(**base.pixel_config(config))
    pixel.load_state_dict(fold(latent.state_dict(), flow.basis, base.projections, base.pixel_name))
    return base, latent.eval().requires_grad_(False), pixel, flow


def cast_linears(network: nn.Module) -> nn.Module:
    """The frozen network with bf16 Linear weights, as ``stage.build`` makes it."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    return network


def random_batch(count: int) -> Batch:
    """Images of 4 x 4 tokens, their latents and captions of 12 tokens."""
    rgb, latents = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.randn(count, 16, 16)
    return Batch(rgb, latents, {"text": torch.randn(count, 12, 144)}, [""] * count, 8, number=0)


def interleaved(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each work by CLOCK, taken in turn, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            began = CLOCK[0]()
            work()
            if turn:
                seconds[name].append(CLOCK[0]() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def step_against_bound(wide: bool, lora: bool, count: int, repeats: int) -> dict[str, float]:
    """The ratio of claim one for one shape, trained in full or by LoRA."""
    base, latent, pixel, flow = networks(wide)
    recipe = recipes.load(None, ["finetune.steps=1000", *(LORA if lora else ())])
    cast_linears(latent)
    if lora:
        pixel.to(torch.bfloat16)  # as ``stage.open_source`` reads frozen weights
    groups = prepare(pixel, base, recipe.finetune, 0)
    frozen: Velocity = SharedReference(base, pixel, flow.basis) if lora else LatentReference(base, latent)
    objective = Objective(recipe.finetune, base, flow, frozen)
    trainer = Trainer(recipe, pixel, groups, objective, Team(0, 1, torch.device("cpu")))
    batch = random_batch(count)
    sigma, eps = draw(batch, 0, 32.0)
    x = torch.lerp(batch.pixels(), eps, sigma.view(-1, 1, 1))
    z = x if lora else torch.randn(count, 16, 16)

    def trained() -> None:
        pixel.zero_grad()
        with autocast(x.device, "bf16"):
            v = base.call(pixel, x, sigma, batch.conditioning, batch.grid)
        v.backward(torch.ones_like(v))

    @torch.no_grad()
    def reference() -> None:
        with original(pixel) if lora else nullcontext(), autocast(x.device, "bf16"):
            base.call(pixel if lora else latent, z, sigma, batch.conditioning, batch.grid)

    works = {"step": lambda: trainer.advance([batch]), "trained": trained, "reference": reference}
    found = interleaved(works, repeats)
    found["ratio"] = found["step"] / (found["trained"] + found["reference"])
    found["reference_share"] = found["reference"] / found["step"]
    found["trained_parameters"] = float(sum(p.numel() for p in pixel.parameters() if p.requires_grad))
    return found | {"parameters": float(sum(p.numel() for p in pixel.parameters()))}


def references(wide: bool, count: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of d_L by each way, and its largest error against the definition in float32."""
    base, latent, pixel, flow = networks(wide)
    batch = random_batch(count)
    sigma, eps = draw(batch, 0, 32.0)
    lora = recipes.load(None, LORA).finetune
    frozen, adapted = networks(wide)[1:3]
    cast_linears(frozen)
    prepare(adapted, base, lora, 0)
    x0_low = flow.lift(batch.latents)

    @torch.no_grad()
    def definition(precision: str) -> Tensor:
        x_t = torch.lerp(x0_low, eps, sigma.view(-1, 1, 1))
        k, tau = flow.calibrate(sigma)
        with autocast(eps.device, precision):
            v = base.call(pixel, k.view(-1, 1, 1) * x_t, tau, batch.conditioning, batch.grid)
        return x0_low - flow.predict_x0(v.float(), x_t, sigma)

    def ours(velocity: Any, precision: str) -> Tensor:
        settings = recipes.load(None, [f"finetune.precision={precision}"]).finetune
        found = Objective(settings, base, flow, velocity).error(batch, sigma, eps)
        assert found is not None
        return found

    shared = SharedReference(base, adapted.eval(), flow.basis)
    ways = {
        "definition": lambda: definition("bf16"),
        "latent identity": lambda: ours(LatentReference(base, latent), "bf16"),
        "latent identity, weights cast once": lambda: ours(LatentReference(base, frozen), "bf16"),
        "shared weights, adapters off": lambda: ours(shared, "bf16"),
    }
    truth = definition("fp32")
    seconds = interleaved(ways, repeats)
    scale = float(truth.abs().max())
    exact = {
        "definition": 0.0,
        "latent identity": float((ours(LatentReference(base, latent), "fp32") - truth).abs().max()) / scale,
        "shared weights, adapters off": float((ours(shared, "fp32") - truth).abs().max()) / scale,
    }
    same = torch.equal(ways["latent identity"](), ways["latent identity, weights cast once"]())
    rows = {name: {"seconds": value, "ratio": value / seconds["definition"]} for name, value in seconds.items()}
    for name, error in exact.items():
        rows[name]["float32_error"] = error
    rows["latent identity, weights cast once"]["bit_equal_to_latent_identity"] = float(same)
    return rows


def main() -> None:
    """Print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--wall", action="store_true", help="measure by the wall clock instead of CPU time")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    CLOCK[0] = time.perf_counter if args.wall else time.process_time
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    found: dict[str, Any] = {"clock": "wall" if args.wall else "cpu", "threads": args.threads, "repeats": args.repeats}
    for name, wide, count in (("miniature", False, 64), ("512 wide", True, 64)):
        steps = {what: step_against_bound(wide, what == "lora", count, args.repeats) for what in ("full", "lora")}
        found[name] = {"batch": count, "step": steps["full"], "lora_step": steps["lora"]}
        found[name]["reference"] = references(wide, count, args.repeats)
        for what, step in steps.items():
            trained, parameters = step["trained_parameters"] / 1e6, step["parameters"] / 1e6
            print(
                f"{name}, {what} ({trained:.2f} of {parameters:.1f} M parameters, "
                f"batch {count}): step {step['step'] * 1e3:.0f} ms, lower bound "
                f"{(step['trained'] + step['reference']) * 1e3:.0f} ms, ratio {step['ratio']:.3f}; "
                f"reference {step['reference_share']:.1%} of the step"
            )
        for way, row in found[name]["reference"].items():
            print(f"    {way:<40} {row['seconds'] * 1e3:8.1f} ms  {row['ratio']:.3f} of the definition")
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
