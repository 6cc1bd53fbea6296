"""What the tests of training share: a converted miniature, small recipes, and workers that run as processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from flux2pixel import recipe as recipes
from flux2pixel.convert.run import convert
from flux2pixel.subspace.estimators import polar
from flux2pixel.weights.subspace import write_subspace

SMALL = [
    "threads=1",
    "finetune.steps=4",
    "finetune.images=48",
    "finetune.batch=8",
    "finetune.micro_batch=4",
    "finetune.precision=fp32",
    "finetune.save_every=2",
    "finetune.log_every=1",
    "finetune.validation_images=4",
    "finetune.validate_every=2",
    'finetune.prompts=["a photo of a red circle"]',
    "sample.steps=2",
]
LORA = ["finetune.trainable=lora", "finetune.lora_rank=4", "finetune.lora_alpha=4.0"]


def small(*more: str) -> recipes.Recipe:
    return recipes.load(None, [*SMALL, *more])


def new_run(folder: Path) -> Path:
    """A run directory with a converted miniature, on a random basis: training needs no good one."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    path = folder / "subspace.safetensors"
    write_subspace(path, polar(torch.randn(192, 16, dtype=torch.float64)), torch.tensor(1.7), {"method": "random"})
    convert(recipes.load(None, ["convert.verify_steps=2"]), folder, path)
    return folder


def weights(folder: Path, kind: str = "transformer") -> dict[str, torch.Tensor]:
    return load_file(folder / kind / "diffusion_pytorch_model.safetensors")


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}


def python(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS``; with ``check`` a failure shows what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=environment(), timeout=400
    )
    if check and done.returncode:
        raise AssertionError(f"{words} -> {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def flags(recipe: list[str]) -> list[str]:
    return [word for item in recipe for word in ("--set", item)]
