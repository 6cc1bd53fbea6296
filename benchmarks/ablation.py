"""The paper's ablation in miniature: plain flow matching, variance reduction, and latent finetuning of the base.

    python benchmarks/ablation.py [--steps 240] [--seeds 3]

Same images, captions, batches, noise levels and steps for every arm; the seed draws the batches, the training noise and
the noise that images are sampled from. Each finished run is one line of ``benchmarks/ablation.jsonl`` (training curve,
fidelity, the verdict of every image), so that an interrupted ablation goes on where it was; lines of other ``--steps``
or ``--images`` are left alone. The table is printed and written to ``benchmarks/ablation.json``:

* GenEval: mean of the six tags, the seeds' images of a prompt pooled; 95 % bootstrap over prompts within their tag.
* Fidelity: mean over the seeds with the 95 % t interval of that mean (three seeds: 4.3 standard errors).
* Differences between arms are paired: by prompt for GenEval, by seed for fidelity.

Latent finetuning is the pixel training with A = I and s = 1, where tau = sigma and x0_hat = z_t - sigma v: one trainer
serves every arm. The perceptual term needs LPIPS's VGG16 weights, which are not part of this repository.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from flux2pixel import recipe as recipes
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.convert.run import convert
from flux2pixel.data import encode
from flux2pixel.data.cache import Batch, Cache
from flux2pixel.evaluate.run import evaluate
from flux2pixel.evaluate.statistics import tag_mean_interval
from flux2pixel.finetune import run as stage
from flux2pixel.finetune.data.loader import Loader
from flux2pixel.finetune.data.order import Order
from flux2pixel.finetune.loss import flow_matching
from flux2pixel.finetune.network.trainable import groups
from flux2pixel.finetune.step.objective import Objective, Parts
from flux2pixel.finetune.step.trainer import Trainer
from flux2pixel.models import base as bases
from flux2pixel.models.base import Base
from flux2pixel.runtime.processes import Team
from flux2pixel.runtime.progress import bar, log
from flux2pixel.subspace.run import fit_subspace

HERE = Path(__file__).parent
TRAINED = ("latent finetuning", "flow matching", "variance reduction")
MEASURES = ("patch_frechet", "texture_frechet", "spectrum_high", "blockiness")
PAIRS = (
    ("variance reduction", "flow matching"),
    ("variance reduction", "latent finetuning"),
    ("variance reduction", "base"),
    ("flow matching", "converted"),
)


class LatentObjective(Objective):
    """Flow matching of the latent base: A = I and s = 1, on the same noise as the pixel arms, projected."""

    def __init__(self, settings: recipes.Finetune, base: Base, basis: Tensor):
        super().__init__(settings, base, AsymFlow(torch.eye(base.latent_width), 1.0))
        self.basis = basis

    def __call__(self, network: nn.Module, batch: Batch, sigma: Tensor, eps: Tensor) -> Parts:
        z0 = batch.latents.float()
        z0_hat = self.predict(network, batch, z0, sigma, eps @ self.basis)
        loss = flow_matching(z0, z0_hat, sigma, self.settings.sigma_min)
        return Parts(loss, loss.detach(), loss.new_zeros(()), loss.new_zeros(()))


def train(arm: str, recipe: recipes.Recipe, run: Path, cache: Cache, folder: Path) -> list[float]:
    """Train one arm, write its averaged model to ``folder``, return the loss of every step."""
    torch.set_flush_denormal(True)
    torch.manual_seed(recipe.seed)
    settings, team = recipe.finetune, Team(0, 1, torch.device("cpu"))
    source = stage.open_source(run / "converted", recipe)
    trainer, origin = stage.build(recipe, source, team), source.folder
    if arm == "latent finetuning":
        base = bases.open_base(recipe.base)
        network, origin = base.transformer.requires_grad_(True), base.folder
        objective = LatentObjective(settings, base, source.flow.basis)
        trainer = Trainer(recipe, network, groups(network, base, settings), objective, team)
    order = Order(cache.counts, settings.batch, recipe.seed)
    steps = range(settings.steps)
    loader, losses = Loader(cache, order, settings.batch, steps, caption_dropout=settings.caption_dropout), []
    with bar(arm, settings.steps) as progress:
        for batches in loader:
            losses.append(trainer.advance(batches).loss)
            progress.advance(note=f"loss {losses[-1]:.4f}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(origin, folder, ignore=shutil.ignore_patterns("transformer"))
    with trainer.state.ema.swapped(trainer.network):
        trainer.network.save_pretrained(folder / "transformer")
    return losses


def one_run(arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train (unless the arm is a starting point) and score one arm with one seed."""
    loss = "variance-reduction" if arm == "variance reduction" else "flow-matching"
    settings = [f"seed={seed}", f"threads={args.threads}", f"finetune.steps={args.steps}", f"finetune.loss={loss}"]
    settings += [f"finetune.images={args.images}", f"eval.samples={args.samples}"]
    recipe = recipes.load(None, [*settings, f"eval.fidelity_images={120 * args.samples}"])
    folder, losses, began = args.run / "arm", [], time.perf_counter()
    if arm in TRAINED:
        cache = encode.ensure(recipe, args.run, bases.open_base(recipe.base))
        began = time.perf_counter()
        losses = train(arm, recipe, args.run, cache, folder)
    else:
        folder = args.run / "converted" if arm == "converted" else bases.resolve(recipe.base)
    seconds = time.perf_counter() - began
    page = evaluate(recipe, args.run, [folder], args.run / "arm.html")
    report = json.loads(page.with_suffix(".json").read_text())
    (figures,) = report["models"].values()
    record = {"arm": arm, "seed": seed, "steps": args.steps, "images": args.images, "train_seconds": round(seconds, 1)}
    record |= {"geneval": figures["geneval"]["overall"]["score"]}
    record |= {"fidelity": {name: figures["fidelity"][name] for name in MEASURES}}
    record |= {"loss": [round(float(np.mean(part)), 5) for part in np.array_split(losses, 12) if len(part)]}
    verdicts = [next(iter(p["verdicts"].values())) for p in report["prompts"]]
    correct = ["".join("01"[v["correct"]] for v in row) for row in verdicts]
    return record | {"tags": [p["tag"] for p in report["prompts"]], "correct": correct}


