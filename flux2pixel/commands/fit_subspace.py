"""``fit-subspace``."""

from typing import Any

from flux2pixel.commands.job import check, image_source, one_line_errors, resolve, timed
from flux2pixel.commands.options import (
    SUBSPACE,
    Base,
    Debug,
    DryRun,
    Gpus,
    Images,
    Method,
    Out,
    Rank,
    RecipePath,
    RunPath,
    Seed,
    Set,
)


def fit_subspace_command(
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    images: Images = None,
    method: Method = None,
    rank: Rank = None,
    out: Out = None,
    seed: Seed = None,
    gpus: Gpus = 1,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Fit the low-rank basis that ties pixels to the base's latents."""
    with one_line_errors(debug):
        check(gpus)
        flags: dict[str, Any] = {"fit_subspace__source": images, "fit_subspace__rank": rank, "seed": seed}
        job = resolve(recipe, run, assignments, base=base, fit_subspace__method=method, **flags)
        takes = [f"base {job.recipe.base}", image_source(job.recipe)]
        if job.start(takes, [out or job.run / SUBSPACE], dry_run):
            from flux2pixel.subspace.stage import fit_subspace

            timed(job.run, "fit_subspace", lambda: fit_subspace(job.recipe, job.run, out))
