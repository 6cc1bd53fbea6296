"""``generate``: prompts to image files that say how they were made."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flux2pixel.cli.options import SUBSPACE, Dtype, Flags, Offload, Overwrite, PlanOnly, Quantize, SampleSteps
from flux2pixel.cli.stage import MODELS, Job, check_model, check_run, resolve
from flux2pixel.cli.weights import held, print_plan
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def generate_command(
    flags: Flags,
    prompt: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help='What to draw, such as "a photo of a red circle".')
    ] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="Text file of prompts, one a line.")] = None,
    num_images: Annotated[int, typer.Option("--num-images", min=1, help="Images of each prompt.")] = 1,
    model: Annotated[
        str | None, typer.Option(help="Model folder, base or Hub id. Default: the last model of the run.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File (.png, .jpg or .webp) or folder. Default: a new generated*.png in the run."),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="HxW", help="Height and width, pixels. Default: the model's own.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: the model's own.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: the model's own.")] = None,
    steps: SampleSteps = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Scale of guidance; 1 = none.")] = None,
    negative: Annotated[str, typer.Option("--negative", help="What guidance leads away from.")] = "",
    solver: Annotated[str | None, typer.Option("--solver", help="euler, heun or unipc.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images drawn at a time.")] = 4,
    dtype: Dtype = None,
    offload: Offload = None,
    quantize: Quantize = None,
    plan: PlanOnly = False,
    overwrite: Overwrite = False,
) -> None:
    """Draw images of one or more prompts."""
    texts = [] if plan and not prompt and prompts is None else _prompts(prompt or (), prompts)
    height, width = _size(size, height, width)
    check_model(model)
    sample: dict[str, Any] = {"steps": steps, "guidance": guidance, "solver": solver, "height": height, "width": width}
    job = resolve(flags, **{f"sample__{name}": value for name, value in sample.items()})
    weights = held(job, dtype, offload, quantize, plan)
    if model is None and not plan:
        check_run(job)
    latest = [job.run / name for name in MODELS if (job.run / name / "asymflow.json").is_file()]
    chosen = model or (latest[0] if latest else job.recipe.base)
    if plan:
        shape = _asked(job)
        print_plan(job, "generate", [str(chosen)], weights, prompts=len(texts) + 1, batch=batch, size=shape)
        return
    paths = _paths(job, out, len(texts) * num_images, overwrite)
    if job.planned([chosen], paths):
        return
    images, about = _draw(job, chosen, texts, num_images, negative, batch, weights)
    rows = [text for text in texts for _ in range(num_images)]
    for index, (image, path, text) in enumerate(zip(images, paths, rows, strict=True)):
        save(image, path, {"prompt": text, "seed": job.recipe.seed, "index": index, **about})
        typer.echo(f"wrote {path}", err=True)


def save(image: "Image", path: Path, about: dict[str, Any]) -> None:
    """Write an image in the format of its name; a PNG holds ``about``, one text chunk an entry."""
    options: dict[str, Any] = {"quality": 95} if path.suffix.lower() != ".png" else {}
    if path.suffix.lower() == ".png":
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = info = PngInfo()
        for name, value in about.items():
            info.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    files.write(path, lambda temporary: image.save(temporary, format=FORMATS[path.suffix.lower()], **options))


def _draw(
    job: Job,
    model: str | Path,
    texts: Sequence[str],
    count: int,
    negative: str,
    batch: int,
    weights: dict[str, Any],
) -> tuple[list["Image"], dict[str, Any]]:
    """The images, and what an image says of its making beside prompt and seed."""
    import torch

    from flux2pixel.models.model import open_model
    from flux2pixel.runtime import device
    from flux2pixel.runtime.progress import bar, log
    from flux2pixel.runtime.version import __version__

    torch.set_num_threads(job.recipe.threads)
    place = device.choose(job.recipe.device)
    subspace = job.run / SUBSPACE
    opened = open_model(
        model,
        job.recipe.sample,
        subspace=subspace if subspace.is_file() else None,
        device=place,
        **weights,
    )
    log(f"generate: model {model} on {device.describe(place)}")
    # Only what was asked for is passed on: a base may know no negative prompt.
    more: dict[str, Any] = {"negative": negative} if negative else {}
    with bar("generate", len(texts) * count) as progress:
        images = opened.generate(
            texts, seed=job.recipe.seed, count=count, size=_asked(job), batch=batch, on_image=progress.advance, **more
        )
    sampler = getattr(opened, "sampler", None)
    about = {"model": str(model), "settings": sampler.as_dict() if sampler else {}}
    return images, about | more | {"software": f"flux2pixel {__version__}"}


def _asked(job: Job) -> tuple[int, int] | None:
    """(height, width) where either was asked for, of recipe or flags; one stands for both."""
    asked = job.recipe.sample
    side = asked.height or asked.width
    return (asked.height or side, asked.width or side) if side else None


def _prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of the file; none may be empty."""
    texts = list(given)
    if file is not None:
        if not file.is_file():
            raise UsageError(f"--prompts {file}: no such file; give a text file with one prompt a line")
        texts += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise UsageError('no prompt: flux2pixel generate "a photo of a red circle", or --prompts FILE')
    if not all(text.strip() for text in texts):
        raise UsageError("an empty prompt; say what to draw")
    return texts


def _size(size: str | None, height: int | None, width: int | None) -> tuple[int | None, int | None]:
    """--size HxW, or the one side of --height and --width that stands for both."""
    if size is None:
        return height or width, width or height
    if height or width:
        raise UsageError(f"--size {size}: is height and width in one; leave --height and --width out")
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
    if not found or not int(found[1]):
        raise UsageError(f"--size {size}: write height x width in pixels, such as 768x1024")
    return int(found[1]), int(found[2] or found[1])


def _paths(job: Job, out: Path | None, count: int, overwrite: bool) -> list[Path]:
    """Where the images go, checked before any work: names that are free, unless one that is taken may be replaced."""
    folder, stem, suffix = job.run if job.run.is_dir() else Path(), "generated", ".png"
    if out is not None and out.is_dir():
        folder = out
    elif out is not None:
        if out.suffix.lower() not in FORMATS:
            raise UsageError(f"--out {out}: is no folder, and not {', '.join(FORMATS)}; name one of them")
        if not out.parent.is_dir():
            raise UsageError(f"--out {out}: no folder {out.parent}; make it first")
        if count == 1:
            if out.exists() and not overwrite:
                raise UsageError(f"--out {out}: exists; --overwrite replaces it")
            return [out]
        folder, stem, suffix = out.parent, out.stem, out.suffix
    paths: list[Path] = []
    number = 1
    while len(paths) < count:
        path = folder / f"{stem}{'' if number == 1 else f'-{number}'}{suffix}"
        if not path.exists():
            paths.append(path)
        number += 1
    return paths
