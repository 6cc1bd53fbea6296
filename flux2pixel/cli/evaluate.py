"""``eval``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from flux2pixel.cli.job import one_line_errors, resolve
from flux2pixel.cli.options import (
    CONVERTED,
    FINETUNED,
    REPORT,
    Base,
    Debug,
    DryRun,
    Out,
    RecipePath,
    RunPath,
    SampleSteps,
    Seed,
    Set,
    Suite,
)
from flux2pixel.recipe import Recipe
from flux2pixel.runtime import launch
from flux2pixel.runtime.errors import UsageError


def eval_command(
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]MODEL[+LORA]",
            help=f"Model folder or base, repeatable. Default: the base, <run>/{CONVERTED} and <run>/{FINETUNED}.",
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FOLDER", help="Images made elsewhere, in the suite's official layout; repeatable."
        ),
    ] = None,
    suite: Suite = None,
    reference: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="True images for fidelity: a folder, or any image source.")
    ] = None,
    out: Out = None,
    steps: SampleSteps = None,
    seed: Seed = None,
    gpus: Annotated[
        int, typer.Option("--gpus", help="Processes on this machine, one a device; they share the work.")
    ] = 1,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Get the suites' scorer weights and data ahead, then stop.")
    ] = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Score the models side by side and write the report."""
    rank = launch.rank()
    with one_line_errors(debug, silent=rank > 0):
        launch.check_gpus(gpus)
        job = resolve(
            recipe,
            run,
            assignments,
            base=base,
            eval__suite=suite,
            eval__reference=reference,
            sample__steps=steps,
            seed=seed,
        )
        if fetch:
            _fetch(job.recipe)
            return
        _check(model or (), images or ())
        takes: Sequence[Path | str] = [*(model or ()), *(images or ())]
        takes = takes or [f"base {job.recipe.base}", job.run / CONVERTED, job.run / FINETUNED]
        if not job.start(takes, [out or job.run / REPORT], dry_run):
            return
        if gpus > 1 and not launch.launched():
            from flux2pixel.evaluate.run import check

            check(job.recipe, job.run, model or (), images or ())
            raise typer.Exit(launch.relaunch("eval", gpus))
        from flux2pixel.evaluate.run import evaluate

        evaluate(job.recipe, job.run, model or (), out, images or ())


def _fetch(recipe: Recipe) -> None:
    """Get what the suites need into the assets folder."""
    from flux2pixel.evaluate.assets.fetch import default_folder, fetch

    fetch(recipe.eval.suite, Path(recipe.eval.assets) if recipe.eval.assets else default_folder())


def _check(models: Sequence[str], images: Sequence[str]) -> None:
    """Refuse what is not there before anything heavy is imported."""
    from flux2pixel.families.known import base_names

    for option, words in (("--model", models), ("--images", images)):
        for word in words:
            place = word.rpartition("=")[2].partition("+")[0]
            if not Path(place).is_dir() and not (option == "--model" and place in base_names()):
                what = "a model folder, or a base" if option == "--model" else "a folder of images"
                raise UsageError(f"{option} {word}: no such folder {place}; give {what}")
