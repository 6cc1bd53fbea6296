"""``inspect``, ``doctor`` and ``bases``: what a file is, what this machine can run, what can be converted."""

from pathlib import Path
from typing import Annotated

import typer

from flux2pixel.cli.job import one_line_errors, resolve
from flux2pixel.cli.options import Base, Debug, RecipePath, RunPath, Set
from flux2pixel.runtime.errors import Flux2PixelError


def inspect_command(
    file: Annotated[Path, typer.Argument(help="A safetensors file or a model folder.")], debug: Debug = False
) -> None:
    """Say what a file or a model folder is."""
    with one_line_errors(debug):
        from flux2pixel.cli.inspection import inspect

        typer.echo(inspect(file))


def doctor_command(
    recipe: RecipePath = None, run: RunPath = None, assignments: Set = None, base: Base = None, debug: Debug = False
) -> None:
    """Print versions, devices and memory, and what of the recipe can run here."""
    with one_line_errors(debug):
        from flux2pixel.cli.inspection import doctor

        job = resolve(recipe, run, assignments, base=base)
        report, problems = doctor(job.recipe, job.run)
        typer.echo(report)
        if problems:
            raise Flux2PixelError(f"the recipe cannot run here: {'; '.join(problems)}")


def bases_command(debug: Debug = False) -> None:
    """List the bases that can be converted: alias, Hub id, licence, size, token widths, status."""
    with one_line_errors(debug):
        from flux2pixel.families.known import table

        typer.echo(table())
