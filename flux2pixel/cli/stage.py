"""What every command with a recipe does: resolve it, check what can be checked before any work, and clear up after."""

import difflib
import json
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from flux2pixel import recipe as recipes
from flux2pixel.cli.options import CONVERTED, FINETUNED, READOUT, SUBSPACE, Flags
from flux2pixel.recipe import Recipe, setting
from flux2pixel.runtime import launch
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.files import write, write_json

MODELS = (FINETUNED, READOUT, CONVERTED)  # of a run, the latest first


@dataclass(frozen=True)
class Job:
    """What a command works on: its recipe and the run directory.

    ``file`` is the recipe's file, if one was named; ``overrides`` are what ``--set`` and flags changed.
    """

    recipe: Recipe
    run: Path
    file: Path | None
    overrides: tuple[str, ...]
    dry_run: bool

    def planned(self, takes: Sequence[Path | str], writes: Sequence[Path]) -> bool:
        """Whether this is a dry run; if so, what the user wrote and the files of this command are printed, once."""
        if self.dry_run and launch.rank() == 0:
            typer.echo("\n".join(self._plan(takes, writes)))
        return self.dry_run

    def _plan(self, takes: Sequence[Path | str], writes: Sequence[Path]) -> list[str]:
        lines = [f"base    {self.recipe.base}", f"run     {self.run}"]
        default = recipes.as_dict(recipes.load(base=self.recipe.base))
        own = "the model's own"
        written = _flat({"base": self.recipe.base} | dict(self.recipe.written))
        for key, value in written.items():
            section, _, name = key.rpartition(".")
            usual = (default.get(section, {}) if section else default).get(name)
            same = usual == (list(value) if isinstance(value, tuple) else value)
            note = "the default" if same else f"default: {own if usual is None else recipes.toml(usual)}"
            if key != "base":
                lines.append(f"set     {key} = {recipes.toml(value)}  # {note}")
        for taken in takes:
            absent = isinstance(taken, Path) and not taken.exists()
            lines.append(f"takes   {taken}{' (not there yet)' if absent else ''}")
        copied = [self.run / "recipe.toml"] if self._copies else []
        for path in (*writes, *copied):
            lines.append(f"writes  {path}{' (replaced)' if path.exists() else ''}")
        return lines

    @contextmanager
    def stage(self, name: str, writes: Sequence[Path] = (), *, timed: bool = True, then: str = "") -> Iterator[None]:
        """Work that writes ``writes``: it can be written, and when it failed no folder of ours is left empty.

        After success the seconds are noted where the report finds them, a recipe named for the first time is copied
        into the run, and the ``next:`` command line is printed. Only one process of a launched run does any of it.
        """
        if launch.rank():
            yield
            return
        made = _make_folders([*([self.run] if timed else []), *(path.parent for path in writes)])
        began = time.perf_counter()
        try:
            yield
        except BaseException as left:
            if isinstance(left, SystemExit) and not left.code:  # stopped in order, to go on later
                self.keep_recipe()
            _remove_empty(made)
            raise
        if timed:
            path = self.run / "seconds.json"
            known = json.loads(path.read_text()) if path.is_file() else {}
            write_json(path, known | {name.replace("-", "_"): round(time.perf_counter() - began, 3)})
        self.keep_recipe()
        if then:
            typer.echo(f"next: {then}", err=True)

    @property
    def _copies(self) -> bool:
        return self.file is not None and not (self.run / "recipe.toml").exists()

    def keep_recipe(self) -> None:
        """Copy the recipe file that this command was given into a run that has none; no flag, no ``--set``."""
        if self.file is None or not self._copies:
            return
        if said := recipes.read(self.file):
            text = f"format = {recipes.FORMAT}\n" + recipes.dumps_written(said)
            write(self.run / "recipe.toml", lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def command(self, *words: str | Path) -> str:
        """A command line of this run, such as is printed after ``next:``."""
        return shlex.join(["flux2pixel", *map(str, words), "--run", str(self.run)])


def resolve(flags: Flags, *, fresh: bool = False, **changes: Any) -> Job:
    """Resolve the recipe: the file, then ``--set``, then flags named ``section__key`` (``None``: not given).

    Without a file a command goes on with the run's own recipe, if there is one, and with the base that the run's files
    are of; ``fresh`` does not.
    """
    overrides = list(flags.assignments or ())
    for key, value in {"base": flags.base, "seed": flags.seed, "device": flags.device, **changes}.items():
        if value is not None:
            overrides.append(setting(key.replace("__", "."), str(value) if isinstance(value, Path) else value))
    recipe = recipes.load(flags.recipe, overrides)
    run = flags.run or Path("runs") / Path(recipe.base).resolve().name
    if not fresh:
        own = run / "recipe.toml"
        mine = own if flags.recipe is None and own.is_file() else flags.recipe
        if mine is own and launch.rank() == 0:  # once for a run of many processes
            typer.echo(f"recipe: {own} of the run (--recipe names another)", err=True)
        recipe = recipes.load(mine, overrides, fallback=base_of(run))
    return Job(recipe, run, flags.recipe, tuple(overrides), flags.dry_run)


def base_of(run: Path) -> str:
    """The base that the files of a run are of; empty if it has none that tells."""
    from flux2pixel.weights.header import read_header

    for name in MODELS:
        described = run / name / "asymflow.json"
        if described.is_file():
            return str(json.loads(described.read_text()).get("base", ""))
    try:
        return read_header(run / SUBSPACE).metadata.get("base", "") if (run / SUBSPACE).is_file() else ""
    except Flux2PixelError:
        return ""  # the stage that reads it says what is wrong with it


def check_run(job: Job) -> None:
    """Raise UsageError if the run does not exist, naming the nearest that does."""
    if job.run.is_dir() or job.dry_run:
        return
    hint = _nearest(job.run) or "start one with flux2pixel run, or name a --model"
    raise UsageError(f"--run {job.run}: no such run; {hint}")


def check_model(model: str | Path | None, option: str = "--model") -> None:
    """Refuse a model that is no folder, no base and cannot be a Hub id, before anything heavy is imported."""
    from flux2pixel.families import registry
    from flux2pixel.families.known import KNOWN

    if model is None or Path(model).is_dir() or str(model) in {*registry.names(), *KNOWN}:
        return
    owner, slash, name = str(model).partition("/")
    if not (slash and owner and name and "/" not in name) or Path(owner).exists():
        hint = _nearest(Path(model)) or "give a model folder, a base or a Hub id"
        raise UsageError(f"{option} {model}: no such folder; {hint}")


def _nearest(path: Path) -> str:
    """Ask whether the folder that is there and called most like ``path`` was meant; empty if none is."""
    missing = next((one for one in (*reversed(path.parents), path) if not one.exists()), path)
    beside = [one.name for one in missing.parent.iterdir() if one.is_dir()] if missing.parent.is_dir() else []
    near = difflib.get_close_matches(missing.name, beside, n=1, cutoff=0.5)
    return f"did you mean {missing.parent / near[0] / path.relative_to(missing)}?" if near else ""


def check_subspace(subspace: Path | None) -> None:
    """Refuse a subspace that is not there."""
    if subspace is not None and not subspace.is_file():
        raise UsageError(f"--subspace {subspace}: no such file; write one with flux2pixel fit-subspace")


def fit_images(recipe: Recipe) -> str:
    """The name of the images that the subspace is fitted on, checked to be there."""
    from flux2pixel.data import open_source

    source = recipe.fit_subspace.source
    _check_source(recipe, "fit_subspace", "no images to fit the subspace on")
    if (Path(source) / "cache.json").is_file():
        return f"the cache {source}"
    try:
        return open_source(source).name
    except UsageError as error:
        raise UsageError(f"--images {error}") from error


def with_training_images(job: Job) -> Job:
    """The job with its training images named: by the recipe, or else those that the run's cache was made of."""
    recipe, cache = job.recipe, job.run / job.recipe.data.cache / "cache.json"
    if not recipe.data.source and cache.is_file():
        request = json.loads(cache.read_text()).get("request", {})
        data = replace(recipe.data, source=request.get("source", ""))
        finetune = replace(recipe.finetune, images=request.get("images", recipe.finetune.images))
        job = replace(job, recipe=replace(recipe, data=data, finetune=finetune))
    _check_source(job.recipe, "data", "no training images")
    return job


def _check_source(recipe: Recipe, section: str, missing: str) -> None:
    """Refuse no images, and procedural ones of another base's world."""
    from flux2pixel.families import registry

    source = getattr(recipe, section).source
    if not source:
        raise UsageError(f"{section}.source: {missing}; give --images, such as a folder of them")
    bundled = [one for one in map(registry.plugin, registry.names()) if one is not None]
    worlds = {name: one.name for one in bundled for name in one.sources}
    carried = recipes.base_defaults(recipe.base).get(section, {}).get("source")
    if source in worlds and recipe.base != worlds[source] and source != carried:
        raise UsageError(
            f"{section}.source = {source}: {worlds[source]}'s own world, no use to {recipe.base}; give --images FOLDER"
        )


def _make_folders(folders: Sequence[Path]) -> list[Path]:
    """Make folders that can be written in; returns those that were not there, the outer ones first."""
    made: list[Path] = []
    for folder in dict.fromkeys(folders):
        absent = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = error.strerror or error
            _remove_empty([*made, *reversed(absent)])
            raise Flux2PixelError(f"{folder}: cannot write here ({reason}); choose another --run or --out") from error
        made += reversed(absent)
    return made


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of ``folders``, outer ones first, that hold nothing."""
    for folder in reversed(folders):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``section.key``."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
