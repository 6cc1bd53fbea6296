"""Real checkpoints: planned from headers, streamed, atomic, verified; and every way one can be broken."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_base import tiny_transformer, write_tiny_base
from typer.testing import CliRunner

from flux2pixel.asymflow.linalg import polar
from flux2pixel.cli import app
from flux2pixel.convert.prepare import Extras, prepare
from flux2pixel.convert.run import convert
from flux2pixel.recipe import load
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.weights import write
from flux2pixel.weights.checkpoint import Span, Stored, open_checkpoint
from flux2pixel.weights.subspace import write_subspace
from flux2pixel.weights.write import BLOCK, Output, all_finite

STEPS = "convert.verify_steps=2"


@pytest.fixture
def base(tmp_path):
    return write_tiny_base(tmp_path / "base")


@pytest.fixture
def subspace(tmp_path):
    path = tmp_path / "subspace.safetensors"
    write_subspace(path, polar(torch.randn(192, 16, dtype=torch.float64)), torch.tensor(1.7), {"method": "random"})
    return path


def recipe_for(base, *more):
    return load(None, [f"base={base}", STEPS, *more])


def state_of(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def shards(folder):
    return sorted((folder / "transformer").glob("*.safetensors"))


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_only_the_two_projections_change(tmp_path, subspace, size):
    """From a single file and from shards: all else is bit for bit the base, and the stock class loads it."""
    base = write_tiny_base(tmp_path / "base", max_shard_size=size)
    out = convert(recipe_for(base), tmp_path, subspace)
    before, after = state_of(base / "transformer"), state_of(out / "transformer")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert changed == {"x_embedder.weight", "proj_out.weight"}
    assert all(torch.equal(before[name], after[name]) for name in before if name not in changed)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    a = load_file(out / "asymflow.safetensors")["basis"].double()
    assert torch.equal(after["x_embedder.weight"], (before["x_embedder.weight"].double() @ a.T).bfloat16())
    assert torch.equal(after["proj_out.weight"], (a @ before["proj_out.weight"].double()).bfloat16())
    assert [path.name for path in shards(base)] == [path.name for path in shards(out)]
    model = Flux2Transformer2DModel.from_pretrained(out / "transformer", torch_dtype=torch.bfloat16)
    assert model.config.in_channels == 192
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, after[name])


def test_every_file_says_how_it_was_made(tmp_path, base, subspace):
    """A file with nothing of ours in it is the base's byte for byte; every other names the recipe; all have digests."""
    recipe = recipe_for(base)
    out = convert(recipe, tmp_path, subspace)
    originals = {files.digest(path) for path in shards(base)}
    ours = [path for path in shards(out) if files.digest(path) not in originals]
    assert 0 < len(ours) < len(shards(out))
    for path in [*ours, out / "asymflow.safetensors"]:
        with safe_open(path, framework="pt") as file:
            assert "verify_steps = 2" in file.metadata()["recipe"], path
    record = json.loads((out / "conversion.json").read_text())
    for path in shards(out):
        assert record["transformer_sha256"][path.name] == files.digest(path)
    assert record["exactness"]["max_abs_error"] < 1e-12 < record["exactness"]["stored_error"] < 0.2
    assert record["exactness"]["depth"] == "whole"


def test_shards_can_be_cut_anew_and_cast(tmp_path, base, subspace):
    out = convert(recipe_for(base, "convert.shard_size=3e-5", "convert.dtype=fp32"), tmp_path, subspace)
    paths = shards(out)
    assert len(paths) > len(shards(base))
    for path in paths:
        assert path.stat().st_size < 3e-5 * 1e9 + 4000 or len(load_file(path)) == 1
    state = state_of(out / "transformer")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    a = load_file(out / "asymflow.safetensors")["basis"].double()
    exact = state_of(base / "transformer")["x_embedder.weight"].double() @ a.T
    assert (state["x_embedder.weight"] - exact).abs().max() < 1e-6, "the fold was not rounded to bf16 on the way"
    assert Flux2Transformer2DModel.from_pretrained(out / "transformer").config.in_channels == 192


