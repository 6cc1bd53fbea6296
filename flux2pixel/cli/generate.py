"""``generate``."""

from pathlib import Path
from typing import Annotated

import typer

from flux2pixel.cli.job import check, one_line_errors, resolve
from flux2pixel.cli.options import (
    CONVERTED,
    FINETUNED,
    Base,
    Debug,
    DryRun,
    Out,
    RecipePath,
    RunPath,
    SampleSteps,
    Seed,
    Set,
)


def generate_command(
    prompt: Annotated[str, typer.Argument(help='What to draw, such as "a photo of a red circle".')],
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    model: Annotated[Path | None, typer.Option(help="Model folder. Default: the last one of the run.")] = None,
    out: Out = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: 1024; 32 for the miniature.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: 1024; 32 for the miniature.")] = None,
    steps: SampleSteps = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Draw an image of a prompt."""
    with one_line_errors(debug):
        check(models=[model])
        job = resolve(recipe, run, assignments, base=base, sample__steps=steps, seed=seed)
        latest = next((name for name in (FINETUNED, CONVERTED) if (job.run / name).is_dir()), FINETUNED)
        if job.start([model or job.run / latest], [out] if out else [], dry_run):
            from flux2pixel.models.folder import is_pixel_folder
            from flux2pixel.models.model import open_model
            from flux2pixel.runtime import device, files
            from flux2pixel.runtime.progress import log

            name: Path | str = model or job.run / latest
            pixel = is_pixel_folder(Path(name))
            opened = open_model(
                name,
                job.recipe.sample,
                subspace=None if pixel else job.run / "subspace.safetensors",
                device=device.choose(),
            )
            size = (height or opened.size[0], width or opened.size[1])
            image = opened.generate(prompt, seed=job.recipe.seed, size=size)[0]
            target = out or job.run / "generated.png"
            files.write(target, lambda temporary: image.save(temporary, format="png"))
            log(f"wrote {target}")
