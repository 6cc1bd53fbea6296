"""Every shipped recipe, unchanged but for its paths and counts, walks the whole road by the commands.

The base is the recipe's own, with its published configurations, at reduced depth and width. What cannot be had here
stands in: LPIPS's network, GenEval's detector, and the one process of this machine for a recipe's many.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from finetuning import weights
from PIL import Image
from rehearsal import write_rehearsal
from torch import nn
from typer.testing import CliRunner

from flux2pixel.cli import app
from flux2pixel.evaluate import open_scorers
from flux2pixel.evaluate.geneval import GenEval
from flux2pixel.finetune import build, prepare
from flux2pixel.finetune.network import checkpoint
from flux2pixel.finetune.network.quantise import Int8Linear
from flux2pixel.finetune.step.trainer import Trainer
from flux2pixel.models.folder import read_folder
from flux2pixel.recipe import load

RECIPES = sorted(Path(__file__).parents[1].glob("recipes/klein-[!t]*.toml"))
WORLD = ["finetune.processes=0", "finetune.replicas=1", "threads=1"]  # of this machine; every other key is the recipe's
COMPARED = ("klein-4b", "klein-9b-24gb")  # with a run that was not stopped; of what 9B's others say no more than these
SCORED = ("klein-4b", "klein-9b")  # the others' [eval] and [sample] are klein-9b's, which is asserted
COUNTS = [
    "convert.verify_steps=2",
    "fit_subspace.images=12",
    "fit_subspace.resolution=64",
    "data.resolution=64",
    "finetune.steps=3",
    "finetune.warmup=2",
    "finetune.clip_start=1",
    "finetune.ema_start=1",
    "finetune.log_every=1",
    "finetune.validation_images=4",
    "finetune.validate_every=3",
    "finetune.sample_every=3",
    "finetune.save_every=2",
    "sample.steps=3",
    "sample.height=64",
    "sample.width=64",
    "eval.size=64",
    "eval.prompts=2",
    "eval.samples=1",
]


class StandIn(nn.Module):
    """A map of distances with weights, as LPIPS's: not LPIPS."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        assert one.shape == other.shape and one.shape[1:] == (3, *one.shape[2:]) and one.dtype == torch.float32
        return (self.layer(one) - self.layer(other)).square().mean(1, keepdim=True)


class Blind:
    """Sees nothing in any picture: not GenEval's detector, and it says so."""

    name = "blind"
    detections: dict[str, Any] = {}  # noqa: RUF012

    def look(self, images: Any) -> list[Any]:
        assert all(image.shape == (64, 64, 3) for image in images)
        return [self] * len(images)

    def provenance(self) -> dict[str, Any]:
        return {"name": self.name}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty captioned pictures of smooth gradients, square and wide."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for index in range(20):
        corners = Image.fromarray(rng.integers(0, 255, (2, 2, 3), np.uint8))
        corners.resize((64, 64) if index % 2 else (96, 64), Image.Resampling.BICUBIC).save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(f"a photo of a red circle and {index} blue squares\n")
    return folder


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base's folder by its alias, written once."""
    written: dict[str, Path] = {}

    def folder(alias: str) -> Path:
        if alias not in written:
            written[alias] = write_rehearsal(tmp_path_factory.mktemp("base") / alias, alias, num_single_layers=2)
        return written[alias]

    return folder


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Any:
    """LPIPS and GenEval's detector without their weights, and torchao's step uncompiled, which takes a minute else."""
    for module in (prepare, build):
        monkeypatch.setattr(module, "load_lpips", lambda device="cpu": StandIn().to(device).requires_grad_(False))
    monkeypatch.setattr(open_scorers, "geneval", lambda assets, device, prompts: GenEval(prompts, Blind()))
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def run(*words: Any) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    return result