def test_link_shares_what_does_not_change(tmp_path, base, subspace):
    """Files of the Hub's cache are symlinks: the link must be to the file behind, and survive the cache's removal."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in [*shards(base), base / "text_encoder" / "model.safetensors"]:
        blob = blobs / files.digest(path)
        path.rename(blob)
        path.symlink_to(blob)
    out = convert(recipe_for(base), tmp_path, subspace, extras=Extras(link=True))
    linked = [path for path in shards(out) if path.stat().st_nlink == 2]
    assert 0 < len(linked) < len(shards(out))
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert (out / "text_encoder" / "model.safetensors").stat().st_nlink == 2
    assert (out / "scheduler" / "scheduler_config.json").stat().st_nlink == 1, "small files may be edited: copied"
    digests = json.loads((out / "conversion.json").read_text())["transformer_sha256"]
    assert all(digests[path.name] == files.digest(path) for path in shards(out))
    shutil.rmtree(blobs)
    assert Flux2Transformer2DModel.from_pretrained(out / "transformer").config.in_channels == 192


def test_link_copies_across_devices(tmp_path, base, subspace, monkeypatch):
    elsewhere = Path("/dev/shm")
    if not os.access(elsewhere, os.W_OK) or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    out = elsewhere / f"flux2pixel-test-{os.getpid()}"
    try:
        convert(recipe_for(base), tmp_path, subspace, out, Extras(link=True))
        assert all(path.stat().st_nlink == 1 for path in shards(out))
        assert Flux2Transformer2DModel.from_pretrained(out / "transformer").config.in_channels == 192
    finally:
        shutil.rmtree(out, ignore_errors=True)


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, base):
    run = tmp_path / "run"
    result = CliRunner().invoke(app, ["convert", "--base", str(base), "--run", str(run), "--dry-run", "--link"])
    assert result.exit_code == 0, result.output
    for words in (
        "x_embedder.weight  (32, 16) bf16 -> (32, 192) bf16  W A^T in float64",
        "proj_out.weight  (16, 32) bf16 -> (192, 32) bf16  A W in float64",
        "rewritten",
        "linked",
        "text_encoder/",
        "GB free)",
        "memory ",
    ):
        assert words in result.output
    assert not run.exists()


def test_a_folder_that_is_not_empty_needs_overwrite(tmp_path, base, subspace):
    run, out = tmp_path / "run", tmp_path / "model"
    words = ["convert", "--base", str(base), "--run", str(run), "--out", str(out), "--subspace", str(subspace)]
    words += ["--set", STEPS]
    assert CliRunner().invoke(app, words).exit_code == 0
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "--overwrite" in again.stderr
    before = files.digest(shards(out)[0])
    assert CliRunner().invoke(app, [*words, "--overwrite"]).exit_code == 0
    assert files.digest(shards(out)[0]) == before
    (out / "conversion.json").unlink()
    (out / "asymflow.json").unlink()
    alien = CliRunner().invoke(app, [*words, "--overwrite"])
    assert alien.exit_code == 2 and "not written by flux2pixel" in alien.stderr and shards(out)


# Broken checkpoints -----------------------------------------------------------------------------------------------


def refused(base, *words):
    with pytest.raises(Flux2PixelError) as caught:
        prepare(recipe_for(base), None, Extras())
    message = str(caught.value)
    assert "\n" not in message and str(base / "transformer") in message
    for word in words:
        assert word in message, message


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def index_of(base):
    return next((base / "transformer").glob("*.index.json"))


def test_a_sound_checkpoint_is_accepted(base):
    job = prepare(recipe_for(base), None, Extras())
    assert {output.name for output in job.plan.changed} == {"x_embedder.weight", "proj_out.weight"}


def test_missing_extra_and_misshapen_tensors_are_listed_together(tmp_path):
    base = write_tiny_base(tmp_path / "base", max_shard_size="1GB")

    def spoil(tensors):
        del tensors["norm_out.linear.weight"]
        tensors["proj_out.weight"] = torch.zeros(16, 33)
        tensors["stray.bias"] = torch.zeros(3)

    rewrite(shards(base)[0], spoil)
    refused(base, "norm_out.linear.weight (64, 32) is missing", "stray.bias (3,) is extra", "proj_out.weight has shape")


def test_truncated_absent_and_foreign_shards_are_listed_together(base):
    first, second, third, *_ = shards(base)
    first.write_bytes(first.read_bytes()[:-7])
    second.unlink()
    index = json.loads(index_of(base).read_text())
    names = [name for name, file in index["weight_map"].items() if file == third.name]
    index["weight_map"][names[0]] = "../../secret.safetensors"
    index_of(base).write_text(json.dumps(index))
    refused(base, f"{first.name}: truncated", f"{second.name} is missing", "secret.safetensors, which is outside")


def test_a_tensor_in_two_shards(base):
    first, second = shards(base)[:2]
    name, tensor = next(iter(load_file(first).items()))
    rewrite(second, lambda tensors: tensors.update({name: tensor}))
    refused(base, f"{name} is in 2 shards")


def test_overlapping_tensors(tmp_path):
    base = write_tiny_base(tmp_path / "base", max_shard_size="1GB")
    path = shards(base)[0]
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    one, two = [name for name in entries if name.endswith("to_q.weight") or name.endswith("to_k.weight")][:2]
    entries[two]["data_offsets"] = entries[one]["data_offsets"]
    text = json.dumps(entries, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(raw[:8] + text[:length] + raw[8 + length :])
    refused(base, "overlap or leave gaps")


def test_values_that_are_not_finite_are_listed_and_nothing_is_written(tmp_path, base, subspace):
    def spoil(tensors):
        for number, tensor in enumerate(tensors.values()):
            tensor.view(-1)[-1] = (float("nan"), float("inf"))[number % 2]

    target = next(path for path in shards(base) if len(load_file(path)) > 1)
    names = list(load_file(target))
    rewrite(target, spoil)
    with pytest.raises(Flux2PixelError, match="NaN or infinite") as caught:
        convert(recipe_for(base), tmp_path, subspace)
    assert all(name in str(caught.value) for name in names)
    assert not (tmp_path / "converted").exists() and not list(tmp_path.glob("*.tmp"))


def test_pickles_are_never_opened(tmp_path):
    base = write_tiny_base(tmp_path / "base", max_shard_size="1GB")

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "opened"),))

    shards(base)[0].unlink()
    torch.save({"x": Trap()}, base / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(UsageError, match="a pickle, which is never opened"):
        prepare(recipe_for(base), None, Extras())
    assert not (tmp_path / "opened").exists()


def test_a_fold_that_went_wrong_on_its_way_to_the_disk_is_caught(tmp_path, base, subspace, monkeypatch):
    honest = write.write_file

    def careless(path, outputs, metadata, progress=None):
        result = honest(path, outputs, metadata, progress)
        if any(output.name == "proj_out.weight" for output in outputs):
            rewrite(path, lambda tensors: tensors["proj_out.weight"].view(-1)[:1].add_(1))
        return result

    monkeypatch.setattr("flux2pixel.convert.run.write_file", careless)
    with pytest.raises(Flux2PixelError, match=r"proj_out\.weight differs from what was computed"):
        convert(recipe_for(base), tmp_path, subspace)
    assert not (tmp_path / "converted").exists()


# Room and interruption --------------------------------------------------------------------------------------------


def test_too_little_room_is_said_before_any_work(tmp_path, base, subspace, monkeypatch):
    monkeypatch.setattr("flux2pixel.convert.plan.free_bytes", lambda folder: 1000)
    with pytest.raises(Flux2PixelError, match=r"needed, 0\.00 MB free"):
        convert(recipe_for(base), tmp_path, subspace)
    assert not list(tmp_path.glob("converted*"))


KILLED = """
import os, signal, sys, json, shutil
from pathlib import Path
import torch
from flux2pixel.convert import run as stage
from flux2pixel.families.flux2 import Flux2
from flux2pixel.recipe import load
from flux2pixel.runtime import files
from flux2pixel.weights import write

