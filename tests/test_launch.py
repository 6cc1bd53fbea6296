"""The launcher of --gpus: what it refuses, what it starts, and what it makes of how the processes ended."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from flux2pixel.runtime import launch
from flux2pixel.runtime.errors import Flux2PixelError, UsageError


@pytest.fixture
def started(monkeypatch):
    """Options that torchrun is started with; nothing is started. ``ends`` holds what it raises."""
    seen = {"ends": None}

    def start(options):
        seen["options"] = options
        if seen["ends"] is not None:
            raise seen["ends"]

    monkeypatch.setattr(run, "run", start)
    monkeypatch.setattr(sys, "argv", ["flux2pixel", "eval", "--r", "x", "--gpus", "3"])
    return seen


def failed(*codes):
    failures = {}
    for rank, code in codes:
        failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="none")
    return ChildFailedError("flux2pixel", failures)


def test_the_same_command_runs_under_torchrun(started):
    assert launch.relaunch("eval", 3) == 0
    options = started["options"]
    assert options.standalone and options.nproc_per_node == "3" and options.module
    assert options.training_script == "flux2pixel"
    # The dashes are torchrun's to take off.
    assert [word for word in options.training_script_args if word != "--"] == ["eval", "--r", "x", "--gpus", "3"]


def test_how_the_processes_ended_is_the_exit_code(started, capsys):
    started["ends"] = failed((0, 2), (1, 2))
    assert launch.relaunch("eval", 3) == 2
    assert "failed" not in capsys.readouterr().err, "the leading process said its own line"
    started["ends"] = failed((1, 1))
    assert launch.relaunch("eval", 3) == 1
    assert "eval: process 1 of 3 failed with exit code 1" in capsys.readouterr().err
    started["ends"] = failed((2, -9))
    with pytest.raises(Flux2PixelError, match="process 2 of 3 was ended by SIGKILL"):
        launch.relaunch("eval", 3)


def test_stopped_by_a_signal_is_a_success_only_for_what_saves(started):
    started["ends"] = SignalException("stopped", 15)
    assert launch.relaunch("finetune", 3, saves=True) == 0
    assert launch.relaunch("eval", 3) == 143


def test_gpus_that_are_not_there_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="--gpus 0: must be at least 1"):
        launch.check_gpus(0)
    launch.check_gpus(7)  # on the CPU any number
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launch.check_gpus(2)
    with pytest.raises(UsageError, match="--gpus 3: this machine has 2"):
        launch.check_gpus(3)


def test_a_run_of_many_machines_makes_its_cache_with_this_machines_processes(monkeypatch):
    assert launch.here(8) == 8
    for name, value in {"RANK": "0", "WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert launch.here(launch.world_size()) == 8


def test_pooled_work_comes_back_in_order_and_is_counted():
    counted = []
    works = [partial(divmod, 7, 2), partial(divmod, 9, 2)]
    assert launch.pooled("cache", works, counted.append) == [(3, 1), (4, 1)]
    assert sum(counted) == 0
    with pytest.raises(ZeroDivisionError):
        launch.pooled("cache", [partial(divmod, 1, 0)], counted.append)


def test_a_launched_process_leaves_with_its_code_and_its_exit_functions_run() -> None:
    script = "import atexit, sys; from flux2pixel.runtime.launch import exit_process\n"
    script += "atexit.register(print, 'kept'); print('said')\nexit_process(3)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "said\nkept\n"), done.stderr
