"""The finetune stage: a converted model and images -> a finetuned model.

``prepare`` (prepare.py) runs in one process and finds every mistake; ``finetune`` then trains, in as many processes as
there are: ``build`` (build.py) puts the training together, step/ makes a step, watch/ shows it, network/ saves it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from flux2pixel.data.cache import Cache
from flux2pixel.finetune.build import build
from flux2pixel.finetune.data.loader import Loader
from flux2pixel.finetune.data.order import Order
from flux2pixel.finetune.network import checkpoint, export, parallel
from flux2pixel.finetune.prepare import Source, identity, open_data, open_source, prepare, start
from flux2pixel.finetune.step.trainer import Trainer
from flux2pixel.finetune.watch.profile import profiled
from flux2pixel.finetune.watch.validation import hold_out
from flux2pixel.finetune.watch.watch import Watch
from flux2pixel.recipe import Recipe
from flux2pixel.runtime import files, launch
from flux2pixel.runtime.processes import Team, join
from flux2pixel.runtime.progress import bar, log

STOPPED = "finetune-stopped.json"


def finetune(
    recipe: Recipe, run: Path, model: Path | None = None, out: Path | None = None, *, prepared: bool = False
) -> Path:
    """Train the converted model, log to ``finetune.jsonl``, and write the averaged weights; returns the folder.

    In a launched process, one of the run's; else alone. ``prepared``: :func:`prepare` was called before the launch. A
    signal saves, marks ``finetune-stopped.json`` and exits 0.
    """
    launch.set_threads(recipe.threads, processes=1)  # the leading process prepares alone
    torch.set_flush_denormal(True)
    torch.manual_seed(recipe.seed)

    def first() -> None:
        files.check_new(out or run / "finetuned", "finetune")  # else the days are lost at their end
        if not prepared:
            prepare(recipe, run, model, launch.world_size())

    with join(first, recipe.device) as team:
        launch.set_threads(recipe.threads)
        return train(recipe, run, parallel.meshed(team, recipe.finetune.replicas), model, out)


def train(recipe: Recipe, run: Path, team: Team, model: Path | None, out: Path | None) -> Path:
    """One process's part of a prepared training, from loading to the written model."""
    settings, folder = recipe.finetune, run / "checkpoints"
    source, cache = open_source(model or start(run), recipe), open_data(recipe, run)
    held = hold_out(cache, settings.validation_images)
    if team.leads:
        (run / STOPPED).unlink(missing_ok=True)
        log(f"finetune: model {source.folder}, {len(cache)} images, loss {settings.loss}, {team.world} process(es)")
    trainer = build(recipe, source, team)
    # Of one process's choosing: on a shared file system each may see another newest one.
    found = team.broadcast(checkpoint.newest(folder) if team.leads else None)
    saved = {} if found is None else checkpoint.load(trainer.state, found, team)
    watch = Watch(recipe, run, trainer, source, cache, held, saved.get("watch", {}))
    order = Order(held.training(cache), parallel.unit(settings, team.world), recipe.seed)
    loader = Loader(
        cache,
        order,
        settings.batch,
        range(trainer.state.step, settings.steps),
        caption_dropout=settings.caption_dropout,
        rank=team.rank,
        world=team.world,
        device=team.device,
    )
    stopped = False
    record: dict[str, Any] = identity(source, cache)
    with (
        trainer.stop.listening(),
        bar("finetune", settings.steps, shown=team.leads) as progress,
        profiled(settings.profile, run, team) as profiler,
    ):
        progress.advance(trainer.state.step)
        if trainer.state.step == 0 or watch.due:
            watch.look(trainer.state.step)
        for batches in loader:
            stepped = trainer.advance(batches)
            profiler.step()
            step, last = trainer.state.step, trainer.state.step == settings.steps
            watch.note(step, stepped, batches, loader.waited, progress)
            stopped = stepped.stop and not last
            # Samples come before the checkpoint, which then has them behind it; a signal leaves no time for them.
            if not stopped:
                watch.look(step, last)
            if stopped or (settings.keep_final and last) or (step % settings.save_every == 0 and not last):
                present = record | {"watch": watch.state(due=stopped)}
                watch.saved(step, checkpoint.save(trainer.state, folder, recipe, team, present))
            if stopped:
                break
    if stopped:
        _mark_stopped(run, trainer, team)
        raise SystemExit(0)
    return _finish(recipe, run, source, trainer, watch, cache, out)


def _mark_stopped(run: Path, trainer: Trainer, team: Team) -> None:
    """Say in a file that the run was left in order, and can be started again."""
    if team.leads:
        step = trainer.state.step
        files.write_json(run / STOPPED, {"step": step, "of": trainer.settings.steps, "signal": trainer.stop.signal})
        log(f"finetune: stopped by a signal after step {step}, saved; the same command goes on from there")


def _finish(
    recipe: Recipe, run: Path, source: Source, trainer: Trainer, watch: Watch, cache: Cache, out: Path | None
) -> Path:
    """Gather the weights, write the model and its card, and clear what only a resume needs."""
    team, destination = trainer.team, out or run / "finetuned"
    trained = export.gather(trainer.state, team.leads)
    if team.leads and watch.log:
        step = trainer.state.step
        record: dict[str, Any] = {
            "from": str(source.folder),
            "steps": step,
            "images_seen": step * recipe.finetune.batch,
        }
        record |= {"images": len(cache), "processes": team.world} | identity(source, cache)
        record |= {"skipped": dict(watch.log.rows("skipped"))}
        with files.new_folder(destination, "finetune") as folder:
            export.write_model(folder, source.folder, source.base, trained, recipe)
            export.write_card(folder, recipe, watch.log, record, run / "samples")
        if not recipe.finetune.keep_final:
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
        log(f"wrote {destination}")
    team.barrier()
    return destination
