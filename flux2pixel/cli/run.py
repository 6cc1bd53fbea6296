"""All four stages in order."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flux2pixel.cli.job import check, image_source, one_line_errors, resolve, timed
from flux2pixel.cli.options import (
    CONVERTED,
    FINETUNED,
    REPORT,
    SUBSPACE,
    Base,
    Debug,
    DryRun,
    Gpus,
    Images,
    Method,
    Rank,
    RecipePath,
    RunPath,
    Seed,
    Set,
    Suite,
    TrainSteps,
)
from flux2pixel.runtime.errors import UsageError


def run_all(
    recipe_file: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="Recipe file, TOML.")] = None,
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    images: Images = None,
    method: Method = None,
    rank: Rank = None,
    steps: TrainSteps = None,
    suite: Suite = None,
    seed: Seed = None,
    gpus: Gpus = 1,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """All four stages, from a latent base to a scored pixel model."""
    with one_line_errors(debug):
        if recipe_file and recipe:
            raise UsageError(f"run {recipe_file} --recipe {recipe}: two recipes; give one")
        check(gpus)
        flags: dict[str, Any] = {"fit_subspace__source": images, "fit_subspace__method": method}
        flags |= {"fit_subspace__rank": rank, "finetune__steps": steps, "eval__suite": suite}
        job = resolve(recipe_file or recipe, run, assignments, fresh=True, base=base, seed=seed, **flags)
        takes = [f"base {job.recipe.base}", image_source(job.recipe)]
        writes = [job.run / name for name in (SUBSPACE, CONVERTED, FINETUNED, REPORT, "report.json", "seconds.json")]
        if not job.start(takes, writes, dry_run):
            return
        from flux2pixel.convert.run import convert
        from flux2pixel.evaluate.run import evaluate
        from flux2pixel.finetune.run import finetune
        from flux2pixel.subspace.run import fit_subspace

        timed(job.run, "fit_subspace", lambda: fit_subspace(job.recipe, job.run))
        timed(job.run, "convert", lambda: convert(job.recipe, job.run))
        timed(job.run, "finetune", lambda: finetune(job.recipe, job.run))
        evaluate(job.recipe, job.run)
