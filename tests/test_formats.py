"""Formats in and out: the released adapter, LoRA files, Black Forest Labs' names; every key lands or is refused."""

import json
import re
import shutil

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_base import CONFIG, tiny_transformer, write_tiny_base

from flux2pixel.asymflow.linalg import polar
from flux2pixel.cli.convert import parse_lora
from flux2pixel.convert.export import export, extract, lora_layer, released_config
from flux2pixel.convert.plan import class_shapes
from flux2pixel.convert.prepare import Extras
from flux2pixel.convert.run import convert
from flux2pixel.families.flux2 import Flux2
from flux2pixel.models import base as bases
from flux2pixel.recipe import load
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.weights import bfl
from flux2pixel.weights.checkpoint import open_checkpoint
from flux2pixel.weights.subspace import write_subspace

KLEIN_9B = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
INNER, RANK = 32, 4


@pytest.fixture
def base(tmp_path):
    return write_tiny_base(tmp_path / "base")


@pytest.fixture
def recipe(base):
    return load(None, [f"base={base}", "convert.verify_steps=2"])


@pytest.fixture
def subspace(tmp_path):
    path = tmp_path / "subspace.safetensors"
    write_subspace(path, polar(torch.randn(192, 16, dtype=torch.float64)), torch.tensor(1.7), {"method": "random"})
    return path


@pytest.fixture
def adapter(tmp_path):
    """A file as the released one is: no prefix, no alpha, fp16, buffers in bf16; written from the published table."""
    torch.manual_seed(4)
    tensors = {
        "x_embedder.weight": torch.randn(INNER, 192),
        "proj_out.weight": torch.randn(192, INNER),
        "norm_out.linear.weight": torch.randn(2 * INNER, INNER),
    }
    layers = {
        "transformer_blocks.0.ff.linear_in": (6 * INNER, INNER),
        "transformer_blocks.0.ff.linear_out": (INNER, 3 * INNER),
        "transformer_blocks.0.ff_context.linear_in": (6 * INNER, INNER),
        "transformer_blocks.0.ff_context.linear_out": (INNER, 3 * INNER),
        "single_transformer_blocks.0.attn.to_out": (INNER, 4 * INNER),
        "single_transformer_blocks.1.attn.to_out": (INNER, 4 * INNER),
        "time_guidance_embed.timestep_embedder.linear_1": (INNER, 16),
        "time_guidance_embed.timestep_embedder.linear_2": (INNER, INNER),
    }
    for name, (rows, columns) in layers.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, columns) / 4
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, RANK) / 4
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    tensors["proj_buffer"] = polar(torch.randn(192, 16, dtype=torch.float64)).bfloat16()
    tensors["scale_buffer"] = torch.tensor(1.25).bfloat16()
    path = tmp_path / "adapter.safetensors"
    save_file(tensors, path)
    return path


def state_of(folder):
    tensors = {}
    for path in (folder / "transformer").glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


# The released adapter ---------------------------------------------------------------------------------------------


def test_the_published_table_is_what_klein_9b_gives():
    """121 tensors of these names and shapes: the table of the released file against our lists on the real shapes."""
    shapes = class_shapes(Flux2Transformer2DModel, KLEIN_9B | {"in_channels": 768, "out_channels": 768})
    full = {"x_embedder.weight": (4096, 768), "proj_out.weight": (768, 4096), "norm_out.linear.weight": (8192, 4096)}
    assert full.items() <= shapes.items()
    layers = {name: shape for name, shape in shapes.items() if lora_layer(name, Flux2)}
    assert len(full) + 2 + 2 * len(layers) == 121
    expected = {f"single_transformer_blocks.{i}.attn.to_out.weight": (4096, 16384) for i in range(24)}
    for i in range(8):
        for stream in ("ff", "ff_context"):
            expected[f"transformer_blocks.{i}.{stream}.linear_in.weight"] = (24576, 4096)
            expected[f"transformer_blocks.{i}.{stream}.linear_out.weight"] = (4096, 12288)
    expected["time_guidance_embed.timestep_embedder.linear_1.weight"] = (4096, 256)
    expected["time_guidance_embed.timestep_embedder.linear_2.weight"] = (4096, 4096)
    assert layers == expected


