"""``eval``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from flux2pixel.commands.job import check, one_line_errors, resolve
from flux2pixel.commands.options import (
    CONVERTED,
    FINETUNED,
    REPORT,
    Base,
    Debug,
    DryRun,
    Gpus,
    Out,
    RecipePath,
    RunPath,
    SampleSteps,
    Seed,
    Set,
    Suite,
)


def eval_command(
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    model: Annotated[
        list[Path] | None,
        typer.Option(help=f"Model folder, repeatable. Default: the base, <run>/{CONVERTED} and <run>/{FINETUNED}."),
    ] = None,
    suite: Suite = None,
    out: Out = None,
    steps: SampleSteps = None,
    seed: Seed = None,
    gpus: Gpus = 1,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Score the models side by side and write the report."""
    with one_line_errors(debug):
        check(gpus, model or ())
        job = resolve(recipe, run, assignments, base=base, eval__suite=suite, sample__steps=steps, seed=seed)
        takes: Sequence[Path | str] = model or [f"base {job.recipe.base}", job.run / CONVERTED, job.run / FINETUNED]
        if job.start(takes, [out or job.run / REPORT], dry_run):
            from flux2pixel.evaluate.stage import evaluate

            evaluate(job.recipe, job.run, model or None, out)
