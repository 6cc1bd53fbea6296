"""Drawing with every family: a converted model draws its latent base's picture, from the words on."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from families import write_base
from text_encoders import write_text

from flux2pixel.asymflow import color, tokens
from flux2pixel.convert.run import convert
from flux2pixel.families.base import take
from flux2pixel.models.base import open_base
from flux2pixel.models.model import open_model, seeded_noise
from flux2pixel.recipe import load
from flux2pixel.runtime.errors import UsageError
from flux2pixel.subspace.solvers import polar
from flux2pixel.weights.subspace import read_subspace, write_subspace

FAMILIES = ["flux1-dev", "flux2-dev", "flux3", "qwen-image", "sd3.5-medium", "z-image"]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_converted_and_latent_draw_the_same(tmp_path, name, precision, monkeypatch):
    changes = {"joint_attention_dim": 128} if name == "flux3" else {}
    folder = write_base(tmp_path / "base", name, **changes)
    write_text(folder, name)
    for index in folder.glob("*model_index.json"):
        parts = {part.name: ["transformers", "Any"] for part in folder.iterdir() if part.is_dir()}
        index.write_text(json.dumps(json.loads(index.read_text()) | parts))
    base = open_base(folder)
    basis = polar(torch.randn(base.token_width, base.latent_width, dtype=torch.float64))
    path = tmp_path / "subspace.safetensors"
    write_subspace(path, basis, torch.tensor(1.3), {"method": "random"})
    recipe = load(None, [f"base={folder}", "convert.verify_steps=2"])
    size = (2 * base.patch_size, 3 * base.patch_size)
    # The grid that the pixel model draws on; for the base the same, matched.
    said = load(None, ["sample.steps=3", "sample.guidance=3.5", "sample.shift=19.0", "sample.gamut_clamp=false"]).sample
    written = convert(recipe, tmp_path, path)
    if precision == "float32":  # drawing is in bf16, whose rounding hides what two models differ by
        monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    flow, _ = read_subspace(path)
    latent = open_model(folder, replace(said, gamut_clamp=None), subspace=path)
    # The base's last latents as the pixel model shows them: lifted, not decoded by the VAE.
    monkeypatch.setattr(
        latent.base, "decode", lambda z, h, w: color.decode(tokens.unpatchify(flow.lift(z), base.patch_size, h, w))
    )
    pixel = open_model(written, said)
    noise = seeded_noise([(1, 0), (2, 0)], 6, base.token_width)
    pictures = []
    for model in (latent, pixel):
        text = model.text(["a photo of two red circle", "blue square"])
        empty = take(model.text([""]), torch.zeros(2, dtype=torch.long))
        pictures.append((text, model(text, empty, noise, size)))
    (text, drawn), (again, pixels) = pictures
    assert all(torch.equal(text[key], again[key]) for key in text), "the text encoders travelled with the model"
    assert pixels.shape == (2, 3, *size) and pixels.std() > 0.01
    difference = (pixels - drawn).abs()
    assert difference.max() < 1e-3 if precision == "float32" else difference.mean() < 0.02


def test_guidance_that_a_distilled_model_cannot_take_is_refused(tmp_path):
    folder = write_base(tmp_path / "base", "flux1-schnell")
    base = open_base(folder)
    path = tmp_path / "subspace.safetensors"
    write_subspace(path, polar(torch.randn(base.token_width, base.latent_width)), torch.tensor(1.3), {})
    written = convert(load(None, [f"base={folder}", "convert.verify_steps=2"]), tmp_path, path)
    assert open_model(written).sampler.guidance == 1
    with pytest.raises(UsageError, match="takes no guidance"):
        open_model(written, load(None, ["sample.guidance=3.5"]).sample)
