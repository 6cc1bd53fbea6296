"""How weights are held: offload, dtype and 8 bits reach what draws, and a plan says what they take."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_plan import most_of
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from flux2pixel.cli import app
from flux2pixel.models import base as bases
from flux2pixel.models.base import Base, open_base
from flux2pixel.models.model import LatentModel, open_model
from flux2pixel.models.plan import GIB, plan_models, planned_base
from flux2pixel.recipe import Sample
from flux2pixel.runtime.meter import nbytes

PROMPT = "a photo of a red circle"


def invoke(*words: str):
    return CliRunner().invoke(app, [str(word) for word in words])


def picture(path, *words: str) -> np.ndarray:
    out = ["--out", str(path), "--steps", "2", "--model", "klein-tiny", "--run", str(path.parent)]
    result = invoke("generate", PROMPT, *out, *words)
    assert result.exit_code == 0, result.output
    return np.asarray(Image.open(path)).astype(float)


def rows(text: str) -> dict[str, tuple[float, float]]:
    """Weights and peak, GiB, of every pass that was printed."""
    found = re.findall(r"^  (\S.*?)(?:, .*?)? +([\d.]+) +([\d.]+) +([\d.]+)$", text, re.M)
    return {name: (float(weights), float(peak)) for name, weights, _, peak in found}


@pytest.mark.parametrize("how", ["int8", "fp8"])
def test_a_model_in_8_bits_draws_nearly_the_same(tmp_path, how):
    pytest.importorskip("torchao")
    whole, small = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", "--quantize", how)
    assert 0 < np.abs(whole - small).mean() < 2  # of 255
    network = open_model("klein-tiny", quantize=how).transformer
    assert nbytes(network) < 0.4 * nbytes(open_model("klein-tiny").transformer)  # of float32
    for name in ("x_embedder", "proj_out"):  # a fold is exact in these
        assert type(network.get_submodule(name).weight.data) is torch.Tensor


def test_without_torchao_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    result = invoke("generate", PROMPT, "--model", "klein-tiny", "--quantize", "int8", "--run", tmp_path)
    assert result.exit_code == 2 and "needs the package torchao; pip install 'flux2pixel[train]'" in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.parametrize("command", [["generate", PROMPT], ["eval"]])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--offload", "model", "--device", "cpu"], "--offload model: the device is the CPU"),
        (["--offload", "half"], "--offload half: give one of model, group, sequential"),
        (["--quantize", "int4"], "--quantize int4: give one of int8, fp8"),
        (["--dtype", "bf8"], "--dtype bf8: give one of bf16, fp16, fp32"),
        (["--quantize", "int8", "--offload", "group", "--plan"], "--quantize int8: goes with --offload model or none"),
    ],
)
def test_what_makes_no_sense_is_said_before_any_work(tmp_path, command, words, said):
    result = invoke(*command, "--model", "klein-tiny", "--run", tmp_path / "run", *words)
    assert result.exit_code == 2 and said in result.stderr and not (tmp_path / "run").exists()


class Reached(Exception):
    """The models were asked for."""


def test_the_flags_of_eval_reach_the_models(tmp_path, monkeypatch):
    seen = {}

    def remember(*given, **named):
        seen.update(named)
        raise Reached

    monkeypatch.setattr("flux2pixel.evaluate.run.evaluate", remember)
    words = ["--model", "klein-tiny", "--run", tmp_path, "--dtype", "bf16", "--quantize", "int8", "--matched"]
    assert isinstance(invoke("eval", *words).exception, Reached | SystemExit)
    assert seen == {"matched": True, "dtype": torch.bfloat16, "quantize": "int8"}


def test_a_latent_base_offloaded_whole_leaves_before_the_vae_works(monkeypatch):
    """The CPU plays the accelerator."""
    monkeypatch.setattr("flux2pixel.models.model.check", lambda *given: None)
    model, gone = open_model("klein-tiny", Sample(steps=1), offload="model"), []
    hook = model.transformer.offload_hook
    monkeypatch.setattr(hook, "offload", lambda: gone.append("transformer"))
    decode = Base.decode
    monkeypatch.setattr(Base, "decode", lambda *given: gone.append("decoded") or decode(*given))
    model.generate(PROMPT)
    assert gone == ["transformer", "decoded"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_planned_memory_of_drawing_is_what_it_takes(dtype):
    """Weights to the byte; what a batch adds within 10 % of what the allocator hands out."""
    batch, size = 16, (64, 64)
    passes = plan_models([planned_base("klein-tiny", dtype)], Sample(), batch=batch, size=size)
    planned = {one.name.split(",")[0]: one for one in passes}
    model = open_model("klein-tiny", Sample(steps=3), dtype=dtype)
    assert isinstance(model, LatentModel)
    kept = nbytes(model.transformer) + nbytes(model.base.vae)
    assert planned["latent base"].weights == planned["VAE decoding"].weights == kept
    assert planned["pixel model"].weights > nbytes(model.transformer)
    assert planned["text"].weights == nbytes(model.base.text_parts["text_encoder"])
    text = {name: value.expand(batch, -1, -1) for name, value in model.text([PROMPT]).items()}
    noise, z = model.noise([(0, i) for i in range(batch)], size), torch.randn(batch, size[0] * size[1] // 64, 16)
    works = {
        "latent base": lambda: model.tokens(text, text, noise, size, model.levels(size)),
        "VAE decoding": lambda: model._decode(z, size),
    }
    for name, work in works.items():
        with torch.no_grad():
            work()
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
                work()
        assert planned[name].added == pytest.approx(most_of(recorded), rel=0.1), name


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_klein_9b_is_drawn_and_evaluated_in_24_gib(tmp_path, monkeypatch, command):
    """Planned from what is published: nothing is asked of the Hub."""
    monkeypatch.setattr(bases, "download", None)
    words = [command, "--plan", "--base", "flux2-klein-9b", "--run", str(tmp_path / "run"), "--dtype", "bf16"]
    result = invoke(*words, "--offload", "model")
    assert result.exit_code == 0, result.output
    found = rows(result.stdout)
    assert set(found) >= {"text", "pixel model", "latent base", "VAE decoding"}
    assert found["pixel model"][0] == pytest.approx((9_078_581_248 + 2 * 4096 * 640) * 2 / GIB, abs=1e-3)
    assert max(peak for _, peak in found.values()) <= 24
    host = float(re.search(r"host memory \(GiB\): ([\d.]+)", result.stdout)[1])
    assert host <= 1.2 * found["pixel model"][0]
    assert not (tmp_path / "run").exists()


def test_layers_in_turn_take_the_largest(tmp_path):
    words = ["generate", "--plan", "--base", "klein-tiny", "--run", str(tmp_path / "run"), "--dtype", "fp32"]
    whole, layers = (rows(invoke(*words, *more).stdout) for more in ([], ["--offload", "group"]))
    network = open_model("klein-tiny").transformer
    largest = max(nbytes(module, recurse=False) for module in network.modules())
    assert layers["latent base"][0] == pytest.approx((largest + nbytes(open_base("klein-tiny").vae)) / GIB, abs=6e-4)
    assert layers["latent base"][0] < whole["latent base"][0]


def test_a_cache_of_a_published_base_is_planned_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(bases, "download", None)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "a.png")
    words = ["cache", "--plan", "--base", "flux2-klein-9b", "--images", tmp_path / "photos", "--run", tmp_path / "run"]
    result = invoke(*words, "--set", "data.batch=1", "--set", "data.text_tokens=512")
    assert result.exit_code == 0, result.output
    assert max(peak for _, peak in rows(result.stdout).values()) <= 20
