"""The proof proves what was written: wrong folds, spoiled copies and touched folders are refused."""

import json
import shutil

import pytest
import torch
from families import TINY, write_base
from safetensors.torch import load_file, save_file
from tiny_base import CONFIG, write_tiny_base
from typer.testing import CliRunner

from flux2pixel.asymflow.linalg import polar
from flux2pixel.cli import app
from flux2pixel.convert import compare, fold, plan, proof
from flux2pixel.convert.prepare import Extras
from flux2pixel.convert.run import convert
from flux2pixel.convert.verify import verify
from flux2pixel.models.base import open_base
from flux2pixel.recipe import Convert, load
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.memory import available_memory
from flux2pixel.weights import write
from flux2pixel.weights.subspace import write_subspace

QUICK = Convert(verify_steps=2)


def subspace_for(base, path):
    basis = polar(torch.randn(base.token_width, base.latent_width, dtype=torch.float64))
    write_subspace(path, basis, torch.tensor(1.7), {"method": "random"})
    return path


def run(tmp_path, name, *more, **given):
    """Convert a tiny base of the family; returns the written folder."""
    folder = tmp_path / "base"
    if not folder.exists():
        write_base(folder, name)
    subspace = subspace_for(open_base(folder), tmp_path / "subspace.safetensors")
    return convert(load(None, [f"base={folder}", "convert.verify_steps=2", *more]), tmp_path, subspace, **given)


def along(wide, width, change):
    """``change`` a fold along its pixel axis, which is the one of ``width`` numbers."""
    flat = wide.flatten(1) if wide.ndim == 4 else wide
    axis = 1 if flat.ndim == 2 and flat.shape[1] == width else 0
    return change(flat.movedim(axis, -1)).movedim(-1, axis).reshape(wide.shape)


def flipped(wide):
    wide = wide.clone()
    place = wide.abs().argmax()
    wide.view(-1)[place] = -wide.view(-1)[place]
    return wide


