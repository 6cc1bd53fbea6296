"""The flags that commands share: the same word means the same thing everywhere."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

SUBSPACE, CONVERTED, READOUT, FINETUNED = "subspace.safetensors", "converted", "readout", "finetuned"
REPORT = "report.html"

RUN, MACHINE, CONTROL = "Run and recipe", "Machine", "Control"
"""Headings that the flags stand under in a command's help."""


@dataclass(frozen=True)
class Flags:
    """What every command with a recipe takes: where its settings come from, where it computes, and what it is to do."""

    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", rich_help_panel=RUN, help="Recipe file, TOML. Default: the run's own, if it has one."),
    ] = None
    run: Annotated[
        Path | None, typer.Option("--run", rich_help_panel=RUN, help="Run directory. Default: runs/<base>.")
    ] = None
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.KEY=VALUE", rich_help_panel=RUN, help="Change a key of the recipe; repeatable."
        ),
    ] = None
    base: Annotated[
        str | None,
        typer.Option("--base", rich_help_panel=RUN, help="Latent base: an alias, a folder or a Hub id. See bases."),
    ] = None
    seed: Annotated[
        int | None, typer.Option("--seed", rich_help_panel=RUN, help="Seed of everything random. Default: 0.")
    ] = None
    device: Annotated[
        str | None, typer.Option("--device", rich_help_panel=MACHINE, help="auto, cuda, mps, xpu or cpu.")
    ] = None
    offline: Annotated[
        bool, typer.Option("--offline", rich_help_panel=MACHINE, help="Ask nothing of the Hub; use what is cached.")
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", rich_help_panel=CONTROL, help="Print settings and files of this command, stop.")
    ] = False
    debug: Annotated[
        bool, typer.Option("--debug", rich_help_panel=CONTROL, help="Show the full traceback of an error.")
    ] = False


Images = Annotated[
    str | None,
    typer.Option("--images", metavar="SOURCE", help="Images: a folder, .jsonl, .tar, s3://, https:// or hf:NAME."),
]
Method = Annotated[str | None, typer.Option("--method", help="Subspace: procrustes, pca, vae-jacobian or random.")]
Rank = Annotated[int | None, typer.Option("--rank", help="Columns of the basis; 0 = width of a latent token.")]
Subspace = Annotated[Path | None, typer.Option("--subspace", help=f"Subspace file. Default: <run>/{SUBSPACE}.")]
Out = Annotated[Path | None, typer.Option("--out", help="Where to write. Default: in the run directory.")]
TrainSteps = Annotated[int | None, typer.Option("--steps", help="Optimizer steps of the training.")]
SampleSteps = Annotated[int | None, typer.Option("--steps", help="Solver steps per image. Default: the model's own.")]
Suite = Annotated[list[str] | None, typer.Option("--suite", help="geneval, dpg-bench, hpsv3 or fidelity; repeatable.")]
Gpus = Annotated[
    int,
    typer.Option("--gpus", rich_help_panel=MACHINE, help="Processes, each on a GPU of its own, or on the CPU."),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", rich_help_panel=MACHINE, help="Of the weights: bf16, fp16 or fp32. Default: as stored."),
]
Offload = Annotated[
    str | None,
    typer.Option(
        "--offload",
        rich_help_panel=MACHINE,
        help="Weights wait on the CPU: model (whole ones as called), group or sequential (layers; slow).",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", rich_help_panel=MACHINE, help="The transformer's weights in 8 bits: int8 or fp8."),
]
PlanOnly = Annotated[
    bool, typer.Option("--plan", rich_help_panel=CONTROL, help="Print the memory that it takes, then stop.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", rich_help_panel=CONTROL, help="Replace what is already there.")]
