"""Processes: FSDP2 on gloo gives what one process gives, and a checkpoint does not care how many there were."""

import json
import multiprocessing
import os
import shutil
import socket
import sys

import pytest
import torch
from finetuning import LORA, SMALL, flags, python, small, weights
from typer.testing import CliRunner

from flux2pixel.cli import app
from flux2pixel.finetune import run as stage
from flux2pixel.finetune.network import checkpoint
from flux2pixel.finetune.network.trainable import split
from flux2pixel.runtime.processes import Team

STEPS = ["finetune.steps=20", "finetune.validate_every=20", "finetune.save_every=50", 'data.exclude=["scene 2000003"]']
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_two_ranks_give_what_one_process_gives(prepared_run, tmp_path):
    one, two = shutil.copytree(prepared_run, tmp_path / "one"), shutil.copytree(prepared_run, tmp_path / "two")
    torch.set_num_threads(1)
    stage.finetune(small(*STEPS), one)
    words = ["finetune", "--run", two, "--gpus", "2", *flags([*SMALL, *STEPS])]
    said = python("-m", "flux2pixel", *words).stderr
    assert said.count("data.exclude: 1 of 48 images are left out") == 1, "what is prepared is prepared once"
    for kind in ("transformer", "transformer_raw"):
        alone, shared = weights(one / "finetuned", kind), weights(two / "finetuned", kind)
        start = weights(prepared_run / "converted")
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


def test_sharded_lora_average_abort_and_a_checkpoint_read_by_one_process(prepared_run, tmp_path):
    folder = shutil.copytree(prepared_run, tmp_path / "run")
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


def test_accelerate_launches_it_too(prepared_run, tmp_path):
    """Two processes on the CPU: accelerate has torchrun start them with --multi_gpu, its --cpu would start one."""
    pytest.importorskip("accelerate")
    folder = shutil.copytree(prepared_run, tmp_path / "run")
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    more = ["finetune.processes=2", "finetune.steps=2", "finetune.save_every=9", "finetune.validate_every=9"]
    python(*launcher, "-m", "flux2pixel", "finetune", "--run", folder, *flags([*SMALL, *more]))
    record = json.loads((folder / "finetuned" / "finetune.json").read_text())
    assert record["processes"] == 2 and record["steps"] == 2
    start, end = weights(prepared_run / "converted"), weights(folder / "finetuned", "transformer_raw")
    assert not any(torch.equal(start[name], end[name]) for name in ("x_embedder.weight", "proj_out.weight"))


def test_errors_of_a_launched_run_are_one_line_from_one_process(prepared_run, tmp_path):
    """By --gpus before anything is launched; in launched ones (forked: quicker) by the leading one."""
    folder = shutil.copytree(prepared_run, tmp_path / "run")
    words = ["finetune", "--run", str(folder), *flags([*SMALL, "finetune.processes=3"])]
    said = "2 processes, but the recipe says finetune.processes = 3"
    result = CliRunner().invoke(app, [*words, "--gpus", "2"])
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("error: ") == 1

    def process(rank, port):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        sys.stderr = (tmp_path / f"{rank}.txt").open("w", buffering=1)
        app(words)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [multiprocessing.get_context("fork").Process(target=process, args=(rank, port)) for rank in range(2)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(60)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert [one.exitcode for one in processes] == [2, 2], (first, second)
    assert said in first and first.count("error: ") == 1 and "error" not in second
