"""The loss by value, the frozen reference, the average, what is trained, and what a training leaves behind."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from finetuning import LORA, small
from safetensors.torch import load_file

from flux2pixel.asymflow.codec import Codec
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.convert.fold import fold
from flux2pixel.data.cache import Batch, Cache
from flux2pixel.finetune import run as stage
from flux2pixel.finetune.loss import flow_matching, variance_reduction
from flux2pixel.finetune.network import checkpoint
from flux2pixel.finetune.network.export import write_weights
from flux2pixel.finetune.network.quantise import Int8Linear
from flux2pixel.finetune.network.trainable import lora_modules, merged, prepare, split
from flux2pixel.finetune.step.ema import PowerEma
from flux2pixel.finetune.step.objective import LatentReference, Objective, SharedReference, draw
from flux2pixel.finetune.step.perceptual import load_lpips, perceptual
from flux2pixel.finetune.watch import speed
from flux2pixel.finetune.watch.validation import hold_out
from flux2pixel.models import base as bases
from flux2pixel.recipe import dumps, load
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.subspace.estimators import polar

FILE = "diffusion_pytorch_model.safetensors"


def widen(base, flow):
    """The converted network in memory."""
    pixel = base.network_class()(**base.pixel_config(dict(base.transformer.config)))
    pixel.load_state_dict(fold(base.transformer.state_dict(), flow.basis, base.projections, base.pixel_name))
    return pixel.eval().requires_grad_(False)


def tokens(*values):
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1)


def test_loss_by_hand():
    """One token, three channels of two pixels, sigma = 0.5: alpha = 0.5, w = 0.25 / (0.25 + 0.0225)."""
    result = variance_reduction(
        tokens(1, 1, 2, 0, 1, 1),
        tokens(0, 0, 0, 0, 2, 2),
        tokens(2, 2, 4, 0, 1, 1),
        tokens(0, 0, 0, 0, 0, 0),
        torch.tensor([0.5], dtype=torch.float64),
    )
    # Channels: d = (1, 1), d_L = (2, 2): 1/2; d = (2, 0), d_L = (4, 0): 1/2; d = (-1, -1), d_L = (1, 1): -1, clamped.
    assert result.lam.flatten().tolist() == [0.5, 0.5, 0.0]
    w = 0.25 / 0.2725
    assert float(result.weight) == pytest.approx(w)
    # target - x0_hat = d - (1 - w) lam d_L: w on the three live pixels, -1 on two.
    assert float(result.loss) == pytest.approx((w**2 + w**2 + (2 * w) ** 2 + 2) / 6 / 0.25)


def test_gradient_flows_only_through_the_prediction():
    x0, low, low_hat = torch.randn(3, 2, 4, 12)
    prediction = torch.randn(2, 4, 12, requires_grad=True)
    sigma = torch.tensor([0.01, 0.9])
    result = variance_reduction(x0, prediction, low, low_hat, sigma)
    result.loss.backward()
    level = sigma.clamp(min=0.05).view(-1, 1, 1)
    target = x0 - (
        (1 - result.weight).view(-1, 1, 1, 1) * result.lam[..., None] * (low - low_hat).view(2, 4, 3, 4)
    ).view(2, 4, 12)
    assert torch.allclose(prediction.grad, 2 * (prediction.detach() - target) / level**2 / 96, atol=1e-5)


def test_perfect_reference_leaves_plain_flow_matching():
    x0, x0_hat, low = torch.randn(3, 2, 4, 12)
    sigma = torch.rand(2)
    reduced = variance_reduction(x0, x0_hat, low, low, sigma)
    assert torch.allclose(reduced.loss, flow_matching(x0, x0_hat, sigma))


def test_power_ema_profile():
    module = torch.nn.Linear(1, 1, bias=False)
    ema, expected = PowerEma(module, gamma=3.0), 0.0
    for n in range(1, 6):
        torch.nn.init.constant_(module.weight, float(n))
        ema.update(module)
        keep = (1 - 1 / n) ** 4
        expected = keep * expected + (1 - keep) * n
    assert ema.values["weight"].item() == pytest.approx(expected)


def batch_of(count=3, grid=(2, 3), patch=8, rank=16):
    """Random images of one bucket, float32 latents; their numbers are not those of any data."""
    rgb = torch.randint(256, (count, 3, grid[0] * patch, grid[1] * patch), dtype=torch.uint8)
    text = torch.randn(count, 4, 144)
    return Batch(rgb, torch.randn(count, grid[0] * grid[1], rank), {"text": text}, ["a", "b", "c"], patch, number=7)


@pytest.fixture(scope="module")
def base():
    return bases.open_base("klein-tiny")


@pytest.fixture
def flow():
    return AsymFlow(polar(torch.randn(192, 16, dtype=torch.float64)).float(), 1.7)


def test_the_reference_forward_in_latents_is_the_frozen_converted_model(base, flow):
    """d_L by the latent shortcut, by the shared weights, and by the definition: the converted model at x_t^L."""
    batch, settings = batch_of(), load(None, ["finetune.precision=fp32"]).finetune
    sigma, eps = torch.tensor([0.02, 0.5, 1.0]), torch.randn(3, 6, 192)
    pixel = widen(base, flow)
    short = Objective(settings, base, flow, LatentReference(base, base.transformer)).error(batch, sigma, eps)
    shared = Objective(settings, base, flow, SharedReference(base, pixel, flow.basis)).error(batch, sigma, eps)
    x0_low = flow.lift(batch.latents)
    x_t = torch.lerp(x0_low, eps, sigma.view(-1, 1, 1))
    k, tau = flow.calibrate(sigma)
    with torch.no_grad():
        v = base.call(pixel, k.view(-1, 1, 1) * x_t, tau, batch.conditioning, batch.grid)
    expected = x0_low - flow.predict_x0(v, x_t, sigma)
    assert torch.allclose(short, expected, atol=2e-4), float((short - expected).abs().max())
    assert torch.allclose(shared, expected, atol=2e-4)


def test_adapters_off_is_the_converted_model_whatever_was_trained(base, flow):
    settings = load(None, ["finetune.precision=fp32", *LORA]).finetune
    batch, sigma, eps = batch_of(), torch.tensor([0.1, 0.5, 0.9]), torch.randn(3, 6, 192)
    network = widen(base, flow)
    objective = Objective(settings, base, flow, SharedReference(base, network, flow.basis))
    with torch.no_grad():
        before = objective.error(batch, sigma, eps), objective.predict(network, batch, batch.pixels(), sigma, eps)
    groups = prepare(network, base, settings, seed=0)
    assert {g.name: g.lr for g in groups} == {
        "in_projection": 5e-4,
        "out_projection": 1.5e-3,
        "modulation": 5e-4,
        "lora": 5e-4,
    }
    network.eval()
    with torch.no_grad():
        at_start = objective.predict(network, batch, batch.pixels(), sigma, eps)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
        after = objective.error(batch, sigma, eps), objective.predict(network, batch, batch.pixels(), sigma, eps)
    assert torch.allclose(at_start, before[1], atol=1e-6), "LoRA starts as the converted model"
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1], atol=1e-2)
    assert all(p.requires_grad for p in (dict(network.named_parameters())[n] for g in groups for n in g.parameters))


def test_merged_lora_is_the_trained_network(base, flow):
    settings = load(None, ["finetune.precision=fp32", *LORA, "finetune.lora_alpha=2.0"]).finetune
    batch, sigma, eps = batch_of(), torch.tensor([0.1, 0.5, 0.9]), torch.randn(3, 6, 192)
    network, plain = widen(base, flow), widen(base, flow)
    prepare(network, base, settings, seed=0)
    network.eval()
    trained = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    for tensor in trained.values():
        tensor.add_(torch.randn_like(tensor) * 0.02)
    full, lora = split(trained)
    assert len(lora) == 2 * len(lora_modules(plain, base, ("base",)))
    plain.load_state_dict(merged(plain.state_dict(), full, lora, 2.0 / 4))
    objective = Objective(settings, base, flow)
    with torch.no_grad():
        ours, theirs = (objective.predict(n, batch, batch.pixels(), sigma, eps) for n in (network, plain))
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "said"),
    [(["nonsense"], "'nonsense' matches no Linear layer"), (["(x"], "not a regular expression")],
)
def test_patterns_that_match_nothing_are_refused(base, targets, said):
    with pytest.raises(UsageError, match=said):
        lora_modules(base.transformer, base, targets)


def square(height, width=None):
    """A batch of one patch size that is 256 pixels, so that a picture of real size has few tokens."""
    grid = (height // 256, (width or height) // 256)
    return replace(batch_of(grid=grid, patch=256), number=7)


def test_draws_depend_on_the_place_in_the_data_alone():
    batch = batch_of()
    sigma, eps = draw(batch, seed=3, shift=1.0)
    torch.manual_seed(99)
    again, noise = draw(batch, seed=3, shift=1.0)
    assert torch.equal(sigma, again) and torch.equal(eps, noise) and eps.shape == (3, 6, 192)
    assert not torch.equal(sigma, draw(batch, seed=4, shift=1.0)[0])
    high = draw(batch, seed=3, shift=17.0)[0]
    assert torch.allclose(high, 17 * sigma / (1 + 16 * sigma))
    # The shift is that of 1024 x 1024 pixels: half of it at half the side, and for a bucket of as many pixels the same.
    plain = draw(square(1024), seed=3, shift=1.0)[0]
    for sides, factor in (((512, 512), 8.5), ((2048, 2048), 34.0), ((2048, 512), 17.0)):
        assert torch.allclose(draw(square(*sides), seed=3, shift=17.0)[0], factor * plain / (1 + (factor - 1) * plain))


def test_perceptual_term_by_hand(flow):
    """A stand-in for LPIPS that gives 1 at every pixel leaves mean(w rms(lam) / max(sigma, 0.05)^2)."""
    x0, x0_hat = torch.randn(2, 6, 192), torch.randn(2, 6, 192, requires_grad=True)
    lam, weight, sigma = torch.rand(2, 6, 3), torch.tensor([0.9, 0.3]), torch.tensor([0.01, 0.5])
    shapes = []

    def network(a, b):
        shapes.append(a.shape)
        return torch.ones_like(a[:, :1]) + 0 * a.sum()

    found = perceptual(network, Codec(8), x0, x0_hat, lam, weight, sigma, (2, 3))
    expected = (weight / sigma.clamp(min=0.05) ** 2 * lam.square().mean(-1).sqrt().mean(1)).mean()
    assert found.item() == pytest.approx(float(expected), rel=1e-6) and shapes == [(2, 3, 16, 24)]
    found.backward()
    assert x0_hat.grad is not None


def test_perceptual_weights_that_are_nowhere_are_one_clear_line(monkeypatch, tmp_path):
    lpips = pytest.importorskip("lpips")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def fail(**options):
        raise OSError("no route to host")

    monkeypatch.setattr(lpips, "LPIPS", fail)
    with pytest.raises(UsageError, match=r"not at .*vgg16-397923af\.pth and cannot be downloaded \(no route to host\)"):
        load_lpips()


def test_int8_rows_are_near_and_pass_gradients():
    linear = torch.nn.Linear(40, 30, bias=False).requires_grad_(False)
    short = Int8Linear(linear)
    bound = linear.weight.abs().amax(1, keepdim=True) / 254
    assert ((short.weight - linear.weight).abs() <= bound * 1.001).all()
    x = torch.randn(5, 40, requires_grad=True)
    short(x).sum().backward()
    assert torch.allclose(x.grad, short.weight.sum(0).expand(5, -1), atol=1e-5)


def test_what_a_training_leaves(prepared_run, tmp_path):
    """The log, the samples from step 0 on, TensorBoard, the card, averaged and raw weights, an int8 LoRA training."""
    pytest.importorskip("tensorboard")
    folder = shutil.copytree(prepared_run, tmp_path / "run")
    options = [*LORA, "finetune.frozen_int8=true", "finetune.checkpointing=true", "finetune.precision=bf16"]
    recipe = small(*options, 'finetune.trackers=["tensorboard"]')
    out = stage.finetune(recipe, folder)
    records = [json.loads(line) for line in (folder / "finetune.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    wanted = {"regression", "perceptual", "lam", "grad_norm", "lr", "images_per_second", "tokens_per_second"}
    assert wanted | {"data_wait", "memory_gib"} <= steps[0].keys()
    looks = [r for r in records if "validation" in r]
    assert [r["step"] for r in looks] == [0, 2, 4]
    assert all(len(r["validation"]["bins"]) == 8 for r in looks)
    assert looks[0]["validation"]["mean"] == looks[2]["validation"]["start"] != looks[2]["validation"]["mean"]
    assert sorted(p.name for p in (folder / "samples").glob("*.png")) == [
        "contact.png",
        "step-00000000.png",
        "step-00000004.png",
    ]
    assert list((folder / "tensorboard").glob("events*"))
    card = (out / "README.md").read_text()
    assert (
        "cache `" in card and "frozen_int8 = true" in card and "samples.png" in card and (out / "curves.png").is_file()
    )
    averaged, raw, start = (
        load_file(f / k / FILE)
        for f, k in ((out, "transformer"), (out, "transformer_raw"), (folder / "converted", "transformer"))
    )
    assert averaged.keys() == raw.keys() == start.keys()
    changed = {n.removesuffix(".weight") for n in start if not torch.equal(start[n].float(), raw[n].float())}
    assert {"x_embedder", "proj_out", "norm_out.linear"} <= changed
    assert changed - {"x_embedder", "proj_out", "norm_out.linear"} <= set(
        lora_modules(bases.open_base(folder / "converted").transformer, bases.open_base("klein-tiny"), ("base",))
    )
    for name in (f"transformer/{FILE}", f"transformer_raw/{FILE}", "adapter.safetensors", "adapter_raw.safetensors"):
        _, notes = files.read_tensors(out / name)
        assert notes["format"] == "pt" and notes["base"] == "klein-tiny" and notes["recipe"] == dumps(recipe), name
        assert notes["weights"] == ("raw" if "_raw" in name else "averaged"), name
    adapter = load_file(out / "adapter.safetensors")
    assert "x_embedder.weight" in adapter and any(".lora_A.weight" in name for name in adapter)


def test_every_shard_has_the_notes(tmp_path):
    state = {"a": torch.randn(300), "b": torch.randn(300), "c": torch.randn(4, 6).mT}
    write_weights(tmp_path, state, {"recipe": "seed = 1"}, shard="2KB")
    index = json.loads((tmp_path / f"{FILE}.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) == 2 and index["weight_map"].keys() == state.keys()
    read = [files.read_tensors(tmp_path / name) for name in names]
    assert all(notes == {"recipe": "seed = 1"} for _, notes in read)
    assert all(torch.equal(tensors[name], state[name]) for tensors, _ in read for name in tensors)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_files(prepared_run, tmp_path, monkeypatch):
    folder = shutil.copytree(prepared_run, tmp_path / "run")
    load_batch = stage.Loader.load

    def spoiled(self, step):
        batches = load_batch(self, step)
        if step == 2:
            batches[1].latents[3] = float("inf")
        return batches

    monkeypatch.setattr(stage.Loader, "load", spoiled)
    with pytest.raises(Flux2PixelError, match=r"not finite at step 2 .* images: scene") as caught:
        stage.finetune(small("finetune.skip_limit=0"), folder)
    assert str(caught.value).count("scene") == 4, "the micro-batch's files, not the other one's"
    assert checkpoint.newest(folder / "checkpoints").name == "step-00000002"
    assert not (folder / "finetuned").exists()


STAND_IN = """
import json
from pathlib import Path
LOG = Path(__file__).with_suffix(".jsonl")
def note(**what):
    with LOG.open("a") as file:
        file.write(json.dumps(what) + "\\n")
