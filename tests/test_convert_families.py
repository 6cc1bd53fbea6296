"""The convert stage on every family, from folder to folder, and its proof where the whole model does not fit."""

import json
import math

import pytest
import torch
from families import TINY, write_base
from typer.testing import CliRunner

from flux2pixel.asymflow.linalg import polar
from flux2pixel.cli import app
from flux2pixel.convert import proof
from flux2pixel.convert.fold import fold_in, fold_out
from flux2pixel.convert.plan import class_shapes
from flux2pixel.convert.run import convert
from flux2pixel.models.base import open_base
from flux2pixel.recipe import load
from flux2pixel.runtime.errors import UsageError
from flux2pixel.weights.subspace import read_subspace, write_subspace


def run(tmp_path, name, **changes):
    """Convert a tiny base of the family with a random subspace; returns base, folder and record."""
    folder = write_base(tmp_path / "base", name, **changes)
    base = open_base(folder)
    basis = polar(torch.randn(base.token_width, base.latent_width, dtype=torch.float64))
    write_subspace(tmp_path / "subspace.safetensors", basis, torch.tensor(1.7), {"method": "random"})
    recipe = load(None, [f"base={folder}", "convert.verify_steps=8"])
    written = convert(recipe, tmp_path, tmp_path / "subspace.safetensors")
    return base, written, json.loads((written / "conversion.json").read_text())


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_family_converts_from_folder_to_folder(tmp_path, name):
    base, written, record = run(tmp_path, name)
    assert record["exactness"]["max_abs_error"] < 1e-9 and record["exactness"]["depth"] == "whole"
    pixel = open_base(written)
    assert type(pixel) is type(base) and type(pixel.transformer) is base.network_class()
    assert (written / "scheduler" / "scheduler_config.json").is_file()
    assert json.loads((written / "asymflow.json").read_text())["family"] == base.family


def test_a_distilled_base_is_converted_with_a_caution(tmp_path, capsys):
    run(tmp_path, "flux1-schnell")
    assert "note: base is distilled to few steps: it takes no guidance" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sd3.5-medium", "z-image", "flux2-klein", "flux3"])
def test_a_model_beyond_memory_is_proven_with_a_block_of_each_kind(tmp_path, name, monkeypatch):
    deep = {"n_layers": 3, "n_refiner_layers": 2} if name == "z-image" else {"num_layers": 4}
    whole = TINY[name].config | deep
    base = open_base(write_base(tmp_path / "probe", name, **deep))
    sizes = [
        8 * sum(map(math.prod, class_shapes(base.network_class(), config).values()))
        for config in (whole, base.shallow(whole))
    ]
    assert sizes[1] < sizes[0]
    monkeypatch.setattr(proof, "available_memory", lambda device: sizes[0] + sizes[1])  # half of it is the budget
    _, _, record = run(tmp_path, name, **deep)
    assert record["exactness"]["depth"] == "one block of each kind"
    assert record["exactness"]["max_abs_error"] < 1e-9


def test_folds_are_the_products_in_every_order_and_shape():
    generator = torch.Generator().manual_seed(0)
    basis = polar(torch.randn(48, 16, dtype=torch.float64, generator=generator))
    weight = torch.randn(5, 16, dtype=torch.float64, generator=generator)
    assert torch.allclose(fold_in(weight, basis), weight @ basis.mT)
    assert torch.allclose(fold_out(weight.mT, basis), basis @ weight.mT)
    assert torch.allclose(fold_out(weight[0], basis), basis @ weight[0])
    kernel = fold_in(weight.view(5, 4, 2, 2), basis)
    assert kernel.shape == (5, 3, 4, 4) and torch.allclose(kernel.flatten(1), weight @ basis.mT)
    # A layer whose rows or columns run ph,pw,c folds to the same function once its tokens are put in c,ph,pw.
    latent_last = weight.view(5, 4, 2, 2).permute(0, 2, 3, 1).flatten(1)
    pixel_last = (weight @ basis.mT).view(5, 3, 4, 4).permute(0, 2, 3, 1).flatten(1)
    assert torch.allclose(fold_in(latent_last, basis, "ph,pw,c"), pixel_last)
    assert torch.allclose(fold_out(latent_last.mT, basis, "ph,pw,c"), pixel_last.mT)
    assert torch.allclose(fold_out(latent_last[0], basis, "ph,pw,c"), pixel_last[0])
    assert fold_in(weight.bfloat16(), basis.float()).dtype == torch.bfloat16
    with pytest.raises(UsageError, match="rank 16 does not fit the base, whose latent tokens have 8 numbers"):
        fold_in(weight[:, :8], basis)


@pytest.mark.parametrize("name", ["flux2-klein", "z-image", "qwen-image"])
def test_without_a_subspace_one_is_fitted_to_the_vae_alone(tmp_path, name, capsys):
    base = open_base(write_base(tmp_path / "base", name))
    words = ["convert", "--base", str(base.folder), "--run", str(tmp_path / "run"), "--set", "convert.verify_steps=4"]
    words += ["--set", "fit_subspace.points=8"]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.output
    record = json.loads((tmp_path / "run" / "converted" / "conversion.json").read_text())
    assert record["exactness"]["max_abs_error"] < 1e-9
    assert record["subspace"]["method"] == "vae-jacobian" and record["subspace"]["images"] == "0"
    said = capsys.readouterr().err + first.output
    assert "vae-jacobian, data-free" in said and "fit-subspace" in said and "--images FOLDER" in said
    flow, metadata = read_subspace(tmp_path / "run" / "subspace.safetensors")
    assert flow.basis.shape == (base.token_width, base.latent_width) and metadata["data_free"] == "True"
    again = CliRunner().invoke(app, [*words, "--overwrite"])
    assert again.exit_code == 0, again.output
    assert "data-free" not in capsys.readouterr().err + again.output, "a second run takes the subspace that is there"
