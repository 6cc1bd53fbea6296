"""``cache``."""

from pathlib import Path
from typing import Annotated

import typer

from flux2pixel.cli.job import one_line_errors, resolve
from flux2pixel.cli.options import Base, Debug, DryRun, RecipePath, RunPath, Set
from flux2pixel.runtime.launch import check_gpus


def cache_command(
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    source: Annotated[
        str | None, typer.Option(help="Training images: a folder, .jsonl, .tar, hf:NAME, scenes.")
    ] = None,
    images: Annotated[int | None, typer.Option(help="How many of them; 0 = all.")] = None,
    gpus: Annotated[int, typer.Option("--gpus", help="Processes, each on a GPU of its own, or on the CPU.")] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Print the memory that it takes, then stop.")] = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Encode the training images and captions once: pixels, latents and text embeddings. Goes on after a kill."""
    with one_line_errors(debug):
        check_gpus(gpus)
        job = resolve(recipe, run, assignments, base=base, data__source=source, finetune__images=images)
        if plan:
            from flux2pixel.data.encode import open_encoders
            from flux2pixel.data.plan import lines, plan_cache

            typer.echo("\n".join(lines(job.recipe, plan_cache(job.recipe, open_encoders(job.recipe)), gpus)))
            return
        folder = job.run / job.recipe.data.cache
        takes: list[Path | str] = [f"base {job.recipe.base}", f"images {job.recipe.data.source}"]
        if job.start(takes, [folder], dry_run):
            from flux2pixel.data.encode import make, open_encoders

            make(job.recipe, job.run, open_encoders(job.recipe), gpus)
