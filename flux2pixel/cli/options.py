"""The flags that commands share: the same word means the same thing everywhere."""

from pathlib import Path
from typing import Annotated

import typer

SUBSPACE, CONVERTED, FINETUNED, REPORT = "subspace.safetensors", "converted", "finetuned", "report.html"

RecipePath = Annotated[Path | None, typer.Option("--recipe", help="Recipe file, TOML. Default: the built-in recipe.")]
RunPath = Annotated[Path | None, typer.Option("--run", help="Run directory. Default: runs/<base>.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key; repeatable.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the recipe and the files of this command, then stop.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")]
Base = Annotated[str | None, typer.Option("--base", help="Latent base: an alias or a folder.")]
Images = Annotated[Path | None, typer.Option("--images", help="Folder of images to fit the subspace on.")]
Method = Annotated[str | None, typer.Option("--method", help="Subspace: procrustes, pca, vae-jacobian or random.")]
Rank = Annotated[int | None, typer.Option("--rank", help="Columns of the basis; 0 = width of a latent token.")]
Subspace = Annotated[Path | None, typer.Option("--subspace", help=f"Subspace file. Default: <run>/{SUBSPACE}.")]
Out = Annotated[Path | None, typer.Option("--out", help="Where to write. Default: in the run directory.")]
TrainSteps = Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")]
SampleSteps = Annotated[int | None, typer.Option("--steps", help="Solver steps per image.")]
Gpus = Annotated[int, typer.Option("--gpus", help="Devices to use; only 1 is supported.")]
Suite = Annotated[list[str] | None, typer.Option("--suite", help="geneval, dpg-bench, hpsv3 or fidelity; repeatable.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
