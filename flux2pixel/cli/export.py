"""``export``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flux2pixel.cli.stage import check_model


class Format(StrEnum):
    """What ``--format`` takes."""

    adapter = "adapter"
    lora = "lora"
    bfl = "bfl"


def export_command(
    model: Annotated[Path, typer.Argument(help="Converted or finetuned folder.")],
    out: Annotated[Path, typer.Option("--out", help="File to write, .safetensors.")],
    kind: Annotated[
        Format,
        typer.Option(
            "--format",
            help="adapter: the released AsymFLUX.2 format. lora: every changed matrix. bfl: one file, original names.",
        ),
    ] = Format.adapter,
    against: Annotated[
        Path | None, typer.Option(help="Converted model to compare with. Default: the one it was trained from.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of a LoRA that is extracted.")] = 256,
) -> None:
    """Write a pixel model in another program's format."""
    for folder in (model, against):
        check_model(folder, "--against" if folder is against else "--model")
    from flux2pixel.convert.export import export

    export(model, out, kind.value, against, rank)
