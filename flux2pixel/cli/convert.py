"""``convert``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flux2pixel.cli.options import CONVERTED, SUBSPACE, Flags, Out, Overwrite, Subspace
from flux2pixel.cli.stage import Job, check_subspace, resolve
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


def parse_lora(text: str) -> tuple[Path, float]:
    """``FILE`` or ``FILE:STRENGTH``. Raises UsageError if the file is absent or the strength no number."""
    path, colon, strength = text.rpartition(":")
    if not colon or Path(text).is_file():
        path, strength = text, "1"
    if not Path(path).is_file():
        raise UsageError(f"--lora {text}: no such file; write it as FILE or FILE:STRENGTH")
    try:
        return Path(path), float(strength)
    except ValueError as error:
        raise UsageError(f"--lora {text}: {strength!r} is not a number; write it as FILE or FILE:STRENGTH") from error


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
    loras = tuple(map(parse_lora, lora or ()))
    fitted = adapter or subspace or job.run / SUBSPACE
    takes: list[Path | str] = [
        f"base {job.recipe.base}",
        fitted if fitted.is_file() else "a subspace fitted to the VAE alone (vae-jacobian, data-free)",
    ]
    if job.planned(takes, [destination]):
        from flux2pixel.convert.prepare import Extras, prepare

        extras = Extras(link, weights, loras, adapter)
        typer.echo("\n".join(prepare(job.recipe, None, extras, fetch=False).plan.lines(destination)))
        return
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise UsageError(f"{destination}: not empty; --overwrite replaces a model that flux2pixel wrote there")
    rewrite(job, subspace, out, overwrite, link=link, weights=weights, loras=loras, adapter=adapter)


def rewrite(
    job: Job, subspace: Path | None = None, out: Path | None = None, overwrite: bool = False, **extras: Any
) -> None:
    """Convert, and name the readout as what comes next; without a subspace one is fitted to the VAE alone."""
    from flux2pixel.convert.prepare import Extras
    from flux2pixel.convert.run import convert
    from flux2pixel.runtime.device import choose

    words = ["fit-readout", *(["--model", str(out)] if out else [])]
    with job.stage("convert", [out or job.run / CONVERTED], then=job.command(*words)):
        fitted = extras.get("adapter") or subspace or job.run / SUBSPACE
        if not fitted.is_file():
            from flux2pixel.subspace.without_images import fit_without_images

            fit_without_images(job.recipe, fitted)
        device = choose(job.recipe.device, float64=True)
        convert(job.recipe, job.run, subspace, out, Extras(**extras), device, overwrite)
