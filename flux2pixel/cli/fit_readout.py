"""``fit-readout``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flux2pixel.cli.job import one_line_errors, resolve, timed
from flux2pixel.cli.options import CONVERTED, Base, Debug, DryRun, Out, RecipePath, RunPath, Seed, Set
from flux2pixel.runtime import launch
from flux2pixel.runtime.errors import UsageError

READOUT = "readout"
Images = Annotated[
    str | None, typer.Option("--images", metavar="SOURCE", help="Images to fit on. Default: the base draws them.")
]
Model = Annotated[Path | None, typer.Option("--model", help=f"Converted folder. Default: <run>/{CONVERTED}.")]
Part = Annotated[
    list[str] | None, typer.Option("--part", help="head, offset, prior or last; repeatable. Default: all.")
]
Merge = Annotated[
    list[Path] | None,
    typer.Option("--merge", help="Sums of other fits (<readout>/sums.safetensors) to add, instead of images."),
]
Gpus = Annotated[int, typer.Option("--gpus", help="Processes to share the images, one a GPU, else on the CPU.")]


def fit_readout_command(
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    images: Images = None,
    model: Model = None,
    part: Part = None,
    merge: Merge = None,
    out: Out = None,
    seed: Seed = None,
    gpus: Gpus = 1,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Fit detail, texture and last step to the frozen network: a pixel model without training."""
    rank = launch.rank()
    with one_line_errors(debug, silent=rank > 0):
        flags: dict[str, Any] = {"readout__source": images, "readout__parts": part, "base": base, "seed": seed}
        job = resolve(recipe, run, assignments, **flags)
        for path in merge or ():
            if not path.is_file():
                raise UsageError(f"--merge {path}: no such file; give the sums.safetensors of other readouts")
        source, written = model or job.run / CONVERTED, out or job.run / READOUT
        images_of = job.recipe.readout.source or "drawn by the base itself"
        takes: list[Path | str] = [f"base {job.recipe.base}", source]
        takes += merge or [f"images {images_of}"]
        if rank == 0 and not job.start(takes, [written], dry_run):
            from flux2pixel.readout.plan import lines

            if source.is_dir():
                typer.echo("\n".join(lines(job.recipe, source)))
            return
        from flux2pixel.readout.run import check, fit_readout

        if not launch.launched():
            launch.check_gpus(gpus)
            check(job.recipe, source)
            if gpus > 1:
                raise typer.Exit(launch.relaunch("fit-readout", gpus))

        def work() -> object:
            return fit_readout(job.recipe, job.run, model, out, merge or ())

        timed(job.run, "fit_readout", work) if rank == 0 else work()