def settings(*some: str) -> list[str]:
    return [word for one in some for word in ("--set", one)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_walks_the_road(
    path: Path, photos: Path, base_of: Any, stand_ins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, ninth = load(path), load(path.with_name("klein-9b.toml"))
    assert path.stem in SCORED or (recipe.sample, recipe.eval) == (ninth.sample, ninth.eval)
    accumulated = 2 * recipe.finetune.micro_batch
    base, folder = base_of(recipe.base), tmp_path / "run"
    given = ["--recipe", path, "--base", base, "--run", folder]
    given += settings(*WORLD, *COUNTS, f"finetune.batch={accumulated}", f"eval.assets={tmp_path / 'assets'}")
    run("fit-subspace", *given, "--images", photos)
    run("convert", *given)
    run("cache", *given, "--images", photos)
    cached = (folder / "cache" / "cache.json").read_bytes()

    # A signal in the second step: it is finished and saved. What goes on from there ends as what was never stopped.
    if path.stem in COMPARED:
        whole = shutil.copytree(folder, tmp_path / "whole")
    train = ["finetune", *given, "--images", photos]
    advance = Trainer.advance

    def killed(self: Trainer, batches: Any) -> Any:
        if self.state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, batches)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "advance", killed)
        run(*train)
    assert json.loads((folder / "finetune-stopped.json").read_text())["step"] == 2
    assert checkpoint.newest(folder / "checkpoints") is not None and not (folder / "finetuned").exists()
    seen: dict[str, Any] = {}

    def watched(self: Trainer, batches: Any) -> Any:
        stepped = advance(self, batches)
        seen["batches"] = [len(batch.names) for batch in batches]
        seen["moments"] = {type(v).__name__ for entry in self.state.optimizer.state.values() for v in entry.values()}
        seen["perceptual"] = stepped.perceptual
        seen["int8"] = any(isinstance(module, Int8Linear) for module in self.network.modules())
        seen["checkpointing"] = self.network.gradient_checkpointing
        return stepped

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "advance", watched)
        run(*train)
    assert seen["batches"] == [recipe.finetune.micro_batch] * 2
    assert "OptimState8bit" in seen["moments"] and seen["perceptual"] > 0
    assert seen["int8"] == recipe.finetune.frozen_int8 and seen["checkpointing"]
    assert (folder / "cache" / "cache.json").read_bytes() == cached, "the cache that was made ahead"
    assert len(list((folder / "samples").glob("step-*.png"))) == 2
    for kind in ("transformer", "transformer_raw") if path.stem in COMPARED else ():
        if kind == "transformer":
            run(*train, "--run", whole)
        once, again = weights(whole / "finetuned", kind), weights(folder / "finetuned", kind)
        assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once), kind

    # The folder samples as the recipe says, by our commands and by the stock loader.
    sampler = read_folder(folder / "finetuned").sampler
    own = recipe.sample
    assert (sampler.solver, sampler.orthogonal, sampler.shift) == (own.solver, own.orthogonal, own.shift)
    picture = tmp_path / "drawn.png"
    run("generate", "a photo of a red circle", *given, "--size", "64x96", "--out", picture)
    assert Image.open(picture).size == (96, 64)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder / "finetuned", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler" and pipe.config.shift == own.shift
    shape = {"height": 64, "width": 96, "num_inference_steps": 3, "output_type": "np"}
    drawn = pipe(prompt="a photo of a red circle", **shape).images
    assert drawn.shape == (1, 64, 96, 3) and np.isfinite(drawn).all()

    run("verify", folder / "finetuned", "--base", base, "--steps", 2)
    if path.stem not in SCORED:
        return
    (tmp_path / "assets" / "geneval").mkdir(parents=True)
    told = CliRunner().invoke(app, [str(word) for word in ("eval", *given, "--suite", "geneval")])
    assert told.exit_code == 2 and "--suite geneval --fetch" in told.stderr, "weights that are absent, before any image"
    (tmp_path / "assets" / "geneval" / "config.json").write_text("{}")  # the stand-in has no other weights
    run("eval", *given, "--suite", "geneval")
    report = json.loads((folder / "report.json").read_text())
    assert {name: row["geneval"]["images"] for name, row in report["models"].items()} == dict.fromkeys(
        ("base", "converted", "finetuned"), 2
    )
    assert report["models"]["finetuned"]["generation"]["solver"] == own.solver