@pytest.mark.parametrize("onto", ["plain", "converted"])
def test_every_key_of_an_adapter_lands(tmp_path, base, recipe, subspace, adapter, onto):
    if onto == "converted":
        convert(recipe, tmp_path, subspace)
        recipe = load(None, [f"base={tmp_path / 'converted'}", "convert.verify_steps=2"])
    out = convert(recipe, tmp_path, out=tmp_path / "adapted", extras=Extras(adapter=adapter))
    given, before, after = load_file(adapter), state_of(base), state_of(out)
    landed = set()
    for name, tensor in after.items():
        module = name.removesuffix(".weight")
        expected = before.get(name)
        if name in given:
            expected = given[name]
            landed.add(name)
        elif f"{module}.lora_A.weight" in given:
            a, b = given[f"{module}.lora_A.weight"].float(), given[f"{module}.lora_B.weight"].float()
            expected = before[name].float() + b @ a
            landed |= {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
        assert torch.equal(tensor, expected.bfloat16()), name
    assert landed | {"proj_buffer", "scale_buffer"} == set(given)
    stored = load_file(out / "asymflow.safetensors")
    assert (stored["basis"] - given["proj_buffer"].float()).abs().max() < 2e-3 and stored["scale"] == 1.25
    assert (stored["basis"].T @ stored["basis"] - torch.eye(16)).abs().max() < 1e-6, "orthonormal again"
    record = json.loads((out / "conversion.json").read_text())
    assert record["exactness"] is None and len(record["adapter_sha256"]) == 64
    index = json.loads((out / "model_index.json").read_text())
    assert (index["shift"], index["shift_side"], index["steps"]) == (17.0, 1024, 38) and index["gamut_clamp"]


def spoil(adapter, change):
    tensors = load_file(adapter)
    change(tensors)
    save_file(tensors, adapter)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({"stray.weight": torch.zeros(2)}), r"stray\.weight matches nothing"),
        (lambda t: t.update({"x.lora_A.weight": torch.zeros(2, 3), "x.lora_B.weight": torch.zeros(4, 2)}), "x.weight"),
        (lambda t: t.pop("x_embedder.weight"), r"it lacks x_embedder\.weight"),
        (lambda t: t.update({"proj_out.weight": torch.zeros(192, 33)}), r"shape \(192, 33\), the model's is"),
        (lambda t: t.pop("transformer_blocks.0.ff.linear_in.lora_B.weight"), "only one half"),
        (lambda t: t.pop("scale_buffer"), "come together"),
        (lambda t: t.update({"proj_buffer": torch.ones(192, 16)}), "orthonormal"),
        (lambda t: t.update({"proj_buffer": torch.eye(48, 16)}), "for another base"),
        (lambda t: t.update({"x_embedder.weight": torch.full((32, 192), float("nan"))}), "NaN or infinite"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_whole(tmp_path, recipe, adapter, change, said):
    spoil(adapter, change)
    with pytest.raises(Flux2PixelError, match=said):
        convert(recipe, tmp_path, extras=Extras(adapter=adapter))
    assert not (tmp_path / "converted").exists()


def finetuned_from(converted, folder, *, lora=True, beside=True):
    """A folder as a finetune leaves it: merged weights, and ``adapter.safetensors`` with alpha and rank apart."""
    shutil.copytree(converted, folder)
    torch.manual_seed(8)
    state = {name: tensor.float() for name, tensor in state_of(folder).items()}
    trained = {}
    for name in list(state):
        module = name.removesuffix(".weight")
        if name in ("x_embedder.weight", "proj_out.weight", "norm_out.linear.weight"):
            state[name] += torch.randn_like(state[name]) / 8
            trained[name] = state[name]
        elif lora and lora_layer(name, Flux2):
            rows, columns = state[name].shape
            a, b = torch.randn(RANK, columns) / 4, torch.randn(rows, RANK) / 4
            trained |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            state[name] += 2 * b @ a
    shutil.rmtree(folder / "transformer")
    model = Flux2Transformer2DModel(**CONFIG | {"in_channels": 192, "out_channels": 192})
    model.load_state_dict(state)
    model.save_pretrained(folder / "transformer")
    if beside:
        save_file(trained, folder / "adapter.safetensors", {"lora_alpha": "8", "lora_rank": "4"})
    (folder / "finetune.json").write_text(json.dumps({"from": str(converted)}))
    return folder


@pytest.mark.parametrize("beside", [True, False])
def test_what_was_trained_leaves_in_the_released_format_and_comes_back(tmp_path, recipe, subspace, beside):
    """LoRA as it was trained, or extracted from the difference of the weights; then loaded onto the plain base."""
    wide = ["convert.dtype=fp32", "convert.verify_steps=2"]
    converted = convert(load(None, [f"base={recipe.base}", *wide]), tmp_path, subspace)
    model = finetuned_from(converted, tmp_path / "finetuned", beside=beside)
    out = export(model, tmp_path / "out" / "adapter.safetensors", "adapter", rank=RANK)
    tensors = load_file(out)
    assert {t.dtype for n, t in tensors.items() if "buffer" not in n} == {torch.float16}
    assert tensors["proj_buffer"].dtype == torch.bfloat16 and tensors["scale_buffer"].shape == ()
    assert len(tensors) == 3 + 2 + 2 * 8 and not any("alpha" in name for name in tensors)
    config = json.loads((out.parent / "config.json").read_text())
    assert config["_class_name"] == "AsymFlux2Transformer2DModel" and config["base_rank"] == 16
    again = convert(
        load(None, [f"base={recipe.base}", *wide]), tmp_path, out=tmp_path / "again", extras=Extras(adapter=out)
    )
    want, have = state_of(model), state_of(again)
    assert want.keys() == have.keys()
    for name in want:
        assert (want[name].float() - have[name].float()).abs().max() < 4e-3 * want[name].abs().max(), name


def test_config_of_klein_9b_is_the_published_one(tmp_path, recipe, subspace):
    converted = convert(recipe, tmp_path, subspace)
    base = bases.open_base(converted)
    described = released_config(base, converted)
    assert described["in_channels"] == 3 and described["patch_size"] == 8 and described["sigma_min"] == 1e-4
    published = "_class_name in_channels patch_size base_rank num_layers num_single_layers num_attention_heads "
    published += "attention_head_dim joint_attention_dim guidance_embeds axes_dims_rope rope_theta mlp_ratio "
    published += "num_timesteps timestep_guidance_channels eps sigma_min"
    assert set(described) == set(published.split())


def test_what_the_format_cannot_hold_is_refused(tmp_path, recipe, subspace):
    converted = convert(recipe, tmp_path, subspace)
    model = finetuned_from(converted, tmp_path / "finetuned")
    path = next((model / "transformer").glob("*.safetensors"))
    spoil(path, lambda t: t["transformer_blocks.0.attn.to_q.weight"].add_(1))
    with pytest.raises(Flux2PixelError, match=r"no place for transformer_blocks\.0\.attn\.to_q\.weight"):
        export(model, tmp_path / "x.safetensors", "adapter", rank=RANK)
    with pytest.raises(Flux2PixelError, match="nothing to export"):
        export(converted, tmp_path / "x.safetensors", "adapter", converted)
    with pytest.raises(UsageError, match="--against"):
        export(converted, tmp_path / "x.safetensors", "lora")
    assert not (tmp_path / "x.safetensors").exists()


# LoRA files -------------------------------------------------------------------------------------------------------


def lora_file(folder, naming):
    torch.manual_seed(9)
    a, b = torch.randn(RANK, INNER) / 4, torch.randn(INNER, RANK) / 4
    module = "transformer_blocks.0.attn.to_q"
    if naming == "peft":
        layers = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        Flux2KleinPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
        return folder / "pytorch_lora_weights.safetensors", b @ a
    path = folder / "kohya.safetensors"
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, path)
    return path, b @ a


