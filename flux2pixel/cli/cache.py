"""``cache``."""

from pathlib import Path
from typing import Annotated

import typer

from flux2pixel.cli.options import Flags, Gpus, PlanOnly
from flux2pixel.cli.stage import resolve, with_training_images
from flux2pixel.runtime.launch import check_gpus


def cache_command(
    flags: Flags,
    images: Annotated[
        str | None,
        typer.Option("--images", metavar="SOURCE", help="Training images: a folder, .jsonl, .tar or hf:NAME."),
    ] = None,
    count: Annotated[int | None, typer.Option("--count", help="How many of them; 0 = all.")] = None,
    source: Annotated[str | None, typer.Option("--source", hidden=True, help="Older name of --images.")] = None,
    gpus: Gpus = 1,
    plan: PlanOnly = False,
) -> None:
    """Encode the training images and captions once: pixels, latents and text embeddings. Goes on after a kill."""
    check_gpus(gpus)
    if images is not None and images.isdigit():  # what --images meant before it meant the same everywhere
        count, images = int(images) if count is None else count, None
    job = with_training_images(resolve(flags, data__source=images or source, finetune__images=count))
    if plan:
        from flux2pixel.data.encode import encoders_dtype
        from flux2pixel.data.plan import plan_cache
        from flux2pixel.models.plan import lines, planned_base

        passes = plan_cache(job.recipe, planned_base(job.recipe.base, encoders_dtype(job.recipe)))
        typer.echo("\n".join(lines(f"cache of {job.recipe.base}", passes, gpus)))
        return
    folder = job.run / job.recipe.data.cache
    takes: list[Path | str] = [f"base {job.recipe.base}", f"images {job.recipe.data.source}"]
    if not job.planned(takes, [folder]):
        from flux2pixel.data.encode import make, open_encoders

        with job.stage("cache", [folder], timed=False, then=job.command("finetune")):
            make(job.recipe, job.run, open_encoders(job.recipe), gpus)
