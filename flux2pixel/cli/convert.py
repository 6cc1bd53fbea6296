"""``convert``."""

from pathlib import Path
from typing import Annotated

import typer

from flux2pixel.cli.options import CONVERTED, SUBSPACE, Flags, Out, Overwrite, Subspace
from flux2pixel.cli.stage import Job, check_subspace, resolve
from flux2pixel.convert.extras import Extras, parse_lora
from flux2pixel.runtime.errors import UsageError

Dtype = Annotated[str | None, typer.Option("--dtype", help="Of the written transformer: keep, bf16, fp16 or fp32.")]
ShardSize = Annotated[
    float | None, typer.Option("--shard-size", metavar="GB", help="Largest file, GB; 0 = as the base.")
]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="Single file to take the transformer from, diffusers' names or BFL's.")
]
Lora = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:STRENGTH]", help="LoRA to merge before the fold; repeatable."),
]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", help="Pixel-space adapter with its own basis, such as AsymFLUX.2-klein's.")
]
Link = Annotated[bool, typer.Option("--link", help="Share unchanged weight files with the base by hard links.")]


def convert_command(
    flags: Flags,
    subspace: Subspace = None,
    out: Out = None,
    weights: Weights = None,
    lora: Lora = None,
    adapter: Adapter = None,
    dtype: Dtype = None,
    shard_size: ShardSize = None,
    link: Link = False,
    overwrite: Overwrite = False,
) -> None:
    """Rewrite the base to take and return pixels, and verify that it computes the same."""
    check_subspace(subspace)
    if adapter and subspace:
        raise UsageError(f"--adapter {adapter} --subspace {subspace}: an adapter brings its own basis; give one")
    for flag, path in (("--weights", weights), ("--adapter", adapter)):
        if path and not path.is_file():
            raise UsageError(f"{flag} {path}: no such file")
    job = resolve(flags, convert__dtype=dtype, convert__shard_size=shard_size)
    destination = out or job.run / CONVERTED
    extras = Extras(link, weights, tuple(map(parse_lora, lora or ())), adapter)
    fitted = adapter or subspace or job.run / SUBSPACE
    takes: list[Path | str] = [
        f"base {job.recipe.base}",
        fitted if fitted.is_file() else "a subspace fitted to the VAE alone (vae-jacobian, data-free)",
    ]
    if job.planned(takes, [destination]):
        from flux2pixel.convert.prepare import prepare

        typer.echo("\n".join(prepare(job.recipe, None, extras).plan.lines(destination)))
        return
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise UsageError(f"{destination}: not empty; --overwrite replaces a model that flux2pixel wrote there")
    rewrite(job, subspace, out, extras)


def rewrite(job: Job, subspace: Path | None = None, out: Path | None = None, extras: Extras | None = None) -> None:
    """Convert, and name the training as what comes next."""
    from flux2pixel.convert.run import convert

    words = [
        "finetune",
        *(["--model", str(out)] if out else []),
        *([] if job.recipe.data.source else ["--images", "DIR"]),
    ]
    with job.stage("convert", [out or job.run / CONVERTED], then=job.command(*words)):
        convert(job.recipe, job.run, subspace, out, extras or Extras())
