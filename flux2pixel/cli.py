"""The command line: one small function per command.

A command resolves the recipe, checks what can be checked before any work, writes the resolved recipe into the run
directory and calls its stage. torch and everything heavy are imported by the stages, never here.
"""

import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from flux2pixel import __version__
from flux2pixel import recipe as recipes
from flux2pixel.bases import ALIASES
from flux2pixel.errors import Flux2PixelError, UsageError, one_line
from flux2pixel.files import write, write_json
from flux2pixel.recipe import Recipe, setting

SUBSPACE, CONVERTED, FINETUNED, REPORT = "subspace.safetensors", "converted", "finetuned", "report.html"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Turn a latent diffusion model into one that draws pixels: fit-subspace, convert, finetune, eval.",
)

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
Suite = Annotated[list[str] | None, typer.Option("--suite", help="geneval or fidelity; repeatable.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]


@dataclass(frozen=True)
class Job:
    """What a command works on: its recipe and the run directory."""

    recipe: Recipe
    run: Path

    def start(self, takes: Sequence[Path | str], writes: Sequence[Path], dry_run: bool) -> bool:
        """Write the recipe into the run directory and return True; or, on a dry run, print the plan, return False."""
        if dry_run:
            typer.echo(recipes.dumps(self.recipe))
            for taken in takes:
                absent = isinstance(taken, Path) and not taken.exists()
                typer.echo(f"takes   {taken}{' (not there yet)' if absent else ''}")
            for written in (*writes, self.run / "recipe.toml"):
                typer.echo(f"writes  {written}{' (replaced)' if written.exists() else ''}")
            return False
        for folder in dict.fromkeys((self.run, *(path.parent for path in writes))):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                reason = error.strerror or error
                raise Flux2PixelError(
                    f"{folder}: cannot write here ({reason}); choose another --run or --out"
                ) from error
        text = recipes.dumps(self.recipe)
        write(self.run / "recipe.toml", lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return True


def _resolve(path: Path | None, run: Path | None, assignments: list[str] | None, **flags: Any) -> Job:
    """Resolve the recipe: the file, then ``--set``, then flags named ``section__key`` (``None``: not given)."""
    overrides = list(assignments or ())
    for key, value in flags.items():
        if value is not None:
            overrides.append(setting(key.replace("__", "."), str(value) if isinstance(value, Path) else value))
    recipe = recipes.load(path, overrides)
    return Job(recipe, run or Path("runs") / Path(recipe.base).resolve().name)


@contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """Print an error as one line and exit 2 (usage) or 1 (failure); with ``--debug`` print its traceback first."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        expected = isinstance(error, Flux2PixelError | OSError)
        message = one_line(error) if expected else f"{type(error).__name__}: {one_line(error)} (--debug shows where)"
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(2 if isinstance(error, UsageError) else 1) from error


def _check(gpus: int = 1, models: Sequence[Path | None] = (), subspace: Path | None = None) -> None:
    """Refuse what no recipe can mend, before anything heavy."""
    if gpus != 1:
        raise UsageError(f"--gpus {gpus}: only 1 device is supported now; leave it out")
    for model in models:
        if model is not None and not model.is_dir() and str(model) not in ALIASES:
            raise UsageError(f"--model {model}: no such folder; give a converted or finetuned folder, or a base")
    if subspace is not None and not subspace.is_file():
        raise UsageError(f"--subspace {subspace}: no such file; write one with flux2pixel fit-subspace")


def _source(recipe: Recipe) -> Path | str:
    """Return the folder of images the subspace is fitted on, checked, or words for the miniature's scenes."""
    source = recipe.fit_subspace.source
    if source == "scenes":
        return "the miniature's scenes"
    if not Path(source).is_dir():
        raise UsageError(
            f'--images {source}: no such folder; give a folder of images, or fit_subspace.source = "scenes"'
        )
    return Path(source)


def _time(work: Callable[[], object]) -> float:
    """Run ``work`` and return the seconds it took."""
    began = time.perf_counter()
    work()
    return round(time.perf_counter() - began, 3)


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


@app.command("run")
def run_all(
    recipe_file: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="Recipe file, TOML.")] = None,
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    images: Images = None,
    method: Method = None,
    rank: Rank = None,
    steps: TrainSteps = None,
    suite: Suite = None,
    seed: Seed = None,
    gpus: Gpus = 1,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """All four stages, from a latent base to a scored pixel model."""
    with _one_line_errors(debug):
        if recipe_file and recipe:
            raise UsageError(f"run {recipe_file} --recipe {recipe}: two recipes; give one")
        _check(gpus)
        flags: dict[str, Any] = {"fit_subspace__source": images, "fit_subspace__method": method}
        flags |= {"fit_subspace__rank": rank, "finetune__steps": steps, "eval__suite": suite}
        job = _resolve(recipe_file or recipe, run, assignments, base=base, seed=seed, **flags)
        takes = [f"base {job.recipe.base}", _source(job.recipe)]
        writes = [job.run / name for name in (SUBSPACE, CONVERTED, FINETUNED, REPORT, "report.json", "seconds.json")]
        if not job.start(takes, writes, dry_run):
            return
        from flux2pixel.convert.stage import convert
        from flux2pixel.evaluate.stage import evaluate
        from flux2pixel.finetune.stage import finetune
        from flux2pixel.subspace.stage import fit_subspace

        seconds = {"fit_subspace": _time(lambda: fit_subspace(job.recipe, job.run))}
        seconds["convert"] = _time(lambda: convert(job.recipe, job.run))
        seconds["finetune"] = _time(lambda: finetune(job.recipe, job.run))
        # Before eval, which puts them in the report beside its own time.
        write_json(job.run / "seconds.json", seconds | {"total": round(sum(seconds.values()), 3)})
        evaluate(job.recipe, job.run)


@app.command("fit-subspace")
def fit_subspace_command(
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    images: Images = None,
    method: Method = None,
    rank: Rank = None,
    out: Out = None,
    seed: Seed = None,
    gpus: Gpus = 1,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Fit the low-rank basis that ties pixels to the base's latents."""
    with _one_line_errors(debug):
        _check(gpus)
        flags: dict[str, Any] = {"fit_subspace__source": images, "fit_subspace__rank": rank, "seed": seed}
        job = _resolve(recipe, run, assignments, base=base, fit_subspace__method=method, **flags)
        takes = [f"base {job.recipe.base}", _source(job.recipe)]
        if job.start(takes, [out or job.run / SUBSPACE], dry_run):
            from flux2pixel.subspace.stage import fit_subspace

            fit_subspace(job.recipe, job.run, out)


@app.command("convert")
def convert_command(
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    subspace: Subspace = None,
    out: Out = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Rewrite the base to take and return pixels, and verify that it computes the same."""
    with _one_line_errors(debug):
        _check(subspace=subspace)
        job = _resolve(recipe, run, assignments, base=base, seed=seed)
        takes: list[Path | str] = [f"base {job.recipe.base}", subspace or job.run / SUBSPACE]
        if job.start(takes, [out or job.run / CONVERTED], dry_run):
            from flux2pixel.convert.stage import convert

            convert(job.recipe, job.run, subspace, out)


@app.command("finetune")
def finetune_command(
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    model: Annotated[Path | None, typer.Option(help=f"Converted folder. Default: <run>/{CONVERTED}.")] = None,
    out: Out = None,
    steps: TrainSteps = None,
    seed: Seed = None,
    gpus: Gpus = 1,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train the converted model on real pixels."""
    with _one_line_errors(debug):
        _check(gpus, [model])
        job = _resolve(recipe, run, assignments, base=base, finetune__steps=steps, seed=seed)
        if job.start([model or job.run / CONVERTED], [out or job.run / FINETUNED], dry_run):
            from flux2pixel.finetune.stage import finetune

            finetune(job.recipe, job.run, model, out)


@app.command("eval")
def eval_command(
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    model: Annotated[
        list[Path] | None,
        typer.Option(help=f"Model folder, repeatable. Default: the base, <run>/{CONVERTED} and <run>/{FINETUNED}."),
    ] = None,
    suite: Suite = None,
    out: Out = None,
    steps: SampleSteps = None,
    seed: Seed = None,
    gpus: Gpus = 1,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Score the models side by side and write the report."""
    with _one_line_errors(debug):
        _check(gpus, model or ())
        job = _resolve(recipe, run, assignments, base=base, eval__suite=suite, sample__steps=steps, seed=seed)
        takes: Sequence[Path | str] = model or [f"base {job.recipe.base}", job.run / CONVERTED, job.run / FINETUNED]
        if job.start(takes, [out or job.run / REPORT], dry_run):
            from flux2pixel.evaluate.stage import evaluate

            evaluate(job.recipe, job.run, model or None, out)


@app.command("generate")
def generate_command(
    prompt: Annotated[str, typer.Argument(help='What to draw, such as "a photo of a red circle".')],
    recipe: RecipePath = None,
    run: RunPath = None,
    assignments: Set = None,
    base: Base = None,
    model: Annotated[Path | None, typer.Option(help="Model folder. Default: the last one of the run.")] = None,
    out: Out = None,
    steps: SampleSteps = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Draw an image of a prompt."""
    with _one_line_errors(debug):
        _check(models=[model])
        job = _resolve(recipe, run, assignments, base=base, sample__steps=steps, seed=seed)
        latest = next((name for name in (FINETUNED, CONVERTED) if (job.run / name).is_dir()), FINETUNED)
        if job.start([model or job.run / latest], [out] if out else [], dry_run):
            from flux2pixel.asymflow.pipeline import generate

            generate(job.recipe, job.run, prompt, model, out)


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(help="A safetensors file or a model folder.")], debug: Debug = False
) -> None:
    """Say what a file or a model folder is."""
    with _one_line_errors(debug):
        from flux2pixel.inspection import inspect

        typer.echo(inspect(file))


@app.command("doctor")
def doctor_command(
    recipe: RecipePath = None, run: RunPath = None, assignments: Set = None, base: Base = None, debug: Debug = False
) -> None:
    """Print versions, devices and memory, and what of the recipe can run here."""
    with _one_line_errors(debug):
        from flux2pixel.inspection import doctor

        job = _resolve(recipe, run, assignments, base=base)
        report, problems = doctor(job.recipe, job.run)
        typer.echo(report)
        if problems:
            raise Flux2PixelError(f"the recipe cannot run here: {'; '.join(problems)}")


def main() -> None:
    """Entry point of the ``flux2pixel`` command."""
    app(prog_name="flux2pixel")