def test_a_lora_is_merged_before_the_fold(tmp_path, base, recipe, subspace):
    path, change = lora_file(tmp_path, "peft")
    out = convert(recipe, tmp_path, subspace, extras=Extras(loras=((path, 0.5),)))
    before, after = state_of(base), state_of(out)
    name = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(after[name], (before[name].float() + 0.5 * change).bfloat16())
    same = [n for n in before if before[n].shape == after[n].shape and torch.equal(before[n], after[n])]
    assert len(same) == len(before) - 3
    record = json.loads((out / "conversion.json").read_text())
    assert record["loras"][0]["strength"] == 0.5
    assert record["exactness"]["max_abs_error"] < 1e-11, "the merged model is what the converted one equals"


def test_a_lora_on_the_projections_is_folded_too(tmp_path, base, recipe, subspace):
    a, b = torch.randn(RANK, 16), torch.randn(INNER, RANK)
    path = tmp_path / "lora.safetensors"
    save_file({"transformer.x_embedder.lora_A.weight": a, "transformer.x_embedder.lora_B.weight": b}, path)
    out = convert(recipe, tmp_path, subspace, extras=Extras(loras=((path, 1.0),)))
    basis = load_file(out / "asymflow.safetensors")["basis"].double()
    merged = state_of(base)["x_embedder.weight"].float() + b @ a
    expected = (merged.double() @ basis.T).bfloat16()
    assert (state_of(out)["x_embedder.weight"].float() - expected.float()).abs().max() < 0.02 * expected.abs().max()
    assert json.loads((out / "conversion.json").read_text())["exactness"]["max_abs_error"] < 1e-11


def test_original_names_of_a_lora_are_translated(tmp_path, base, recipe, subspace):
    path, change = lora_file(tmp_path, "original")
    out = convert(recipe, tmp_path, subspace, extras=Extras(loras=((path, 1.0),)))
    name = "transformer_blocks.0.attn.to_out.0.weight"
    assert torch.equal(state_of(out)[name], (state_of(base)[name].float() + change).bfloat16())


