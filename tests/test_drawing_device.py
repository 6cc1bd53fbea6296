"""``generate`` and ``eval`` on a GPU, without one: from the command to the file, no device set by hand.

The base is klein 4B's, with its published configurations; a tensor that is left on the CPU fails.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from fake_cuda import CUDA, Numbers, fake, pretend, real
from PIL import Image
from rehearsal import write_rehearsal
from torch._subclasses.fake_tensor import unset_fake_temporarily
from typer.testing import CliRunner

from flux2pixel.cli import app
from flux2pixel.evaluate import columns, open_scorers
from flux2pixel.evaluate.columns import FlowDrawer
from flux2pixel.evaluate.geneval import GenEval
from flux2pixel.evaluate.report import pictures
from flux2pixel.models import model as models
from flux2pixel.runtime import files

pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type", "ignore:CUDA is not available")


class Blind:
    """Sees nothing in any picture."""

    name = "blind"
    detections: dict[str, Any] = {}  # noqa: RUF012

    def look(self, images: Any) -> list[Any]:
        return [self] * len(images)

    def provenance(self) -> dict[str, Any]:
        return {"name": self.name}


def call(*words: Any) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and a run that has its conversion and a readout with every part."""
    home, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    write_rehearsal(home / "base", "flux2-klein-4b")
    (home / "photos").mkdir()
    for index in range(100):
        corners = Image.fromarray(rng.integers(0, 255, (2, 2, 3), np.uint8))
        corners.resize((64, 64), Image.Resampling.BICUBIC).save(home / "photos" / f"{index}.png")
    given = ("--base", home / "base", "--run", home / "run", "--set", "threads=1")
    call(
        "fit-subspace",
        *given,
        "--images",
        home / "photos",
        "--set",
        "fit_subspace.resolution=0",
        "--set",
        "fit_subspace.images=8",
    )
    call("convert", *given, "--set", "convert.verify_steps=1")
    small = ("readout.resolution=64", "readout.batch=25", "readout.window=1", "readout.directions=32")
    call("fit-readout", *given, "--images", home / "photos", *(word for one in small for word in ("--set", one)))
    return home


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine that has one, whose weights and files are read as real tensors; lists where images were drawn."""
    drawn: list[torch.device] = []
    pretend(monkeypatch)
    for kind in (diffusers.ModelMixin, transformers.PreTrainedModel):
        monkeypatch.setattr(kind, "from_pretrained", classmethod(real(kind.from_pretrained.__func__)))
    monkeypatch.setattr(files, "read_tensors", real(files.read_tensors))
    for module, name in (
        (models, "seeded_noise"),
        (models, "read_folder"),
        (models, "read_subspace"),
        (columns, "read_folder"),
        (pictures, "read_subspace"),
    ):
        monkeypatch.setattr(module, name, real(getattr(module, name)))
    save = safetensors.torch.save_file

    def saved(tensors: dict[str, torch.Tensor], *rest: Any) -> None:
        assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}, "files are written from host memory"
        with unset_fake_temporarily():
            save({name: torch.ones(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}, *rest)

    monkeypatch.setattr(safetensors.torch, "save_file", saved)
    draw = models.Model.__call__

    def seen(self: Any, *args: Any) -> torch.Tensor:
        images = draw(self, *args)
        drawn.append(images.device)
        return images

    monkeypatch.setattr(models.Model, "__call__", seen)
    return drawn


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("run/converted", "heun"),
        ("run/converted", "unipc"),
        ("run/readout", "euler"),
        ("run/readout", "unipc"),
        ("base", "euler"),
    ],
)
def test_generate_draws_where_it_says(name: str, solver: str, made: Path, gpu: list[torch.device], tmp_path: Path):
    words = ["generate", "a photo of a red circle", "--run", made / "run", "--model", made / name]
    words += ["--size", "32x48", "--steps", 3, "--solver", solver, "--out", tmp_path / "drawn.png"]
    numbers = Numbers()
    numbers.truth = False  # UniPC's wrapper asks if its noise levels were changed
    with fake(numbers):
        said = call(*words).stderr
    assert "on cuda:0 (some GPU)" in said and gpu == [CUDA]
    assert Image.open(tmp_path / "drawn.png").size == (48, 32)


def test_eval_draws_every_column_where_it_says(
    made: Path, gpu: list[torch.device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "geneval").mkdir()
    (tmp_path / "geneval" / "config.json").write_text("{}")
    monkeypatch.setattr(open_scorers, "geneval", lambda assets, device, prompts: GenEval(prompts, Blind()))
    opened: list[FlowDrawer] = []
    start = FlowDrawer.open
    monkeypatch.setattr(FlowDrawer, "open", lambda self: opened.append(self) or start(self))
    words = ["eval", "--run", made / "run", "--suite", "geneval", "--steps", 2, "--out", tmp_path / "report.html"]
    for setting in (f"eval.assets={tmp_path}", "eval.size=32", "eval.prompts=2", "eval.samples=1", "threads=1"):
        words += ["--set", setting]
    with fake(Numbers()):
        said = call(*words).stderr
    assert "draws and scores on cuda:0 (some GPU)" in said
    assert len(opened) == 3 and gpu == [CUDA] * 3
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["models"]) == ["base", "converted", "readout"]