WRONG = {
    "scaled": lambda wide, width: 1.5 * wide,
    "transposed": lambda wide, width: along(
        wide, width, lambda w: w.unflatten(-1, (3, int((width // 3) ** 0.5), -1)).mT.flatten(-3)
    ),
    "swapped": lambda wide, width: along(wide, width, lambda w: w.roll(width // 2, -1)),
    "flipped": lambda wide, width: flipped(wide),
}


@pytest.mark.parametrize("wrong", sorted(WRONG))
@pytest.mark.parametrize("name", ["flux2-klein", "sd3.5-medium", "z-image"])
@pytest.mark.parametrize("side", ["in", "out"])
def test_a_wrong_fold_is_refused_and_nothing_is_left(tmp_path, monkeypatch, name, wrong, side):
    """The fold is spoiled where it is computed, so that what is written is what was computed, and both are wrong."""
    honest = plan.fold_tensor

    def spoiled(key, tensor, basis, projections):
        wide = honest(key, tensor, basis, projections)
        module = key.rpartition(".")[0]
        if key.endswith("weight") and (module == projections.output) == (side == "out"):
            return WRONG[wrong](wide, len(basis)).contiguous()
        return wide

    monkeypatch.setattr(plan, "fold_tensor", spoiled)
    with pytest.raises(Flux2PixelError, match=r"weight differs from what was computed in float64 at \["):
        run(tmp_path, name)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("converted")]


def test_stored_weights_that_sample_worse_than_their_dtype_are_refused(tmp_path, monkeypatch):
    """The second bar by itself: the comparison of tensors is taken out, and the sampling sees the wrong fold."""
    honest = plan.fold_tensor
    monkeypatch.setattr(plan, "fold_tensor", lambda *given: 1.5 * honest(*given))
    monkeypatch.setattr(compare, "_compare", lambda *given: (0.0, []))
    with pytest.raises(Flux2PixelError, match="weights as stored are off by"):
        run(tmp_path, "flux2-klein", "convert.dtype=bf16")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("name", sorted(TINY))
def test_two_ways_of_folding_agree(tmp_path, name):
    base = open_base(write_base(tmp_path, name))
    basis = polar(torch.randn(base.token_width, base.latent_width, dtype=torch.float64))
    state = base.transformer.state_dict()
    for key in fold.folded_names(base.projections) & state.keys():
        one = fold.fold_tensor(key, state[key].double(), basis, base.projections)
        other = compare.refold(key, state[key].double(), basis, base.projections)
        assert one.shape == other.shape and torch.allclose(one, other, atol=1e-12), key


def test_a_copy_that_went_wrong_is_refused(tmp_path, monkeypatch):
    honest = write.copy_range

    def careless(source, target, start, size):
        honest(source, target, start, size)
        if size > 600:
            target.seek(-4, 1)
            target.write(b"\x01\x02\x03\x04")

    monkeypatch.setattr(write, "copy_range", careless)
    with pytest.raises(Flux2PixelError, match="is not what was copied from"):
        run(tmp_path, "flux2-klein")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("number", [0, 1])
def test_without_the_kernels_copy_bytes_go_through_a_buffer(tmp_path, monkeypatch, number):
    def refuse(*given):
        raise OSError((18, 38)[number], "no")

    expected = {path.name: path.read_bytes() for path in (run(tmp_path, "flux2-klein") / "transformer").iterdir()}
    monkeypatch.setattr(write.os, "copy_file_range", refuse)
    found = {path.name: path.read_bytes() for path in (run(tmp_path, "flux2-klein") / "transformer").iterdir()}
    assert found.keys() == expected.keys()
    for name in found:
        assert len(found[name]) == len(expected[name])


# An existing folder ----------------------------------------------------------------------------------------------


def change(folder, name, edit):
    """Edit a tensor of a written model in place."""
    for path in (folder / "transformer").glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            edit(tensors[name])
            save_file(tensors, path, {"format": "pt"})
            return
    raise AssertionError(name)


@pytest.fixture
def converted(tmp_path):
    folder = write_tiny_base(tmp_path / "base")
    subspace = subspace_for(open_base(folder), tmp_path / "subspace.safetensors")
    return convert(load(None, [f"base={folder}", "convert.verify_steps=2"]), tmp_path, subspace)


def test_a_converted_folder_is_proven_again(converted, tmp_path):
    found = verify(converted, settings=QUICK)
    assert found.max_abs_error < 1e-12 < found.stored_error < found.stored_bar and found.fold_error <= 1
    assert found.tensors["folded"] == 2 and found.tensors["equal"] > 10
    shutil.move(tmp_path / "base", tmp_path / "moved")
    result = CliRunner().invoke(app, ["verify", str(converted), "--base", str(tmp_path / "moved"), "--steps", "2"])
    assert result.exit_code == 0, result.output
    with pytest.raises(UsageError):
        verify(converted, settings=QUICK)
    with pytest.raises(UsageError, match=r"no asymflow\.json"):
        verify(tmp_path, settings=QUICK)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("transformer_blocks.0.attn.to_q.weight", "is not the base's, bit for bit"),
        ("context_embedder.weight", "is not the base's, bit for bit"),
        ("x_embedder.weight", "differs from what was computed"),
        ("proj_out.weight", "differs from what was computed"),
    ],
)
def test_one_changed_element_is_found(converted, name, said):
    change(converted, name, lambda tensor: tensor[3, :1].mul_(-1))
    with pytest.raises(Flux2PixelError, match=said) as caught:
        verify(converted, settings=QUICK)
    assert name in str(caught.value)


def test_another_scale_is_found(converted):
    """Any scale samples exactly; that it is the fitted one only the record tells."""
    tensors = load_file(converted / "asymflow.safetensors")
    save_file(tensors | {"scale": torch.tensor(1.8)}, converted / "asymflow.safetensors")
    with pytest.raises(Flux2PixelError, match="not the basis and scale that the conversion wrote"):
        verify(converted, settings=QUICK)


def test_another_configuration_is_found(converted):
    path = converted / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 10000}))
    with pytest.raises(Flux2PixelError, match="rope_theta is 10000"):
        verify(converted, settings=QUICK)


def test_a_finetuned_folder_has_its_trunk_and_recovery_proven(converted, tmp_path):
    """What a LoRA training may change is left out; all else must be the base's."""
    tuned = tmp_path / "finetuned"
    shutil.copytree(converted, tuned)
    (tuned / "finetune.json").write_text(json.dumps({"recipe": {"finetune": {"trainable": "lora"}}}))
    change(tuned, "proj_out.weight", lambda tensor: tensor.mul_(1.5))
    change(tuned, "transformer_blocks.0.ff.linear_in.weight", lambda tensor: tensor.add_(1))
    found = verify(tuned, settings=QUICK)
    assert found.max_abs_error < 1e-12 and found.stored_error is None
    assert found.tensors["trained"] > 3 and found.tensors["equal"] > 10
    change(tuned, "transformer_blocks.0.attn.to_q.weight", lambda tensor: tensor[0, :1].add_(1))
    with pytest.raises(Flux2PixelError, match=r"to_q\.weight is not the base's"):
        verify(tuned, settings=QUICK)


