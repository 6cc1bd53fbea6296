"""``fit-subspace``, ``compare`` and ``export-subspace``."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from flux2pixel.cli.job import image_source, one_line_errors, resolve, timed
from flux2pixel.cli.options import (
    SUBSPACE,
    Base,
    Debug,
    DryRun,
    Images,
    Method,
    Out,
    Rank,
    RecipePath,
    RunPath,
    Seed,
    Set,
)
from flux2pixel.runtime import launch
from flux2pixel.runtime.errors import UsageError

Merge = Annotated[
    list[Path] | None,
    typer.Option("--merge", help="Sums of other fits (.moments.safetensors) to add, instead of images; repeatable."),
]
Gpus = Annotated[int, typer.Option("--gpus", help="Processes to share the images, one a GPU, else on the CPU.")]


def fit_subspace_command(
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    images: Images = None,
    method: Method = None,
    rank: Rank = None,
    merge: Merge = None,
    out: Out = None,
    seed: Seed = None,
    gpus: Gpus = 1,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Fit the low-rank basis that ties pixels to the base's latents."""
    with one_line_errors(debug, silent=launch.rank() > 0):
        flags: dict[str, Any] = {"fit_subspace__source": images, "fit_subspace__rank": rank, "seed": seed}
        job = resolve(recipe, run, assignments, base=base, fit_subspace__method=method, **flags)
        for path in merge or ():
            if not path.is_file():
                raise UsageError(f"--merge {path}: no such file; give the .moments.safetensors of other fits")
        takes: list[Path | str] = [f"base {job.recipe.base}"]
        takes += merge or [image_source(job.recipe)]
        written = out or job.run / SUBSPACE
        launch.check_gpus(gpus)
        if not job.start(takes, [written], dry_run):
            return
        from flux2pixel.models.base import open_base
        from flux2pixel.subspace.run import fit_subspace
        from flux2pixel.subspace.settings import check

        work = partial(fit_subspace, job.recipe, job.run, out, merge or ())
        if launch.rank():  # one process of a launched run, and not the one that writes
            work()
            return
        check(job.recipe, open_base(job.recipe.base, parts=("vae",)))
        if gpus > 1 and not launch.launched():
            raise typer.Exit(launch.relaunch("fit-subspace", gpus))
        timed(job.run, "fit_subspace", work)


def compare_command(
    first: Annotated[Path, typer.Argument(help="A subspace, ours or the reference's .pth.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
    debug: Debug = False,
) -> None:
    """The angles between two bases and the ratio of their scales."""
    with one_line_errors(debug):
        from flux2pixel.weights.subspace import compare

        typer.echo(compare(first, second))


def export_subspace_command(
    source: Annotated[Path, typer.Argument(help="A subspace, ours or the reference's .pth.")],
    target: Annotated[Path, typer.Argument(help="The file to write: .safetensors (ours) or .pth.")],
    debug: Debug = False,
) -> None:
    """Rewrite a subspace in the reference implementation's format, or in ours."""
    with one_line_errors(debug):
        from flux2pixel.weights.subspace import export

        export(source, target)
        typer.echo(f"wrote {target}")