def Image(path):
    return str(path)
class Session:
    def log(self, values, step):
        note(step=step, **values)
def init(**options):
    note(**{name: options[name] for name in ("id", "name", "resume") if name in options})
    return Session()
"""


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_resumed_training_goes_on_in_its_trackers_run_and_shows_samples(prepared_run, tmp_path, monkeypatch, tracker):
    (tmp_path / f"{tracker}.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, tracker, raising=False)
    folder = shutil.copytree(prepared_run, tmp_path / "run")
    recipe = small("finetune.keep_final=true", f'finetune.trackers=["{tracker}"]')
    stage.finetune(recipe, folder)
    stage.finetune(small("finetune.steps=5", f'finetune.trackers=["{tracker}"]'), folder)
    lines = [json.loads(line) for line in (tmp_path / f"{tracker}.jsonl").read_text().splitlines()]
    first, second = (line for line in lines if "resume" in line)
    assert first == second and first["resume"] == "allow" and first.get("id", first["name"]).startswith("run-")
    shown = [line["step"] for line in lines if "samples" in line]
    assert shown == [0, 4, 5] and {"loss", "lr", "grad_norm", "images_per_second"} <= lines[4].keys() | lines[3].keys()


def test_operations_of_a_step_by_hand(monkeypatch):
    """A Linear layer of 6 weights, 6 image and 4 text tokens, 3 images; LoRA: forward, backward, the reference."""
    network, settings = torch.nn.Linear(3, 2), load(None, LORA).finetune
    assert speed.operations(network, settings, batch_of()) == 2 * 6 * (6 + 4) * 3 * 3
    assert speed.forwards(load(None).finetune) == 4 and speed.peak(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "NVIDIA H100 80GB HBM3")
    assert speed.peak(torch.device("cuda")) == 9.89e14


def test_steps_are_profiled_if_asked_and_rated_where_the_peak_is_known(prepared_run, tmp_path, monkeypatch):
    folder = shutil.copytree(prepared_run, tmp_path / "run")
    monkeypatch.setattr(speed, "peak", lambda place: 1e12)
    stage.finetune(small("finetune.profile=1"), folder)
    trace = json.loads((folder / "profile" / "rank-0.json").read_text())
    lines = [json.loads(line) for line in (folder / "finetune.jsonl").read_text().splitlines()]
    assert all(0 < line["mfu"] < 1 for line in lines if "loss" in line)
    assert any("aten::mm" in event.get("name", "") for event in trace["traceEvents"])


def test_validation_images_are_never_trained_on(prepared_run):
    cache = Cache(prepared_run / "cache")
    held = hold_out(cache, 4)
    assert held.counts == (4,) and held.training(cache) == (44,)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["finetune.batch=7"], "not a multiple of 4 images x 1 processes"),
        (["finetune.processes=8"], r"1 processes, but the recipe says finetune\.processes = 8"),
        (["finetune.replicas=2"], r"do not divide into finetune\.replicas = 2"),
        (["finetune.frozen_int8=true"], "LoRA training in one process"),
        (["finetune.perceptual=0.2", "finetune.loss=flow-matching"], "gated by the variance reduction"),
        ([*LORA, 'finetune.lora_targets=["no such layer"]'], "matches no Linear layer"),
    ],
)
def test_mistakes_are_found_before_any_training(prepared_run, options, said):
    with pytest.raises(UsageError, match=said):
        stage.prepare(small(*options), prepared_run)


def test_training_is_refused_without_a_converted_model(tmp_path):
    with pytest.raises(UsageError, match="run convert"):
        stage.finetune(small(), tmp_path)
