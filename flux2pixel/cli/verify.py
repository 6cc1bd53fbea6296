"""``verify``: a folder proven again."""

from pathlib import Path
from typing import Annotated

import typer

from flux2pixel.cli.options import MACHINE
from flux2pixel.runtime.errors import UsageError


def verify_command(
    folder: Annotated[Path, typer.Argument(help="Converted or finetuned folder.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Latent base. Default: the one that the folder's record names.")
    ] = None,
    made_with: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="FILE", help="LoRA, adapter or weights it was made with, if moved; repeatable."),
    ] = None,
    proof: Annotated[str, typer.Option("--proof", help="auto, whole or blocks: how much is sampled.")] = "auto",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the sampling test.")] = 64,
    device: Annotated[
        str | None, typer.Option("--device", rich_help_panel=MACHINE, help="auto, cuda, xpu or cpu.")
    ] = None,
) -> None:
    """Prove a folder again: tensors against its base, and coupled sampling in float64."""
    if proof not in ("auto", "whole", "blocks"):
        raise UsageError(f"--proof {proof}: must be auto, whole or blocks")
    for path in made_with or ():
        if not path.is_file():
            raise UsageError(f"--with {path}: no such file")
    from flux2pixel.convert.verify import verify
    from flux2pixel.recipe import Convert
    from flux2pixel.runtime.device import choose

    place = choose(device, float64=True)
    verify(folder, base, tuple(made_with or ()), Convert(proof=proof, verify_steps=steps), place)
