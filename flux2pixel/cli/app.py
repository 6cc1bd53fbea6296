"""The command line: every command of :mod:`flux2pixel.cli` under its name.

A command resolves the recipe, checks what can be checked before any work, writes the resolved recipe into the run
directory and calls its stage. torch and everything heavy are imported by the stages, never here.
"""

from typing import Annotated

import typer

from flux2pixel import __version__
from flux2pixel.cli.about import bases_command, doctor_command, inspect_command
from flux2pixel.cli.cache import cache_command
from flux2pixel.cli.convert import convert_command
from flux2pixel.cli.evaluate import eval_command
from flux2pixel.cli.export import export_command
from flux2pixel.cli.finetune import finetune_command
from flux2pixel.cli.fit_readout import fit_readout_command
from flux2pixel.cli.fit_subspace import compare_command, export_subspace_command, fit_subspace_command
from flux2pixel.cli.generate import generate_command
from flux2pixel.cli.run import run_all
from flux2pixel.runtime.launch import exit_process, launched

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Turn a latent diffusion model into one that draws pixels: fit-subspace, convert, finetune, eval.",
)
app.command("run")(run_all)
app.command("fit-subspace")(fit_subspace_command)
app.command("convert")(convert_command)
app.command("fit-readout")(fit_readout_command)
app.command("cache")(cache_command)
app.command("finetune")(finetune_command)
app.command("eval")(eval_command)
app.command("generate")(generate_command)
app.command("compare")(compare_command)
app.command("export-subspace")(export_subspace_command)
app.command("export")(export_command)
app.command("inspect")(inspect_command)
app.command("doctor")(doctor_command)
app.command("bases")(bases_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flux2pixel {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``flux2pixel`` command."""
    try:
        app(prog_name="flux2pixel")
    except SystemExit as left:
        if launched() and isinstance(left.code, int | None):
            exit_process(left.code or 0)
        raise
