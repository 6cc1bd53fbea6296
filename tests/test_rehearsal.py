"""Every published base walks the road by the commands (fit-subspace to generate) and loads with stock classes."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from rehearsal import REHEARSED, SCALE, write_rehearsal
from typer.testing import CliRunner

from flux2pixel.cli import app
from flux2pixel.families.known import KNOWN
from flux2pixel.models.base import open_base, stored_dtype
from flux2pixel.weights.subspace import read_subspace


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six pictures of smooth gradients, 64 pixels square."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for index in range(6):
        corners = Image.fromarray(rng.integers(0, 255, (2, 2, 3), np.uint8))
        corners.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    return result


@pytest.mark.parametrize("alias", REHEARSED)
def test_a_published_base_walks_the_road(alias, photos, tmp_path, caplog):
    base, runs = write_rehearsal(tmp_path / "base", alias), tmp_path / "run"
    caplog.clear()
    given = ("--base", base, "--run", runs, "--set", "threads=1")
    run("fit-subspace", *given, "--images", photos, "--set", "fit_subspace.resolution=0")
    scale = float(read_subspace(runs / "subspace.safetensors")[0].scale)
    assert 0.5 * SCALE < scale < 2 * SCALE
    run("convert", *given, "--set", "convert.verify_steps=2")
    proof = json.loads((runs / "converted" / "conversion.json").read_text())
    assert proof, "a record of the conversion"
    assert stored_dtype(runs / "converted" / "transformer") == torch.bfloat16
    picture = tmp_path / "drawn.png"
    run("generate", "a photo of a red circle", *given, "--steps", 2, "--height", 32, "--width", 48, "--out", picture)
    assert Image.open(picture).size == (48, 32)
    repeated = [one.getMessage() for one in caplog.records if one.name == "diffusers.configuration_utils"]
    assert not repeated, "an unknown key is named once, with its file"


@pytest.mark.parametrize("alias", REHEARSED)
def test_the_folder_is_the_stock_pipelines(alias, tmp_path):
    """Stock diffusers and transformers load every part by the published index, with the published keys alone."""
    folder = write_rehearsal(tmp_path / "base", alias)
    for part in ("transformer", "vae"):
        written = json.loads((folder / part / "config.json").read_text())
        assert written.keys() == KNOWN[alias].configs[part].keys()
    if alias.startswith("flux3"):  # a modular pipeline, which names its parts otherwise
        base = open_base(folder)
        assert base.transformer is not None and base.vae is not None and base.text(["a"])
        return
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline).__name__ == KNOWN[alias].configs["model_index"]["_class_name"]
    assert type(pipeline.transformer).__name__ == KNOWN[alias].transformer_class