def test_an_adapter_model_has_its_trunk_proven_by_convert_and_later(tmp_path):
    folder, inner = write_tiny_base(tmp_path / "base"), CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"]
    layer = "transformer_blocks.0.ff.linear_out"
    path = tmp_path / "adapter.safetensors"
    save_file(
        {
            "x_embedder.weight": torch.randn(inner, 192).half(),
            "proj_out.weight": torch.randn(192, inner).half(),
            "norm_out.linear.weight": torch.randn(2 * inner, inner).half(),
            f"{layer}.lora_A.weight": torch.randn(4, 3 * inner).half(),
            f"{layer}.lora_B.weight": torch.randn(inner, 4).half(),
            "proj_buffer": polar(torch.randn(192, 16, dtype=torch.float64)).bfloat16(),
            "scale_buffer": torch.tensor(1.25).bfloat16(),
        },
        path,
    )
    recipe = load(None, [f"base={folder}", "convert.verify_steps=2"])
    out = convert(recipe, tmp_path, extras=Extras(adapter=path))
    record = json.loads((out / "conversion.json").read_text())
    assert record["exactness"] is None and record["trunk"]["max_abs_error"] < 1e-12
    assert "None" not in (out / "README.md").read_text()
    assert verify(out, settings=QUICK).tensors["merged"] == 4
    path.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UsageError, match="--with FILE"):
        verify(out, settings=QUICK)
    moved = [tmp_path / "elsewhere.safetensors"]
    assert verify(out, made_with=moved, settings=QUICK).max_abs_error < 1e-12
    change(out, f"{layer}.weight", lambda tensor: tensor[1, :1].add_(1))
    with pytest.raises(Flux2PixelError, match=r"linear_out\.weight differs"):
        verify(out, made_with=moved, settings=QUICK)


# Depth, memory, configurations ------------------------------------------------------------------------------------


def test_the_recipe_says_how_deep_the_proof_goes(tmp_path, monkeypatch):
    folder = run(tmp_path, "flux2-klein", "convert.proof=blocks")
    assert json.loads((folder / "conversion.json").read_text())["exactness"]["depth"] == "one block of each kind"
    monkeypatch.setattr(proof, "available_memory", lambda device: 1000)
    assert json.loads((run(tmp_path, "flux2-klein") / "conversion.json").read_text())["exactness"] is None
    with pytest.raises(UsageError, match=r"convert\.proof: the whole model in float64 needs"):
        run(tmp_path, "flux2-klein", "convert.proof=whole")


def machine(root, groups, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return available_memory(root=root)


def test_memory_is_what_the_container_leaves(tmp_path):
    assert machine(tmp_path / "plain", "", {}) == 8000 * 1024
    two = {"a/memory.max": "max\n", "a/memory.current": "1\n", "memory.max": "4000000\n", "memory.current": "1500000\n"}
    two["memory.stat"] = "anon 5\ninactive_file 500000\n"
    assert machine(tmp_path / "two", "0::/a\n", two) == 3_000_000
    one = {"memory/job/memory.limit_in_bytes": "2000000", "memory/job/memory.usage_in_bytes": "500000"}
    one |= {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "7000000"}
    assert machine(tmp_path / "one", "4:cpu:/\n3:memory:/job\n0::/\n", one) == 1_500_000
    assert machine(tmp_path / "inside", "0::/hidden/by/the/host\n", {"memory.max": "100", "memory.current": "30"}) == 70


@pytest.mark.parametrize("depth", ["auto", "blocks"])
@pytest.mark.parametrize(
    ("name", "absent", "extra"),
    [
        ("sd3.5-large", ("dual_attention_layers",), {}),
        ("qwen-image", (), {"pooled_projection_dim": 768}),
        ("flux1-dev", ("axes_dims_rope",), {}),
    ],
)
def test_published_configurations_are_read_as_diffusers_reads_them(tmp_path, capsys, name, absent, extra, depth):
    """SD3.5 large's file lacks a key of its class, Qwen-Image's has one that its class does not know."""
    changes = {"axes_dims_rope": (16, 56, 56), "attention_head_dim": 128} if name == "flux1-dev" else {}
    path = write_base(tmp_path / "base", name, **changes) / "transformer" / "config.json"
    config = json.loads(path.read_text()) | extra
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in absent}))
    folder = run(tmp_path, name, f"convert.proof={depth}")
    record = json.loads((folder / "conversion.json").read_text())
    assert record["exactness"]["max_abs_error"] < 1e-9
    written = json.loads((folder / "transformer" / "config.json").read_text())
    assert set(absent) <= written.keys() and not set(extra) & written.keys()
    said = capsys.readouterr().err
    assert said.count("does not know pooled_projection_dim") <= 1
    assert type(open_base(folder).transformer).__name__ == config["_class_name"]
