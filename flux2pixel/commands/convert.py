"""``convert``."""

from pathlib import Path

from flux2pixel.commands.job import check, one_line_errors, resolve, timed
from flux2pixel.commands.options import (
    CONVERTED,
    SUBSPACE,
    Base,
    Debug,
    DryRun,
    Out,
    RecipePath,
    RunPath,
    Seed,
    Set,
    Subspace,
)


def convert_command(
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    subspace: Subspace = None,
    out: Out = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Rewrite the base to take and return pixels, and verify that it computes the same."""
    with one_line_errors(debug):
        check(subspace=subspace)
        job = resolve(recipe, run, assignments, base=base, seed=seed)
        takes: list[Path | str] = [f"base {job.recipe.base}", subspace or job.run / SUBSPACE]
        if job.start(takes, [out or job.run / CONVERTED], dry_run):
            from flux2pixel.convert.stage import convert

            timed(job.run, "convert", lambda: convert(job.recipe, job.run, subspace, out))
