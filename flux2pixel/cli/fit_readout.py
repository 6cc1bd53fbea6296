"""``fit-readout``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from flux2pixel.cli.options import CONVERTED, READOUT, Flags, Gpus, Images, Out
from flux2pixel.cli.stage import Job, resolve
from flux2pixel.runtime import launch
from flux2pixel.runtime.errors import UsageError

Model = Annotated[Path | None, typer.Option("--model", help=f"Converted folder. Default: <run>/{CONVERTED}.")]
Part = Annotated[
    list[str] | None, typer.Option("--part", help="head, offset, prior or last; repeatable. Default: all.")
]
Merge = Annotated[
    list[Path] | None,
    typer.Option("--merge", help="Sums of other readouts (sums.safetensors) to add, instead of images; repeatable."),
]


def fit_readout_command(
    flags: Flags,
    images: Images = None,
    model: Model = None,
    part: Part = None,
    merge: Merge = None,
    out: Out = None,
    gpus: Gpus = 1,
) -> None:
    """Fit detail, texture and last step to the frozen network: a pixel model without training."""
    job = resolve(flags, readout__source=images, readout__parts=part)
    for path in merge or ():
        if not path.is_file():
            raise UsageError(f"--merge {path}: no such file; give the sums.safetensors of other readouts")
    source = model or job.run / CONVERTED
    takes: list[Path | str] = [f"base {job.recipe.base}", source]
    takes += merge or [f"images {job.recipe.readout.source or 'drawn by the base itself'}"]
    if job.planned(takes, [out or job.run / READOUT]):
        if source.is_dir() and launch.rank() == 0:
            from flux2pixel.readout.plan import lines

            typer.echo("\n".join(lines(job.recipe, source)))
        return
    fit(job, model, merge or (), out, gpus)


def fit(
    job: Job, model: Path | None = None, merge: Sequence[Path] = (), out: Path | None = None, gpus: int = 1
) -> None:
    """Fit, in ``gpus`` processes."""
    from flux2pixel.readout.run import check, fit_readout

    target = out or job.run / READOUT
    if launch.rank() == 0:
        launch.check_gpus(gpus, job.recipe.device)
        check(job.recipe, model or job.run / CONVERTED)
        if gpus > 1 and not launch.launched():
            raise typer.Exit(launch.relaunch("fit-readout", gpus))
    words = ["finetune", *(["--model", str(out)] if out else [])]
    words += [] if job.recipe.data.source else ["--images", "DIR"]
    with job.stage("fit-readout", [target], then=job.command(*words)):
        fit_readout(job.recipe, job.run, model, out, merge)
