"""``finetune``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from flux2pixel.cli.options import CONVERTED, FINETUNED, Flags, Gpus, Images, Out, TrainSteps
from flux2pixel.cli.stage import Job, check_model, check_run, resolve, with_training_images
from flux2pixel.runtime import launch

PREPARED = "FLUX2PIXEL_PREPARED"  # tells the processes that --gpus starts that their parent has prepared the run


def finetune_command(
    flags: Flags,
    images: Images = None,
    model: Annotated[Path | None, typer.Option(help=f"Converted folder. Default: <run>/{CONVERTED}.")] = None,
    out: Out = None,
    steps: TrainSteps = None,
    gpus: Gpus = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Print parameters, memory, disk and time, then stop.")] = False,
    images_per_second: Annotated[
        float | None, typer.Option(min=1e-9, help="Rate that --plan reckons with. Default: that of the run's log.")
    ] = None,
) -> None:
    """Train the converted model on real pixels. Killed, the same command goes on from its last checkpoint."""
    check_model(model)
    job = resolve(flags, data__source=images, finetune__steps=steps)
    if plan:
        from flux2pixel.finetune.plan.plan import plan as planned

        typer.echo("\n".join(planned(job.recipe, job.run, gpus, images_per_second).lines()))
        return
    if model is None:
        check_run(job)
    job = with_training_images(job)
    takes: list[Path | str] = [model or job.run / CONVERTED, f"images {job.recipe.data.source}"]
    if not job.planned(takes, [out or job.run / FINETUNED]):
        train(job, model, out, gpus)


def train(job: Job, model: Path | None = None, out: Path | None = None, gpus: int = 1) -> None:
    """Train, in ``gpus`` processes."""
    if gpus != 1 and not launch.launched():
        from flux2pixel.finetune.run import prepare

        launch.check_gpus(gpus, job.recipe.device)
        prepare(job.recipe, job.run, model, gpus)
        os.environ[PREPARED] = "1"
        try:
            raise typer.Exit(launch.relaunch("finetune", gpus, saves=True))
        finally:
            del os.environ[PREPARED]
    from flux2pixel.finetune.run import finetune

    words = ["eval", *(["--model", str(out)] if out else [])]
    with job.stage("finetune", [out or job.run / FINETUNED], then=job.command(*words)):
        finetune(job.recipe, job.run, model, out, prepared=os.environ.get(PREPARED) == "1")
