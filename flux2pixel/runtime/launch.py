"""``--gpus N`` of fit-subspace, cache, finetune and eval: N processes of this machine for one command.

fit-subspace, finetune and eval run themselves again under torchrun (:func:`relaunch`); a cache needs no process group
and is made by a pool of processes (:func:`pooled`), also inside a run that a launcher started. Everything a user can
get wrong is found before, in one process, so that no error comes N times in a launcher's trace.

A cluster's own launcher does as well. For a finetune the leading process then prepares while the others wait, and the
recipe may say how many there must be (``finetune.processes``):

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m flux2pixel -- finetune --recipe RECIPE.toml --run RUN
    accelerate launch --multi_gpu --num_processes 8 -m flux2pixel finetune --recipe RECIPE.toml --run RUN

Without a GPU ``--multi_gpu`` starts as many processes on the CPU; accelerate's own ``--cpu`` starts one, or needs MPI.
torchrun of itself gives a stopped process 30 seconds: where a step and a save take longer, add ``--shutdown-timeout``
(a torch newer than 2.10), as ``--gpus N`` does.

Slurm, one task a node; ``--signal`` warns ten minutes before the time is up, the processes save, leave
``finetune-stopped.json`` behind and exit 0, and the job that is queued again goes on from there:

    #SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --signal=USR1@600 --requeue --open-mode=append
    HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    srun torchrun --nnodes 4 --nproc-per-node 8 --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \\
        --rdzv-endpoint "$HOST:29500" --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 540 \\
        -m flux2pixel -- finetune --recipe RECIPE.toml --run RUN
    test ! -f RUN/finetune-stopped.json || scontrol requeue "$SLURM_JOB_ID"

The run directory must be on a file system that all nodes see.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.progress import log

T = TypeVar("T")

# Slurm warns with SIGUSR1; a save of sharded weights may take minutes. Windows knows only two of them.
SIGNALS = ",".join(n for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1") if hasattr(signal, n))
SHUTDOWN_SECONDS = 1800


def launched() -> bool:
    """Whether a launcher (torchrun, accelerate, Slurm with torchrun) started this process as one of a world."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's place in the run; 0 for a process alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of this run, before any process group."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def here(processes: int) -> int:
    """How many of a run's ``processes`` are on this machine, as the launcher says; all of them without one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes)) if launched() else processes


def exit_process(code: int) -> NoReturn:
    """End a launched process with ``code``: Python's exit functions run and output is flushed, nothing is torn down.

    Tearing down sometimes aborts ("terminate called without an active exception"): a thread of the process group can
    still be joinable after ``destroy_process_group``, and the launcher would report a finished run as failed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def cpus() -> int:
    """CPUs that this process may use: its affinity (Slurm, taskset) and its container's quota, not the machine's."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(found, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup, or "max"
        return found


def threads(wanted: int, processes: int | None = None) -> int:
    """CPU threads of one process: ``wanted`` (0: all of this machine's) over the processes of this machine, at least 1.

    ``processes`` are those that share the machine; None: those that the launcher started here.
    """
    return max(1, (wanted or cpus()) // here(world_size() if processes is None else processes))


def set_threads(wanted: int, processes: int | None = None) -> None:
    """Have PyTorch compute in as many threads as :func:`threads` says of the recipe's ``threads``; for every verb."""
    import torch

    torch.set_num_threads(threads(wanted, processes))


def check_gpus(gpus: int, device: str | None = None) -> None:
    """Raise UsageError if ``--gpus`` is less than one, or more than there are GPUs, or CPUs where there is no GPU.

    Under a launcher the processes are there already: 1 says nothing, any other number must be theirs.
    """
    if gpus < 1:
        raise UsageError(f"--gpus {gpus}: must be at least 1")
    if launched() and gpus not in (1, world_size()):
        raise UsageError(f"--gpus {gpus}: the launcher started {world_size()} processes; leave --gpus out under one")
    if gpus == 1 or launched():
        return
    from flux2pixel.runtime import device as devices

    kind = devices.choose(device).type
    present, what = (cpus(), "CPU") if kind == "cpu" else (devices.count(kind), "GPU")
    if present < gpus:
        raise UsageError(f"--gpus {gpus}: this machine has {present} {what}{'' if present == 1 else 's'}")


def relaunch(stage: str, gpus: int, saves: bool = False) -> int:
    """Run this same command in ``gpus`` processes; returns the exit code of the first that failed.

    A signal is passed on to the processes. If the stage ``saves`` what it has done and leaves in order, the code is
    then 0, else 128 + the signal's number. Raises Flux2PixelError if a process was killed: it could not say so itself.
    """
    import logging

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    log(f"{stage}: {gpus} processes")
    options = ["--standalone", "--nproc-per-node", str(gpus), "--signals-to-handle", SIGNALS]
    if "--shutdown-timeout" in run.get_args_parser().format_help():  # else torch is 2.10 or older, and gives 30 seconds
        options += ["--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    # Without the dashes torchrun would take abbreviations of its own options out of ours.
    options += ["-m", "flux2pixel", "--", *sys.argv[1:]]
    os.environ.setdefault("OMP_NUM_THREADS", str(threads(0, gpus)))  # or torchrun says it sets 1, in five lines
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # its trace would bury our one line
    try:
        run.run(run.parse_args(options))
    except ChildFailedError as failed:
        place, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            raise Flux2PixelError(
                f"{stage}: process {place} of {gpus} was ended by {failure.signal_name()} (SIGKILL: out of memory?)"
            ) from failed
        if failure.exitcode not in (1, 2):  # of those it said why itself
            log(f"{stage}: process {place} of {gpus} failed with exit code {failure.exitcode}")
        return failure.exitcode
    except SignalException as stopped:
        log(f"{stage}: stopped by {signal.Signals(stopped.sigval).name}")
        return 0 if saves else 128 + int(stopped.sigval)
    return 0


_shared: Any = None  # of a pool's process: the counter of what is done, and the event that stops all


def _attach(counter: Any, stop: Any) -> None:
    global _shared
    _shared = counter, stop


def advance(count: int) -> None:
    """In a process of :func:`pooled`: count ``count`` pieces as done; Flux2PixelError once the others are to stop."""
    counter, stop = _shared
    parent = multiprocessing.parent_process()
    if stop.is_set() or (parent is not None and not parent.is_alive()):
        raise Flux2PixelError("stopped, because another process failed or was killed")
    with counter.get_lock():
        counter.value += count


def pooled(stage: str, works: Sequence[Callable[[], T]], progress: Callable[[int], object]) -> list[T]:
    """Do each piece of work in a process of its own and return what they gave; the first failure ends them all.

    ``progress`` is told of what the processes :func:`advance`. Raises what a process raised, or Flux2PixelError if one
    was killed.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    counter, stop, shown = context.Value("q", 0), context.Event(), 0
    with ProcessPoolExecutor(len(works), context, _attach, (counter, stop)) as pool:
        futures = [pool.submit(work) for work in works]
        try:
            while any(not future.done() for future in futures):
                done, _ = wait(futures, timeout=0.5, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                progress(counter.value - shown)
                shown = counter.value
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise Flux2PixelError(
                f"{stage}: a process died, out of memory or killed; run it again, what is written is kept"
            ) from error
        finally:
            stop.set()
