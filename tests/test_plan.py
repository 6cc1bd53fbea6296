"""The plan: counts equal the meta device's, memory agrees with what a real step takes."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.cli import app
from flux2pixel.data.plan import plan_cache
from flux2pixel.families.configs import stock_config
from flux2pixel.finetune.network import trainable
from flux2pixel.finetune.plan import footprint
from flux2pixel.finetune.plan.plan import GIB, plan
from flux2pixel.finetune.step.ema import PowerEma
from flux2pixel.finetune.step.objective import LatentReference, Objective, SharedReference
from flux2pixel.models import base as bases
from flux2pixel.recipe import load
from flux2pixel.runtime.errors import UsageError

KLEIN_9B, WIDENED = 9_078_581_248, 2 * 4096 * (768 - 128)


RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


def measured_peak(recipe, count: int, checkpointing: bool, size=(32, 32)) -> int:
    """Bytes that the allocator hands out beyond the weights during a real forward and backward on random data."""
    base = bases.open_base("klein-tiny")
    settings = recipe.finetune
    low = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    network = base.network_class()(**base.pixel_config(base.config))
    if settings.trainable == "lora":
        network = network.to(low)
    trainable.prepare(network, base, settings, 0)
    if checkpointing:
        network.enable_gradient_checkpointing()
    flow = AsymFlow(torch.eye(base.token_width, base.latent_width), 1.0)
    reference = SharedReference(base, network, flow.basis)
    if settings.trainable == "full":
        reference = LatentReference(
            base, base.network_class()(**stock_config(base.config)).to(low).requires_grad_(False)
        )
    batch = footprint.batch_like(base, base.config, size, count, 12)
    tokens = size[0] * size[1] // base.patch_size**2
    sigma, eps = torch.rand(count), torch.randn(count, tokens, base.token_width)
    objective = Objective(settings, base, flow, reference)
    inputs = sum(t.nbytes for t in (batch.rgb, batch.latents, eps, *batch.conditioning.values()))
    network.train()
    for _ in range(2):  # the second is measured: the first sets up caches of the libraries
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            objective(network, batch, sigma, eps).loss.backward()
        network.zero_grad()
    return most_of(recorded) + inputs


def most_of(recorded) -> int:
    """Most bytes at one time of what a profiler recorded."""
    current, most = 0, 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            most = max(most, current)
    return most


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize(
    "changes",
    [["finetune.precision=fp32"], ["finetune.precision=bf16"], ["finetune.trainable=lora", "finetune.lora_rank=8"]],
    ids=["full fp32", "full bf16", "lora bf16"],
)
def test_the_planned_memory_of_a_step_is_what_it_takes(changes, checkpointing):
    recipe = load(None, ["finetune.lora_dropout=0.05", *changes])
    base = bases.open_base("klein-tiny")
    built = footprint.build(base, base.config, recipe.finetune)
    planned = footprint.Step(built).peak((32, 32), 64, checkpointing=checkpointing, text_tokens=12)
    taken = measured_peak(recipe, 64, checkpointing)
    assert planned == pytest.approx(taken, rel=0.2), (planned, taken)


def stored(moment):
    """Bytes of an optimizer's moment: torchao's are three tensors."""
    if not hasattr(moment, "codes"):
        return moment.nbytes
    return sum(t.nbytes for t in (moment.codes, moment.scale, moment.qmap))


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["finetune.trainable=lora", "finetune.lora_rank=8"],
        ["finetune.trainable=lora", "finetune.lora_rank=8", "finetune.optimizer=adamw-8bit"],
    ],
    ids=["full", "lora", "lora, 8 bits"],
)
def test_what_stays_between_steps_is_planned_to_the_byte(changes, tmp_path):
    recipe = load(None, [*changes, "finetune.precision=bf16"])
    base = bases.open_base("klein-tiny")
    network = base.network_class()(**base.pixel_config(base.config))
    if recipe.finetune.trainable == "lora":
        network = network.to(torch.bfloat16)
    groups = trainable.prepare(network, base, recipe.finetune, 0)
    optimizer = trainable.make_optimizer(network, groups, recipe.finetune)
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    torch.compiler.set_stance("force_eager")  # torchao compiles its step
    optimizer.step()
    torch.compiler.set_stance("default")
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    kept = plan(recipe, tmp_path).memory.kept
    assert kept["weights, trained"] == sum(p.nbytes for p in trained)
    assert kept["weights, frozen"] == sum(p.nbytes for p in network.parameters() if not p.requires_grad)
    assert kept["gradients"] == sum(p.grad.nbytes for p in trained)
    assert kept[f"optimizer ({recipe.finetune.optimizer})"] == sum(map(stored, states))
    assert kept["weight average"] == sum(t.nbytes for t in PowerEma(network).values.values())


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Every shipped recipe, planned for the number of processes that it is meant for or names in its header."""
    made = {}
    for path in RECIPES:
        named = re.search(r"GiB a GPU at (\d+) GPUs", path.read_text())
        made[path.stem] = plan(load(path), tmp_path_factory.mktemp(path.stem), int(named[1]) if named else 1)
    return made


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_planned_and_says_so(path, plans):
    planned = plans[path.stem]
    assert planned.recipe == load(path)
    lines = "\n".join(planned.lines())
    for words in (
        "parameters",
        "memory of a process",
        "host memory",
        "disk",
        "training",
        f"{planned.recipe.finetune.steps:,} steps",
    ):
        assert words in lines
    header = path.read_text().split("\n\n")[0]
    for what in ("hardware", "memory", "time", "images"):
        assert f"# {what}: " in header
    stated = float(re.search(r"# memory: ([\d.]+) GiB", header)[1])
    peak = planned.memory.peak(planned.recipe.finetune.checkpointing) / GIB
    assert stated == pytest.approx(peak, rel=0.03, abs=0.01)
    room = re.search(r"# hardware: .*?(\d+) GB", header)
    assert room is None or peak < 0.9 * int(room[1]) * 1e9 / GIB


