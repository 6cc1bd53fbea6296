"""What every command does first: resolve the recipe, check what can be checked before any work, note the recipe."""

import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from flux2pixel import recipe as recipes
from flux2pixel.families.known import base_names
from flux2pixel.recipe import Recipe, setting
from flux2pixel.runtime import launch
from flux2pixel.runtime.errors import FailedElsewhere, Flux2PixelError, ProcessFailed, UsageError, exit_code, sentence
from flux2pixel.runtime.files import write, write_json


@dataclass(frozen=True)
class Job:
    """What a command works on: its recipe and the run directory."""

    recipe: Recipe
    run: Path

    def start(self, takes: Sequence[Path | str], writes: Sequence[Path], dry_run: bool) -> bool:
        """Write the recipe into the run directory and return True; or, on a dry run, print the plan, return False.

        Of a launched run's processes only one prints or writes; the answer is the same in all.
        """
        if launch.rank():
            return not dry_run
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


def resolve(
    path: Path | None, run: Path | None, assignments: list[str] | None, *, fresh: bool = False, **flags: Any
) -> Job:
    """Resolve the recipe: the file, then ``--set``, then flags named ``section__key`` (``None``: not given).

    Without a file a stage goes on with the run directory's own recipe, if there is one; ``fresh`` starts from the
    built-in recipe instead.
    """
    overrides = list(assignments or ())
    for key, value in flags.items():
        if value is not None:
            overrides.append(setting(key.replace("__", "."), str(value) if isinstance(value, Path) else value))
    recipe = recipes.load(path, overrides)
    run = run or Path("runs") / Path(recipe.base).resolve().name
    own = run / "recipe.toml"
    if path is None and not fresh and own.is_file():
        if launch.rank() == 0:  # once for a run of many processes
            typer.echo(f"recipe: {own} of the run (--recipe names another)", err=True)
        recipe = recipes.load(own, overrides)
    return Job(recipe, run)


@contextmanager
def one_line_errors(debug: bool, silent: bool = False) -> Iterator[None]:
    """Print an error as one line and exit 2 (usage) or 1 (failure); with ``--debug`` print its traceback first.

    With ``silent`` an error that every process of a run has is left for the first of them to print.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug and not isinstance(error, FailedElsewhere):
            traceback.print_exc()
        common = silent and isinstance(error, Flux2PixelError | OSError) and not isinstance(error, ProcessFailed)
        if not (common or isinstance(error, FailedElsewhere)):
            typer.echo(f"error: {sentence(error)}", err=True)
        raise typer.Exit(exit_code(error)) from error


def check(gpus: int = 1, models: Sequence[Path | None] = (), subspace: Path | None = None) -> None:
    """Refuse what no recipe can mend, before anything heavy."""
    if gpus != 1:
        raise UsageError(f"--gpus {gpus}: only 1 device is supported now; leave it out")
    for model in models:
        if model is not None and not model.is_dir() and str(model) not in base_names():
            raise UsageError(f"--model {model}: no such folder; give a converted or finetuned folder, or a base")
    if subspace is not None and not subspace.is_file():
        raise UsageError(f"--subspace {subspace}: no such file; write one with flux2pixel fit-subspace")


def image_source(recipe: Recipe) -> str:
    """Return the name of the images that the subspace is fitted on, checked to be there."""
    from flux2pixel.data import open_source

    if (Path(recipe.fit_subspace.source) / "cache.json").is_file():
        return f"the cache {recipe.fit_subspace.source}"
    try:
        return open_source(recipe.fit_subspace.source).name
    except UsageError as error:
        raise UsageError(f"--images {error}") from error


def timed(run: Path, stage: str, work: Callable[[], object]) -> None:
    """Run a stage and note its seconds in the run directory, where the report finds them."""
    began = time.perf_counter()
    work()
    path = run / "seconds.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, known | {stage: round(time.perf_counter() - began, 3)})
