"""``fit-subspace``, ``compare`` and ``export-subspace``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from flux2pixel.cli.options import SUBSPACE, Flags, Gpus, Images, Method, Out, Rank
from flux2pixel.cli.stage import Job, fit_images, resolve
from flux2pixel.runtime import launch
from flux2pixel.runtime.errors import UsageError

Merge = Annotated[
    list[Path] | None,
    typer.Option("--merge", help="Sums of other fits (.moments.safetensors) to add, instead of images; repeatable."),
]


def fit_subspace_command(
    flags: Flags,
    images: Images = None,
    method: Method = None,
    rank: Rank = None,
    merge: Merge = None,
    out: Out = None,
    gpus: Gpus = 1,
) -> None:
    """Fit the low-rank basis that ties pixels to the base's latents."""
    job = resolve(flags, fit_subspace__source=images, fit_subspace__method=method, fit_subspace__rank=rank)
    for path in merge or ():
        if not path.is_file():
            raise UsageError(f"--merge {path}: no such file; give the .moments.safetensors of other fits")
    takes: list[Path | str] = [f"base {job.recipe.base}"]
    takes += merge or [fit_images(job.recipe)]
    if not job.planned(takes, [out or job.run / SUBSPACE]):
        fit(job, merge or (), out, gpus)


def fit(job: Job, merge: Sequence[Path] = (), out: Path | None = None, gpus: int = 1) -> None:
    """Fit, in ``gpus`` processes."""
    if launch.rank() == 0:
        from flux2pixel.models.base import open_base
        from flux2pixel.subspace.settings import check

        launch.check_gpus(gpus, job.recipe.device)
        check(job.recipe, open_base(job.recipe.base, parts=("vae",)))
        if gpus > 1 and not launch.launched():
            raise typer.Exit(launch.relaunch("fit-subspace", gpus))
    from flux2pixel.subspace.run import fit_subspace

    words = ["convert", *(["--subspace", str(out)] if out else [])]
    with job.stage("fit-subspace", [out or job.run / SUBSPACE], then=job.command(*words)):
        fit_subspace(job.recipe, job.run, out, merge)


def compare_command(
    first: Annotated[Path, typer.Argument(help="A subspace, ours or the reference's .pth.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
) -> None:
    """The angles between two bases and the ratio of their scales."""
    from flux2pixel.subspace.compare import compare

    typer.echo(compare(first, second))


def export_subspace_command(
    source: Annotated[Path, typer.Argument(help="A subspace, ours or the reference's .pth.")],
    target: Annotated[Path, typer.Argument(help="The file to write: .safetensors (ours) or .pth.")],
) -> None:
    """Rewrite a subspace in the reference implementation's format, or in ours."""
    from flux2pixel.weights.subspace import export

    export(source, target)
    typer.echo(f"wrote {target}")
