"""``convert``."""

from pathlib import Path
from typing import Annotated

import typer

from flux2pixel.cli.job import check, one_line_errors, resolve, timed
from flux2pixel.cli.options import (
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
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model that is already at --out.")]


def convert_command(
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    subspace: Subspace = None,
    out: Out = None,
    weights: Weights = None,
    lora: Lora = None,
    adapter: Adapter = None,
    dtype: Dtype = None,
    shard_size: ShardSize = None,
    link: Link = False,
    overwrite: Overwrite = False,
    seed: Seed = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Rewrite the base to take and return pixels, and verify that it computes the same."""
    with one_line_errors(debug):
        check(subspace=subspace)
        if adapter and subspace:
            raise UsageError(f"--adapter {adapter} --subspace {subspace}: an adapter brings its own basis; give one")
        for flag, path in (("--weights", weights), ("--adapter", adapter)):
            if path and not path.is_file():
                raise UsageError(f"{flag} {path}: no such file")
        if out and out.is_dir() and any(out.iterdir()) and not overwrite:
            raise UsageError(f"--out {out}: not empty; --overwrite replaces a model that flux2pixel wrote there")
        job = resolve(
            recipe, run, assignments, base=base, seed=seed, convert__dtype=dtype, convert__shard_size=shard_size
        )
        extras = Extras(link, weights, tuple(map(parse_lora, lora or ())), adapter)
        fitted = adapter or subspace or job.run / SUBSPACE
        takes: list[Path | str] = [
            f"base {job.recipe.base}",
            fitted if fitted.is_file() else "a subspace fitted to the VAE alone (vae-jacobian, data-free)",
        ]
        destination = out or job.run / CONVERTED
        if job.start(takes, [destination], dry_run):
            from flux2pixel.convert.run import convert

            timed(job.run, "convert", lambda: convert(job.recipe, job.run, subspace, out, extras, overwrite))
        else:
            from flux2pixel.convert.prepare import prepare

            typer.echo("\n".join(prepare(job.recipe, None, extras).plan.lines(destination)))
