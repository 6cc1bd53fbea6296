"""Claim (c): finetuning beats the latent base's fidelity at no loss of GenEval, given more than the 6-minute recipe.

    python benchmarks/longer_finetune.py [--steps 3000] [--seed 0]

Runs the four stages into ``runs/klein-tiny-long``, prints every model's figures as ratios to the base's, and writes
them, the claims and the training curve to ``longer_finetune.json`` beside this file. Resumes.

The committed figures: trained for 3000 steps, once, with seed 0, by the trainer of commit 45fa8a2 (one process, the
same mathematics, another order of the data), about 20 minutes of two idle cores; scored by the evaluation of c994d9e.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flux2pixel import recipe as recipes
from flux2pixel.convert.run import convert
from flux2pixel.evaluate.run import evaluate
from flux2pixel.finetune.run import finetune
from flux2pixel.runtime import files
from flux2pixel.subspace.run import fit_subspace


def summary(report: dict[str, Any], log: list[dict[str, Any]]) -> dict[str, Any]:
    """What of a report and a training log is kept in the repository."""
    models = {
        name: {"geneval": model["geneval"], "fidelity": model["fidelity"]} for name, model in report["models"].items()
    }
    curve = [[line["step"], line["loss"], line["lam"]] for line in log if "loss" in line]
    settings = {name: report["settings"][name] for name in ("seed", "finetune", "sample", "eval")}
    kept = {name: report[name] for name in ("claims", "paired", "detector_ceiling", "fidelity_ceiling", "versions")}
    return {"settings": settings, "models": models} | kept | {"curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, default=Path("runs/klein-tiny-long"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    overrides = [f"finetune.steps={args.steps}", f"finetune.images={args.images}", f"seed={args.seed}"]
    recipe = recipes.load(None, overrides)
    args.run.mkdir(parents=True, exist_ok=True)
    if not (args.run / "converted").exists():
        fit_subspace(recipe, args.run)
        convert(recipe, args.run)
    if not (args.run / "finetuned").exists():
        finetune(recipe, args.run)
    report = json.loads(evaluate(recipe, args.run).with_suffix(".json").read_text())
    log = [json.loads(line) for line in (args.run / "finetune.jsonl").read_text().splitlines()]
    files.write_json(args.out, summary(report, log))
    base = report["models"]["base"]["fidelity"]
    for name, model in report["models"].items():
        ratios = {k: round(model["fidelity"][k] / base[k], 3) for k in ("patch_frechet", "texture_frechet")}
        overall = model["geneval"]["overall"]
        print(f"{name:>10}: GenEval {overall['score']:.3f}, over the base's: {ratios}")
    for claim in report["claims"]:
        print("holds   " if claim["holds"] else "does not", claim["claim"], "|", claim["figures"])


if __name__ == "__main__":
    main()
