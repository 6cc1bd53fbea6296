"""All four stages in order."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from flux2pixel.cli.convert import rewrite
from flux2pixel.cli.evaluate import score
from flux2pixel.cli.finetune import train
from flux2pixel.cli.fit_readout import fit as fit_readout
from flux2pixel.cli.fit_subspace import fit
from flux2pixel.cli.options import (
    CONVERTED,
    FINETUNED,
    READOUT,
    REPORT,
    SUBSPACE,
    Flags,
    Gpus,
    Images,
    Method,
    Rank,
    Suite,
    TrainSteps,
)
from flux2pixel.cli.stage import Job, fit_images, resolve, with_training_images
from flux2pixel.runtime import launch
from flux2pixel.runtime.errors import UsageError


def run_all(
    flags: Flags,
    recipe_file: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="Recipe file, TOML.")] = None,
    images: Images = None,
    method: Method = None,
    rank: Rank = None,
    steps: TrainSteps = None,
    suite: Suite = None,
    gpus: Gpus = 1,
) -> None:
    """All stages, from a latent base to a scored pixel model. The images are fitted, trained and validated on."""
    if recipe_file and flags.recipe:
        raise UsageError(f"run {recipe_file} --recipe {flags.recipe}: two recipes; give one")
    launch.check_gpus(gpus, flags.device)
    flags = replace(flags, recipe=recipe_file or flags.recipe)
    changes: dict[str, Any] = {
        "fit_subspace__source": images,
        "readout__source": images,
        "data__source": images,
        "fit_subspace__method": method,
    }
    changes |= {"fit_subspace__rank": rank, "finetune__steps": steps, "eval__suite": suite}
    job = resolve(flags, fresh=True, **changes)
    takes = [f"base {job.recipe.base}", fit_images(job.recipe)]
    job = with_training_images(job)
    if job.recipe.data.source != job.recipe.fit_subspace.source:
        takes.append(f"images {job.recipe.data.source}")
    writes = [
        job.run / name for name in (SUBSPACE, CONVERTED, READOUT, FINETUNED, REPORT, "report.json", "seconds.json")
    ]
    if job.planned(takes, writes):
        return
    _in_processes(job, "fit-subspace", gpus, fit)
    rewrite(job)
    _in_processes(job, "fit-readout", gpus, fit_readout)
    _in_processes(job, "finetune", gpus, train)
    _in_processes(job, "eval", gpus, score)


def _in_processes(job: Job, command: str, gpus: int, stage: Callable[..., None]) -> None:
    """Run a stage; in several processes as the command line that does it alone, which the launcher starts anew."""
    if gpus == 1:
        stage(job)
        return
    # An empty recipe file keeps the run's own, if it has one, out of it, as it is for this command.
    words = [command, "--recipe", str(job.file or os.devnull), "--run", str(job.run), "--gpus", str(gpus)]
    given, sys.argv = sys.argv, [sys.argv[0], *words, *(word for one in job.overrides for word in ("--set", one))]
    try:
        stage(job, gpus=gpus)
    except typer.Exit as done:
        if done.exit_code:
            raise
    finally:
        sys.argv = given