def by_tag(tags: list[str], scores: np.ndarray) -> dict[str, list[float]]:
    """Group one score per prompt by its tag."""
    return {tag: [float(s) for t, s in zip(tags, scores, strict=True) if t == tag] for tag in dict.fromkeys(tags)}


def mean_interval(values: list[float]) -> list[float]:
    """Mean and 95 % t interval over the seeds; only the mean of a single seed."""
    mean, error = float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else float("nan")
    half = error * float(stats.t.ppf(0.975, len(values) - 1)) if len(values) > 1 else float("nan")
    return [mean, mean - half, mean + half]


def table(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Every arm's figures with intervals, and the paired differences."""
    arms = {arm: [r for r in records if r["arm"] == arm] for arm in dict.fromkeys(r["arm"] for r in records)}
    tags = records[0]["tags"]
    shares = {a: np.array([[row.count("1") / len(row) for row in r["correct"]] for r in rs]) for a, rs in arms.items()}
    found: dict[str, Any] = {"arms": {}, "differences": {}}
    for arm, runs in arms.items():
        found["arms"][arm] = {
            "seeds": [r["seed"] for r in runs],
            "geneval": list(tag_mean_interval(by_tag(tags, shares[arm].mean(0)))),
            "geneval_by_seed": [r["geneval"] for r in runs],
            "train_seconds": float(np.median([r["train_seconds"] for r in runs])),
        } | {name: mean_interval([r["fidelity"][name] for r in runs]) for name in MEASURES}
    for one, other in PAIRS:
        if one in arms and other in arms:
            seeds = sorted({r["seed"] for r in arms[one]} & {r["seed"] for r in arms[other]})
            mine, theirs = ({r["seed"]: r for r in arms[arm]} for arm in (one, other))
            gaps = {m: [mine[s]["fidelity"][m] - theirs[s]["fidelity"][m] for s in seeds] for m in MEASURES}
            geneval = list(tag_mean_interval(by_tag(tags, shares[one].mean(0) - shares[other].mean(0))))
            found["differences"][f"{one} - {other}"] = {"geneval": geneval} | {
                name: mean_interval(values) for name, values in gaps.items()
            }
    return found


def show(found: dict[str, Any]) -> None:
    """Print the table and the differences."""
    for title, rows in (("arm", found["arms"]), ("difference", found["differences"])):
        print(f"\n{title:<40} {'GenEval':<26}" + "".join(f"{name:<30}" for name in MEASURES[:2]))
        for name, row in rows.items():
            cells = [row["geneval"], row["patch_frechet"], row["texture_frechet"]]
            print(f"{name:<40} " + "  ".join(f"{m:+.4f} [{low:+.4f}, {high:+.4f}]" for m, low, high in cells))


def main() -> None:
    """Run what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2, help="images of each of the 120 prompts, by seed")
    parser.add_argument("--runs", type=int, help="stop after so many runs; start it again for the others")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--log", type=Path, default=HERE / "ablation.jsonl")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    if not (args.run / "converted").exists():
        recipe = recipes.load(None, [])
        fit_subspace(recipe, args.run)
        convert(recipe, args.run)
    lines = args.log.read_text().splitlines() if args.log.is_file() else []
    records = [r for r in map(json.loads, lines) if (r["steps"], r["images"]) == (args.steps, args.images)]
    todo = [(arm, seed) for seed in range(args.seeds) for arm in ("base", "converted", *TRAINED)]
    done = {(r["arm"], r["seed"]) for r in records}
    for arm, seed in [run for run in todo if run not in done][: args.runs]:
        record = one_run(arm, seed, args)
        records.append(record)
        with args.log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        log(f"{arm}, seed {seed}: GenEval {record['geneval']:.3f}, {record['fidelity']}")
    found = {"steps": args.steps, "images": args.images} | table(records)
    args.log.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    show(found)


if __name__ == "__main__":
    main()
