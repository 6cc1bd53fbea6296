"""``finetune``."""

from pathlib import Path
from typing import Annotated

import typer

from flux2pixel.commands.job import check, one_line_errors, resolve, timed
from flux2pixel.commands.options import (
    CONVERTED,
    FINETUNED,
    Base,
    Debug,
    DryRun,
    Gpus,
    Out,
    RecipePath,
    RunPath,
    Seed,
    Set,
    TrainSteps,
)


def finetune_command(
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    model: Annotated[Path | None, typer.Option(help=f"Converted folder. Default: <run>/{CONVERTED}.")] = None,
    out: Out = None,
    steps: TrainSteps = None,
    seed: Seed = None,
    gpus: Gpus = 1,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train the converted model on real pixels."""
    with one_line_errors(debug):
        check(gpus, [model])
        job = resolve(recipe, run, assignments, base=base, finetune__steps=steps, seed=seed)
        if job.start([model or job.run / CONVERTED], [out or job.run / FINETUNED], dry_run):
            from flux2pixel.finetune.stage import finetune

            timed(job.run, "finetune", lambda: finetune(job.recipe, job.run, model, out))
