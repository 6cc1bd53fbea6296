"""The team of several processes, under torchrun on the CPU: who waits, who speaks when one fails, and how it ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flux2pixel.runtime.processes import join

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def two(*words: object, timeout: float = 300) -> subprocess.CompletedProcess:
    """What two processes, with one thread each, said and how they ended."""
    root = Path(__file__).parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    command = [*TORCHRUN, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=root)


def test_a_barrier_and_the_preparation_have_no_limit_and_collectives_add(tmp_path):
    """fit-subspace's own run, whose first process estimates for longer than a collective may take."""
    done = two("tests/workers.py", "slow_leader", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("joined [3.0, 2.0] ['a', 'b'] from 0") == 2
    assert (tmp_path / "subspace.safetensors").is_file()


@pytest.mark.parametrize(("rank", "how"), [(0, "raise"), (1, "raise"), (1, "usage")])
def test_one_failing_process_ends_all_within_a_minute_with_its_line_alone(tmp_path, rank, how):
    """The other process is inside a barrier or a collective of eval's own team."""
    began = time.monotonic()
    done = two("tests/workers.py", "one_fails", tmp_path, rank, how)
    assert time.monotonic() - began < 60
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    words = "RuntimeError: torn shard (--debug shows where)" if how == "raise" else "wrong"
    assert said == [f"error: process {rank} of 2: {words}"], done.stderr
    assert done.returncode and f"exitcode  : {2 if how == 'usage' else 1} " in done.stderr


def test_a_dry_run_under_a_launcher_stops_all_processes(tmp_path):
    done = two("-m", "flux2pixel", "--", "fit-subspace", "--run", tmp_path / "run", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("writes ") == 1 and not (tmp_path / "run").exists()


def test_a_team_of_one_needs_no_process_group():
    with join(lambda: None) as team:
        assert team.leads and team.world == 1 and team.share([1, 2]) == [1, 2]
        assert (team.sum([1.5]), team.gather("a"), team.broadcast("b")) == ([1.5], ["a"], "b")
        team.barrier()