def test_a_lora_that_matches_nothing(tmp_path, recipe, subspace):
    path = tmp_path / "lora.safetensors"
    pair = {
        "transformer.nowhere.lora_A.weight": torch.zeros(2, 3),
        "transformer.nowhere.lora_B.weight": torch.zeros(4, 2),
    }
    save_file(pair, path)
    with pytest.raises(Flux2PixelError, match=r"nowhere\.weight matches nothing"):
        convert(recipe, tmp_path, subspace, extras=Extras(loras=((path, 1.0),)))
    assert parse_lora(f"{path}:0.25") == (path, 0.25) and parse_lora(str(path)) == (path, 1.0)
    for wrong in ("absent.safetensors", f"{path}:much"):
        with pytest.raises(UsageError, match="FILE:STRENGTH"):
            parse_lora(wrong)


def test_an_extracted_lora_is_the_change(tmp_path, recipe, subspace):
    """What ``load_lora_weights`` loads, on the converted model, gives the finetuned weights back."""
    wide = ["convert.dtype=fp32", "convert.verify_steps=2"]
    converted = convert(load(None, [f"base={recipe.base}", *wide]), tmp_path, subspace)
    model = finetuned_from(converted, tmp_path / "finetuned")
    out = export(model, tmp_path / "lora.safetensors", "lora", rank=64)
    network = Flux2Transformer2DModel.from_pretrained(converted / "transformer")
    network.load_lora_adapter(load_file(out))
    network.fuse_lora()
    network.unload_lora()
    want = state_of(model)
    for name, tensor in network.state_dict().items():
        assert (tensor - want[name]).abs().max() < 1e-4 * want[name].abs().max(), name
    delta = torch.randn(40, 6) @ torch.randn(6, 30)
    a, b, missed = extract(delta, 6)
    assert missed < 1e-5 and torch.allclose(b @ a, delta, atol=1e-3)
    assert 0.05 < extract(delta, 3)[2] < 1


# Black Forest Labs' names -----------------------------------------------------------------------------------------


def test_a_single_file_of_original_names_converts_like_the_folder(tmp_path, base, recipe, subspace):
    """The file is made by diffusers' inverse: its own converter, given the file, must return the base's tensors."""
    latent = open_checkpoint(base / "transformer")
    original = {name: stored.read() for name, stored in bfl.to_bfl(latent.tensors).items()}
    before = state_of(base)
    theirs = convert_flux2_transformer_checkpoint_to_diffusers(dict(original))
    assert theirs.keys() == before.keys() and all(torch.equal(theirs[n], before[n]) for n in before)
    halves = before["norm_out.linear.weight"].chunk(2)
    assert torch.equal(original["final_layer.adaLN_modulation.1.weight"], torch.cat(halves[::-1]))
    path = tmp_path / "flux.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}, path)
    plain = convert(recipe, tmp_path, subspace, tmp_path / "plain")
    single = convert(recipe, tmp_path, subspace, tmp_path / "single", Extras(weights=path))
    one, other = state_of(plain), state_of(single)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert Flux2Transformer2DModel.from_pretrained(single / "transformer").config.in_channels == 192


def test_a_single_file_of_stock_names(tmp_path, recipe, subspace):
    path = tmp_path / "mine.safetensors"
    save_file(tiny_transformer(seed=2).state_dict(), path)
    out = convert(recipe, tmp_path, subspace, extras=Extras(weights=path))
    name = "context_embedder.weight"
    assert torch.equal(state_of(out)[name], load_file(path)[name])
    spoil(path, lambda t: t.update({"double_blocks.0.img_attn.odd": torch.zeros(2)}))
    with pytest.raises(Flux2PixelError, match=r"double_blocks\.0\.img_attn\.odd \(2,\) is extra"):
        convert(recipe, tmp_path, subspace, tmp_path / "other", Extras(weights=path))


def test_a_pixel_model_leaves_under_the_original_names(tmp_path, recipe, subspace, capsys):
    converted = convert(recipe, tmp_path, subspace)
    out = export(converted, tmp_path / "pixel.safetensors", "bfl")
    assert "ComfyUI" in capsys.readouterr().err
    tensors = load_file(out)
    assert tensors.pop("proj_buffer").dtype == torch.float32 and tensors.pop("scale_buffer") == torch.tensor(1.7)
    assert not any(re.match("transformer_blocks", name) for name in tensors)
    theirs, ours = convert_flux2_transformer_checkpoint_to_diffusers(dict(tensors)), state_of(converted)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    with safe_open(out, framework="pt") as file:
        assert "pixel" in file.metadata()["flux2pixel.model"] and "verify_steps" in file.metadata()["recipe"]


def test_other_families_have_no_such_format(tmp_path, recipe, subspace):
    converted = convert(recipe, tmp_path, subspace)
    with pytest.raises(UsageError, match=r"must end in \.safetensors"):
        export(converted, tmp_path / "pixel.ckpt", "bfl")
    with pytest.raises(UsageError, match=r"no asymflow\.json"):
        export(tmp_path, tmp_path / "pixel.safetensors", "bfl")
