"""``eval``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flux2pixel.cli.options import (
    CONVERTED,
    FINETUNED,
    REPORT,
    Dtype,
    Flags,
    Gpus,
    Offload,
    Out,
    PlanOnly,
    Quantize,
    SampleSteps,
    Suite,
)
from flux2pixel.cli.stage import MODELS, Job, check_model, check_run, resolve
from flux2pixel.cli.weights import held, print_plan
from flux2pixel.recipe import Recipe
from flux2pixel.runtime import launch
from flux2pixel.runtime.errors import UsageError


def eval_command(
    flags: Flags,
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
    matched: Annotated[
        bool, typer.Option("--matched", help="Draw the base on the noise levels of the run's converted model.")
    ] = False,
    gpus: Gpus = 1,
    dtype: Dtype = None,
    offload: Offload = None,
    quantize: Quantize = None,
    plan: PlanOnly = False,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Get the suites' scorer weights and data ahead, then stop.")
    ] = False,
) -> None:
    """Score the models side by side and write the report."""
    launch.check_gpus(gpus, flags.device)
    job = resolve(flags, eval__suite=suite, eval__reference=reference, sample__steps=steps)
    if fetch:
        _fetch(job.recipe)
        return
    weights = held(job, dtype, offload, quantize, plan)
    if plan:
        names = [_path(word) for word in model or ()] or [job.recipe.base]
        size = (job.recipe.eval.size, job.recipe.eval.size) if job.recipe.eval.size else None
        print_plan(job, "eval", names, weights, gpus, batch=job.recipe.eval.batch, size=size)
        return
    _check(model or (), images or ())
    if not model and not images and flags.base is None:
        check_run(job)
    takes: Sequence[Path | str] = [*(model or ()), *(images or ())]
    takes = takes or [f"base {job.recipe.base}", *(job.run / name for name in reversed(MODELS))]
    if not job.planned(takes, [out or job.run / REPORT]):
        score(job, model or (), images or (), out, gpus, matched=matched, **weights)


def score(
    job: Job,
    models: Sequence[str] = (),
    images: Sequence[str] = (),
    out: Path | None = None,
    gpus: int = 1,
    **drawing: Any,
) -> None:
    """Score, in ``gpus`` processes; ``drawing`` are `evaluate`'s arguments of how models draw."""
    if gpus > 1 and not launch.launched():
        from flux2pixel.evaluate.run import check

        check(job.recipe, job.run, models, images, **drawing)
        raise typer.Exit(launch.relaunch("eval", gpus))
    from flux2pixel.evaluate.run import evaluate

    page = out or job.run / REPORT
    # Its seconds are in the report itself.
    with job.stage("eval", [page, job.run / "eval"], timed=False, then=f"open {page} in a browser"):
        evaluate(job.recipe, job.run, models, out, images, **drawing)


def _fetch(recipe: Recipe) -> None:
    """Get what the suites need into the assets folder."""
    from flux2pixel.evaluate.assets.fetch import default_folder, fetch

    fetch(recipe.eval.suite, Path(recipe.eval.assets) if recipe.eval.assets else default_folder())


def _path(word: str) -> str:
    """The model of ``[NAME=]MODEL[+LORA]``."""
    return word.rpartition("=")[2].partition("+")[0]


def _check(models: Sequence[str], images: Sequence[str]) -> None:
    """Refuse what is not there before anything heavy is imported."""
    for word in models:
        named = _path(word)
        check_model(named, f"--model {word}:" if named != word else "--model")
    for word in images:
        folder = word.rpartition("=")[2]
        if not Path(folder).is_dir():
            raise UsageError(f"--images {word}: no such folder {folder}; give a folder of images")
