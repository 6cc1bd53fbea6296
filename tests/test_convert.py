"""Conversion on the stock FLUX.2 class with random weights, and the stage's refusals."""

import json

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from safetensors.torch import load_file, save_file

from flux2pixel.asymflow.linalg import polar
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.convert.fold import Float64Throughout, exactness, fold
from flux2pixel.convert.run import convert
from flux2pixel.families.flux2 import Flux2
from flux2pixel.recipe import load
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.weights.subspace import read_subspace, write_subspace


def tiny(channels, guidance_embeds=False):
    torch.manual_seed(1)
    model = Flux2Transformer2DModel(
        in_channels=channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    return model.double().eval()


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.4])
@pytest.mark.parametrize("grid", [(2, 3), (1, 7)])
def test_coupled_sampling_agrees_to_rounding(scale, grid):
    latent, pixel = tiny(16), tiny(192)
    flow = AsymFlow(polar(torch.randn(192, 16, dtype=torch.float64)), scale)
    pixel.load_state_dict(fold(latent.state_dict(), flow.basis, Flux2.projections))
    text = torch.randn(2, 4, 24, dtype=torch.float64)
    noise = torch.randn(2, grid[0] * grid[1], 192, dtype=torch.float64)
    guided = [torch.randn_like(text), text]

    def network(model):
        def call(x, t):
            un, con = (Flux2.call(model, x, t, {"text": e}, grid) for e in guided)
            return un + 3.5 * (con - un)

        return call

    assert exactness(network(latent), network(pixel), flow, noise, steps=40) < 1e-11


def test_the_stock_rotary_embedding_keeps_float64():
    """It rounds to float32, which made the exact test jump from 1e-14 to 1e-9 wherever that flips a last bit."""
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angle = torch.linspace(0, 1, 20, dtype=torch.float64).reshape(5, 4).repeat_interleave(2, 1)
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)))
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, ::2]).flatten(-2)

    def error():
        return (apply_rotary_emb(x, (angle.cos(), angle.sin())) - turned).abs().max()

    assert error() > 1e-9
    with Float64Throughout():
        assert error() < 1e-14


def test_float64_throughout_touches_float64_alone():
    double, half = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float16)
    with Float64Throughout():
        casts = [double.float(), double.to(torch.float32), double.to("cpu", torch.float32)]
        assert {t.dtype for t in [*casts, double.to(dtype=torch.float32)]} == {torch.float64}
        assert double.to(torch.float16).dtype == torch.float16
        assert half.float().dtype == half.to(torch.float32).dtype == torch.float32
    assert double.float().dtype == torch.float32


def test_the_exactness_test_can_fail():
    latent, pixel = tiny(16), tiny(192)
    flow = AsymFlow(polar(torch.randn(192, 16, dtype=torch.float64)), 1.5)
    pixel.load_state_dict(fold(latent.state_dict(), flow.basis, Flux2.projections))
    text, noise = torch.randn(1, 4, 24, dtype=torch.float64), torch.randn(1, 4, 192, dtype=torch.float64)
    wrong = AsymFlow(flow.basis, 1.6)
    error = exactness(
        lambda z, t: Flux2.call(latent, z, 1.01 * t, {"text": text}, (2, 2)),
        lambda x, t: Flux2.call(pixel, x, t, {"text": text}, (2, 2)),
        wrong,
        noise,
        steps=8,
    )
    assert error > 1e-6


def test_klein_9b_keys_are_the_ones_that_change():
    """The published klein 9B configuration on the meta device: both projections exist, bias-free, at these shapes."""
    with torch.device("meta"):
        model = Flux2Transformer2DModel(
            in_channels=128,
            num_layers=8,
            num_single_layers=24,
            num_attention_heads=32,
            attention_head_dim=128,
            joint_attention_dim=12288,
            guidance_embeds=False,
        )
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == 9_078_581_248
    assert state["x_embedder.weight"].shape == (4096, 128)
    assert state["proj_out.weight"].shape == (128, 4096)
    assert "x_embedder.bias" not in state and "proj_out.bias" not in state


@pytest.fixture
def subspace(tmp_path):
    path = tmp_path / "subspace.safetensors"
    write_subspace(path, polar(torch.randn(192, 16, dtype=torch.float64)), torch.tensor(1.7), {"method": "random"})
    return path


def test_stage_writes_a_stock_model_that_proves_itself(tmp_path, subspace):
    recipe = load(None, ["convert.verify_steps=6"])
    folder = convert(recipe, tmp_path, subspace)
    model = Flux2Transformer2DModel.from_pretrained(folder / "transformer")
    assert model.config.in_channels == 192
    record = json.loads((folder / "conversion.json").read_text())
    assert record["exactness"]["max_abs_error"] < 1e-9
    assert set(load_file(folder / "asymflow.safetensors")) == {"basis", "scale"}
    assert convert(recipe, tmp_path, subspace) == folder, "a second run replaces its own output"
    assert not list(tmp_path.glob("*.tmp"))


def test_stage_refuses_what_does_not_fit(tmp_path, subspace):
    recipe = load(None, ["convert.verify_steps=2"])
    flow, _ = read_subspace(subspace)
    alien = tmp_path / "alien.safetensors"
    write_subspace(alien, flow.basis, flow.scale, {"base": "other", "vae_sha256": "0" * 64})
    with pytest.raises(UsageError, match="fitted for base 'other'"):
        convert(recipe, tmp_path, alien)
    write_subspace(alien, polar(torch.randn(48, 16)), flow.scale, {})
    with pytest.raises(UsageError, match="patch size"):
        convert(recipe, tmp_path, alien)
    occupied = tmp_path / "mine"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="not written by flux2pixel"):
        convert(recipe, tmp_path, subspace, occupied)
    assert (occupied / "thesis.txt").read_text() == "precious"
    with pytest.raises(Flux2PixelError, match="nothing was written"):
        convert(load(None, ["convert.verify_steps=2", "convert.tolerance=1e-30"]), tmp_path, subspace)
    assert not (tmp_path / "converted").exists()


def test_subspace_file_refuses_damage(tmp_path, subspace):
    whole = subspace.read_bytes()
    subspace.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Flux2PixelError, match="not a complete safetensors file"):
        read_subspace(subspace)
    save_file({"basis": torch.ones(192, 16), "scale": torch.tensor(1.0)}, subspace, {"format": "flux2pixel.subspace"})
    with pytest.raises(Flux2PixelError, match="orthonormal"):
        read_subspace(subspace)
    with pytest.raises(UsageError, match="no such file"):
        read_subspace(tmp_path / "absent.safetensors")