def test_the_planned_memory_of_a_cache_is_what_it_takes(tmp_path):
    """Weights to the byte; what a batch adds within 10 % of what the allocator hands out."""
    recipe = load(None, ["data.batch=8", "data.text_tokens=96", "data.resolution=64"])
    pictures, captions = plan_cache(recipe, bases.open_base("klein-tiny"))
    base = bases.open_base("klein-tiny")
    prompts = [f"a photo, number {number} of 8" for number in range(8)]
    works = (lambda: base.encode(torch.rand(8, 3, 64, 64)), lambda: base.text(prompts))
    for planned, part, work in zip((pictures, captions), ("vae", "text_encoder"), works, strict=True):
        weights = base.vae if part == "vae" else base.text_parts[part]
        assert planned.weights == sum(t.nbytes for t in (*weights.parameters(), *weights.buffers()))
        work()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            work()
        assert planned.added == pytest.approx(most_of(recorded), rel=0.1), part
    result = CliRunner().invoke(app, ["cache", "--plan", "--run", str(tmp_path / "run")])
    assert result.exit_code == 0 and "host memory" in result.stdout and not (tmp_path / "run").exists()


def test_counts_of_klein_9b_are_the_meta_devices(plans):
    parameters = plans["klein-9b"].parameters
    assert parameters.total == KLEIN_9B + WIDENED == parameters.frozen
    trained = {name: count for name, (count, _) in parameters.trained.items()}
    assert trained["in_projection"] == trained["out_projection"] == 768 * 4096
    assert trained["modulation"] == 2 * 4096 * 4096
    # LoRA of rank 256 on the released adapter's layers.
    double = 2 * 8 * (256 * (4096 + 24576) + 256 * (12288 + 4096))
    single = 24 * 256 * (16384 + 4096)
    assert trained["lora"] == double + single + 256 * (256 + 4096) + 256 * (4096 + 4096)


def test_more_processes_hold_less_each(plans):
    whole = plans["klein-9b-24gb"].memory.kept["weight average"]
    assert plans["klein-9b-8x80gb"].memory.kept["weight average"] == -(-whole // 8)
    assert plans["klein-9b-4nodes"].memory.kept["weight average"] == -(-whole // 8)  # four copies, each over eight
    assert "gradients, unsharded" in plans["klein-9b-8x80gb"].memory.kept  # four forwards a step
    assert "gradients, unsharded" not in plans["klein-9b-4nodes"].memory.kept


def test_time_is_of_the_given_or_the_measured_rate(tmp_path):
    recipe = load(None, ["finetune.steps=100", "finetune.batch=64", "finetune.images=1000"])
    assert "time unknown" in "\n".join(plan(recipe, tmp_path).lines())
    assert plan(recipe, tmp_path, images_per_second=16).seconds == 400
    rows = [
        {"step": 20, "images_per_second": 8.0},
        {"step": 20, "validation": {}},
        {"step": 40, "images_per_second": 2.0},
    ]
    rows.append({"step": 60, "images_per_second": 32.0})
    (tmp_path / "finetune.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    planned = plan(recipe, tmp_path)
    assert planned.seconds == 800 and "measured, from the log" in "\n".join(planned.lines())


def test_patterns_that_match_nothing_are_errors(tmp_path):
    recipe = load(None, ["finetune.trainable=lora", 'finetune.lora_targets=["base", "blocks.7.nothing"]'])
    with pytest.raises(UsageError, match=r"'blocks\.7\.nothing' matches no Linear layer"):
        plan(recipe, tmp_path)


def test_the_command_prints_the_plan_and_does_nothing(tmp_path):
    words = ["finetune", "--plan", "--run", str(tmp_path / "run"), "--images-per-second", "50"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "trained                        4,611,840" in result.stdout and "at 50.00 images/s (given)" in result.stdout
    assert not (tmp_path / "run").exists()
    result = CliRunner().invoke(app, [*words, "--gpus", "3"])
    assert result.exit_code == 2 and result.stderr.startswith("error: finetune: finetune.batch = 64 is not a multiple")
