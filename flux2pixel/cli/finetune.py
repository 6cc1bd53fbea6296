"""``finetune``."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from flux2pixel.cli.job import check, one_line_errors, resolve, timed
from flux2pixel.cli.options import (
    CONVERTED,
    FINETUNED,
    Base,
    Debug,
    DryRun,
    Out,
    RecipePath,
    RunPath,
    Seed,
    Set,
    TrainSteps,
)
from flux2pixel.runtime import launch


def finetune_command(
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    model: Annotated[Path | None, typer.Option(help=f"Converted folder. Default: <run>/{CONVERTED}.")] = None,
    out: Out = None,
    steps: TrainSteps = None,
    seed: Seed = None,
    gpus: Annotated[int, typer.Option("--gpus", help="Processes, each on a GPU of its own, or on the CPU.")] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Print parameters, memory, disk and time, then stop.")] = False,
    images_per_second: Annotated[
        float | None, typer.Option(min=1e-9, help="Rate that --plan reckons with. Default: that of the run's log.")
    ] = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train the converted model on real pixels. Killed, the same command goes on from its last checkpoint."""
    rank = launch.rank()
    with one_line_errors(debug, silent=rank > 0):
        check(models=[model])
        job = resolve(recipe, run, assignments, base=base, finetune__steps=steps, seed=seed)
        if plan:
            from flux2pixel.finetune.plan.plan import plan as planned

            typer.echo("\n".join(planned(job.recipe, job.run, gpus, images_per_second).lines()))
            return
        launch.check_gpus(gpus)
        if not job.start([model or job.run / CONVERTED], [out or job.run / FINETUNED], dry_run):
            return
        from flux2pixel.finetune.run import finetune

        if gpus != 1 and not launch.launched():
            from flux2pixel.finetune.run import prepare

            prepare(job.recipe, job.run, model, gpus)
            raise typer.Exit(launch.relaunch("finetune", gpus, saves=True))
        work = partial(finetune, job.recipe, job.run, model, out)
        if rank == 0:
            timed(job.run, "finetune", work)
        else:
            work()
