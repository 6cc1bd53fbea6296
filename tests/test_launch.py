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
    assert "failed" not in capsys.readouterr().err, "that process said its own line"
    started["ends"] = failed((1, 3))
    assert launch.relaunch("eval", 3) == 3
    assert "eval: process 1 of 3 failed with exit code 3" in capsys.readouterr().err
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "cpus", lambda: 4)
    launch.check_gpus(4)  # on the CPU as many as there are CPUs
    with pytest.raises(UsageError, match="--gpus 64: this machine has 4 CPUs"):
        launch.check_gpus(64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launch.check_gpus(2)
    with pytest.raises(UsageError, match="--gpus 3: this machine has 2 GPUs"):
        launch.check_gpus(3)
    for name, value in {"RANK": "0", "WORLD_SIZE": "32"}.items():
        monkeypatch.setenv(name, value)
    launch.check_gpus(32)  # they are there, on other machines too
    with pytest.raises(UsageError, match="--gpus 3: the launcher started 32"):
        launch.check_gpus(3)


def test_torchrun_is_asked_whether_it_knows_a_shutdown_timeout(started, monkeypatch):
    """That option is newer than torch 2.10; an unknown one would end every command of several processes."""
    assert launch.relaunch("eval", 3) == 0
    assert started["options"].shutdown_timeout == launch.SHUTDOWN_SECONDS
    parser = run.get_args_parser()
    action = next(a for a in parser._actions if a.dest == "shutdown_timeout")
    for group in parser._action_groups:
        if action in group._group_actions:
            group._group_actions.remove(action)
    parser._actions.remove(action)
    for word in action.option_strings:
        del parser._option_string_actions[word]
    monkeypatch.setattr(run, "get_args_parser", lambda: parser)
    assert launch.relaunch("eval", 3) == 0
    assert not hasattr(started["options"], "shutdown_timeout")


def test_threads_are_shared_by_the_processes_of_this_machine(monkeypatch):
    monkeypatch.setattr(launch, "cpus", lambda: 64)
    assert (launch.threads(0), launch.threads(3), launch.threads(0, processes=4)) == (64, 3, 16)
    for name, value in {"RANK": "0", "WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert (launch.threads(0), launch.threads(16), launch.threads(3)) == (8, 2, 1)
    before = torch.get_num_threads()
    launch.set_threads(16)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


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
