"""The command line: every command of :mod:`flux2pixel.cli` under its name.

A command resolves the recipe, checks what can be checked before any work and calls its verb. torch and everything heavy
are imported by the verbs, never here.
"""

import logging
from typing import Annotated

import typer

from flux2pixel.cli.bases import bases_command
from flux2pixel.cli.cache import cache_command
from flux2pixel.cli.convert import convert_command
from flux2pixel.cli.doctor import doctor_command
from flux2pixel.cli.evaluate import eval_command
from flux2pixel.cli.export import export_command
from flux2pixel.cli.finetune import finetune_command
from flux2pixel.cli.fit_readout import fit_readout_command
from flux2pixel.cli.fit_subspace import compare_command, export_subspace_command, fit_subspace_command
from flux2pixel.cli.generate import generate_command
from flux2pixel.cli.inspect import inspect_command
from flux2pixel.cli.run import run_all
from flux2pixel.cli.shared import command
from flux2pixel.cli.verify import verify_command
from flux2pixel.runtime.launch import exit_process, launched
from flux2pixel.runtime.version import __version__

STAGES, PICTURES, FILES, ABOUT = "Stages", "Pictures", "Files", "About"

COMMANDS = (
    (STAGES, "run", run_all, "run --base flux2-klein-4b --images photos/"),
    (STAGES, "fit-subspace", fit_subspace_command, "fit-subspace --base flux2-klein-4b --images photos/"),
    (STAGES, "convert", convert_command, "convert --base flux2-klein-4b"),
    (STAGES, "fit-readout", fit_readout_command, "fit-readout --base flux2-klein-4b --images photos/"),
    (STAGES, "verify", verify_command, "verify runs/flux2-klein-4b/converted"),
    (STAGES, "cache", cache_command, "cache --base flux2-klein-4b --images photos/ --gpus 8"),
    (STAGES, "finetune", finetune_command, "finetune --base flux2-klein-4b --images photos/ --gpus 8"),
    (STAGES, "eval", eval_command, "eval --base flux2-klein-4b --suite geneval"),
    (PICTURES, "generate", generate_command, 'generate "a cat in the rain" --run runs/flux2-klein-4b --num-images 4'),
    (FILES, "export", export_command, "export runs/flux2-klein-4b/finetuned --format lora --out cat.safetensors"),
    (FILES, "compare", compare_command, "compare a/subspace.safetensors b/subspace.safetensors"),
    (FILES, "export-subspace", export_subspace_command, "export-subspace subspace.safetensors subspace.pth"),
    (FILES, "inspect", inspect_command, "inspect runs/flux2-klein-4b/converted"),
    (ABOUT, "doctor", doctor_command, "doctor --recipe recipes/klein-9b-24gb.toml"),
    (ABOUT, "bases", bases_command, "bases"),
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn a latent diffusion model into one that draws pixels: fit-subspace, convert, finetune, eval.",
)
for _panel, _name, _function, _example in COMMANDS:
    app.command(_name, rich_help_panel=_panel, epilog=f"Example: flux2pixel {_example}")(command(_function))


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
    # torchao, where it is installed, makes two libraries talk about their own internals at every import.
    for name in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app(prog_name="flux2pixel")
    except SystemExit as left:
        if launched() and isinstance(left.code, int | None):
            exit_process(left.code or 0)
        raise