base, run = sys.argv[1:]
run = Path(run)
recipe = load(None, [f"base={base}", "convert.verify_steps=1"])
Flux2.network_class()
torch.set_num_threads(1)
count = 0

def counted(call):
    def wrapper(*given, **named):
        global count
        result = call(*given, **named)
        count += 1
        if count == mark:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapper

for name in ("put", "copy"):
    setattr(write._Stream, name, counted(getattr(write._Stream, name)))
for name in ("fsync", "replace", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))

def attempt():
    child = os.fork()
    if child == 0:
        stage.convert(recipe, run, run / "s.safetensors")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def state():
    if not (run / "converted").exists():
        return "nothing"
    record = json.loads((run / "converted" / "conversion.json").read_text())
    folder = run / "converted" / "transformer"
    digests = {path.name: files.digest(path) for path in folder.glob("*.safetensors")}
    return "whole" if digests == record["transformer_sha256"] else "broken"

outcomes = []
mark = 1
while True:
    if mark % 4 == 1:
        shutil.rmtree(run / "converted", ignore_errors=True)
    status = attempt()
    outcomes.append((mark, status, state()))
    if status == 0:
        break
    assert status == -signal.SIGKILL, status
    mark += 3
print(json.dumps({"outcomes": outcomes, "left": sorted(path.name for path in run.iterdir())}))
"""


def test_killed_at_any_moment_it_leaves_nothing_or_a_model(tmp_path, base, subspace):
    """SIGKILL after every third write, sync, rename or new folder, one run each, over nothing or a finished model."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(subspace, run / "s.safetensors")
    done = subprocess.run([sys.executable, "-c", KILLED, str(base), str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    marks, statuses, states = zip(*report["outcomes"], strict=True)
    assert len(marks) > 20 and set(statuses[:-1]) == {-signal.SIGKILL}
    assert set(states) == {"nothing", "whole"}, "kills fell before the rename and after it"
    assert states[-1] == "whole" and report["left"] == ["converted", "s.safetensors"], (
        "the last run leaves no leftovers"
    )


# Streaming --------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys, threading
from pathlib import Path
import torch
from flux2pixel.convert.plan import as_they_are
from flux2pixel.weights.checkpoint import open_checkpoint
from flux2pixel.weights.write import write_file
checkpoint = open_checkpoint(Path(sys.argv[1]))
outputs = tuple(as_they_are(checkpoint))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
write_file(Path(sys.argv[2]), outputs, {"format": "pt"})
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    source = tmp_path / "big.safetensors"
    save_file({f"w{i}": torch.zeros(64 << 20, dtype=torch.uint8) for i in range(6)}, source)
    target = tmp_path / "copy.safetensors"
    done = subprocess.run([sys.executable, "-c", PEAK, str(source), str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 << 20, "six tensors of 64 MB each took less memory than one"
    assert open_checkpoint(target).size == 6 * 64 << 20


def test_finiteness_is_seen_in_every_float():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2):
        values = torch.randn(1000).to(dtype)
        assert all_finite(values)
        for bad in (float("nan"), float("inf"), float("-inf")):
            spoiled = values.clone()
            spoiled[317] = bad
            assert not all_finite(spoiled), (dtype, bad)
    assert all_finite(torch.tensor([65504.0] * 100, dtype=torch.float16)), "a sum would overflow"


def test_blocks_cover_a_tensor_once():
    shape = (24576, 12288)
    output = Output(
        "w", "BF16", shape, Stored("BF16", shape, (Span(Path("x"), 0, 2 * shape[0] * shape[1]),)), rows=None
    )
    ranges = output.blocks()
    assert [first for first, _ in ranges[1:]] == [last for _, last in ranges[:-1]]
    assert ranges[0][0] == 0 and ranges[-1][1] == shape[0]
    assert (ranges[0][1] - ranges[0][0]) * shape[1] * 8 <= BLOCK


def test_the_same_class_comes_back(tmp_path, base):
    """The fixture itself is a model that diffusers loads: what is tested above is about real files."""
    model = Flux2Transformer2DModel.from_pretrained(base / "transformer", torch_dtype=torch.bfloat16)
    for name, tensor in tiny_transformer().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
