"""The four stages on the bundled base, small, through the command line, and what they leave."""

import json

import pytest
import torch
from typer.testing import CliRunner

from flux2pixel.cli import app
from flux2pixel.miniature import world
from flux2pixel.models.model import open_model, seeded_noise
from flux2pixel.recipe import load

SMALL = (
    "fit_subspace.images=500 convert.verify_steps=4 finetune.images=100 finetune.batch=8 finetune.steps=2 "
    "eval.prompts=24 eval.samples=1 eval.fidelity_images=24 sample.steps=4"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    arguments = ["run", "--run", str(folder)]
    for setting in SMALL.split():
        arguments += ["--set", setting]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return folder


def test_report_has_what_scripts_read(run):
    report = json.loads((run / "report.json").read_text())
    assert set(report["models"]) == {"base", "converted", "readout", "finetuned"}
    for model in report["models"].values():
        assert "overall" not in model["geneval"], "24 prompts of 120 are a partial run"
        assert len(model["geneval"]["missing"]) == 480 - 24
        assert set(model["geneval"]["tags"]) == set(world.TAGS)
        assert model["fidelity"]["patch_frechet"] > 0
    assert report["exactness"]["max_abs_error"] < 1e-9
    assert report["detector_ceiling"] > 0.9
    seconds = report["seconds"]
    parts = [seconds[k] for k in ("fit_subspace", "convert", "fit_readout", "finetune", "eval")]
    assert seconds["total"] == pytest.approx(sum(parts)) and min(parts) > 0
    assert {"torch", "diffusers", "flux2pixel"} <= set(report["versions"])
    assert (run / "report.html").is_file()
    assert not (run / "recipe.toml").exists(), "nobody wrote one"


def test_the_converted_model_draws_what_the_base_drew(run):
    """Coupled noise and matched grids: the pixel image is the lift of the base's latent, up to bf16's rounding."""
    recipe = load(None, ["sample.steps=4", "sample.orthogonal=false", "sample.gamut_clamp=false"])
    base, pixel = (
        open_model(path, recipe.sample, subspace=run / "subspace.safetensors")
        for path in (world_base(), run / "converted")
    )
    text, empty = base.text(["a photo of a red circle"]), base.text([""])
    noise = seeded_noise([(0, 0)], 16, 192)
    latent, pixels = (model(text, empty, noise, (32, 32)) for model in (base, pixel))
    z = base.base.encode(latent)
    back = base.base.encode(pixels)
    assert torch.nn.functional.cosine_similarity(z.flatten(), back.flatten(), dim=0) > 0.7


def world_base():
    from flux2pixel.models import base as bases

    return bases.resolve("klein-tiny")


def test_noise_depends_on_its_key_alone():
    alone, together = seeded_noise([(3, 1)], 4, 6), seeded_noise([(0, 0), (3, 1)], 4, 6)
    assert torch.equal(alone[0], together[1])
    assert not torch.equal(together[0], together[1])


def test_generate_takes_the_newest_model(run):
    result = CliRunner().invoke(app, ["generate", "a photo of a red circle", "--run", str(run), "--steps", "2"])
    assert result.exit_code == 0, result.output
    from PIL import Image

    assert Image.open(run / "generated.png").size == (32, 32)
    again = (run / "generated.png").read_bytes()
    CliRunner().invoke(app, ["generate", "a photo of a red circle", "--run", str(run), "--steps", "2"])
    assert (run / "generated.png").read_bytes() == again
