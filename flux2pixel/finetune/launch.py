"""``--gpus N``: the same command, run again by torchrun in N processes of this machine.

Everything a user can get wrong was found before, in one process, so that no error comes N times in a launcher's trace.

A cluster's own launcher does as well; the leading process then prepares while the others wait, and the recipe may say
how many there must be (``finetune.processes``):

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m flux2pixel -- finetune --recipe RECIPE.toml --run RUN
    accelerate launch --num_processes 8 -m flux2pixel finetune --recipe RECIPE.toml --run RUN

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

import signal
import sys
from collections.abc import Sequence

import torch

from flux2pixel.errors import UsageError
from flux2pixel.progress import say

# Slurm warns with SIGUSR1; a save of sharded weights may take minutes.
SIGNALS, SHUTDOWN_SECONDS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", 1800


def check_gpus(gpus: int) -> None:
    """Raise UsageError if there are GPUs, but fewer than asked for; without any, processes run on the CPU."""
    present = torch.cuda.device_count()
    if gpus < 1 or (present and gpus > present):
        raise UsageError(f"--gpus {gpus}: this machine has {present}; ask for 1 to {max(present, 1)}")


def relaunch(gpus: int, arguments: Sequence[str]) -> int:
    """Run ``python -m flux2pixel ARGUMENTS`` in ``gpus`` processes; returns the exit code of the first that failed.

    A signal is passed on to the processes, which save and leave; then the code is 0.
    """
    import logging

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    say(f"finetune: {gpus} processes on {'GPUs' if torch.cuda.is_available() else 'the CPU'}")
    options = ["--standalone", "--nproc-per-node", str(gpus), "--signals-to-handle", SIGNALS]
    options += ["--shutdown-timeout", str(SHUTDOWN_SECONDS), "-m", "flux2pixel", "--", *arguments]
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # its trace would bury our one line
    try:
        run.run(run.parse_args(options))
    except ChildFailedError as failed:
        return next((f.exitcode for f in failed.failures.values() if f.exitcode), 1)
    except SignalException as stopped:
        say(f"finetune: stopped by {signal.Signals(stopped.sigval).name}")
    return 0


def own_arguments() -> list[str]:
    """The arguments that this command was started with."""
    return sys.argv[1:]
