"""Processes: FSDP2 on gloo gives what one process gives, and a checkpoint does not care how many there were."""

import json
import shutil

import pytest
import torch
from finetuning import LORA, SMALL, flags, new_run, python, small, weights

from flux2pixel.finetune import checkpoint, stage
from flux2pixel.finetune.parallel import Team
from flux2pixel.finetune.trainable import split

STEPS = ["finetune.steps=20", "finetune.validate_every=20", "finetune.save_every=50"]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = new_run(tmp_path_factory.mktemp("run"))
    stage.prepare(small(), folder)
    return folder


def test_two_ranks_give_what_one_process_gives(run, tmp_path):
    one, two = shutil.copytree(run, tmp_path / "one"), shutil.copytree(run, tmp_path / "two")
    torch.set_num_threads(1)
    stage.finetune(small(*STEPS), one)
    words = ["finetune", "--run", two, "--gpus", "2", *flags([*SMALL, *STEPS])]
    python("-m", "flux2pixel", *words)
    for kind in ("transformer", "transformer_raw"):
        alone, shared = weights(one / "finetuned", kind), weights(two / "finetuned", kind)
        start = weights(run / "converted")
        for name in alone:
            error = (alone[name] - shared[name]).norm() / alone[name].norm().clamp(min=1e-12)
            assert error < 1e-5, (kind, name, float(error))
        assert not all(torch.equal(start[name], alone[name]) for name in alone)
    logs = [[json.loads(line) for line in (f / "finetune.jsonl").read_text().splitlines()] for f in (one, two)]
    for mine, theirs in zip(*logs, strict=True):
        assert mine["step"] == theirs["step"]
        if "loss" in mine:
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        if "validation" in mine:
            assert mine["validation"]["bins"] == pytest.approx(theirs["validation"]["bins"], rel=1e-5)


def test_sharded_lora_average_abort_and_a_checkpoint_read_by_one_process(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    done = python(*TORCHRUN, "tests/workers.py", "two_ranks", folder)
    assert "rank 0 of 2 done" in done.stdout and "rank 1 of 2 done" in done.stdout
    recipe, alone = small(*LORA), Team(0, 1, torch.device("cpu"))
    trainer = stage.build(recipe, stage.open_source(folder / "converted", recipe), alone)
    checkpoint.load(trainer.state, checkpoint.newest(folder / "checkpoints"), alone)
    saved = torch.load(folder / "trained.pt")
    trained = {n: p for n, p in trainer.network.named_parameters() if p.requires_grad}
    assert trained.keys() == saved.keys()
    assert all(torch.equal(trained[name], saved[name]) for name in saved)
    assert trainer.state.step == 3 and trainer.state.ema.updates == 3
    assert len(trainer.state.optimizer.state) == len(trained)
    full, lora = split(saved)
    assert {"x_embedder.weight", "proj_out.weight", "norm_out.linear.weight"} <= full.keys()
    assert lora and all(".lora_A.weight" in name or ".lora_B.weight" in name for name in lora)


def test_errors_of_a_launched_run_are_one_line_from_one_process(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    words = ["finetune", "--run", folder, *flags([*SMALL, "finetune.processes=3"])]
    for launcher in (("-m", "flux2pixel", *words, "--gpus", "2"), (*TORCHRUN, "-m", "flux2pixel", "--", *words)):
        done = python(*launcher, check=False)
        assert done.returncode
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "2 processes, but the recipe says finetune.processes = 3" in lines[0], done.stderr
