"""The finetune stage: a converted model and images -> a finetuned model.

``prepare`` runs in one process and finds every mistake; ``finetune`` then trains, in as many processes as there are.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flux2pixel.asymflow.codec import Codec
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.data import encode
from flux2pixel.data.cache import Cache
from flux2pixel.finetune import samples
from flux2pixel.finetune.data.loader import Loader
from flux2pixel.finetune.data.order import Order
from flux2pixel.finetune.log import Log, check_trackers, memory
from flux2pixel.finetune.network import checkpoint, export, parallel
from flux2pixel.finetune.network.quantise import quantise
from flux2pixel.finetune.network.trainable import lora_modules
from flux2pixel.finetune.network.trainable import prepare as mark_trainable
from flux2pixel.finetune.step.objective import LatentReference, Objective, SharedReference, Velocity
from flux2pixel.finetune.step.perceptual import load_lpips
from flux2pixel.finetune.step.trainer import Stepped, Trainer
from flux2pixel.finetune.validation import Held, Validation, hold_out
from flux2pixel.models import base as bases
from flux2pixel.models.base import Base
from flux2pixel.models.folder import read_folder
from flux2pixel.models.model import PixelModel
from flux2pixel.recipe import Recipe, as_dict
from flux2pixel.runtime import files, launch
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.processes import Team, join
from flux2pixel.runtime.progress import Bar, bar, log

STOPPED = "finetune-stopped.json"


@dataclass(frozen=True)
class Source:
    """A converted folder: its base (for the network), the method's constants, and what identifies it."""

    folder: Path
    base: Base
    flow: AsymFlow
    patch: int
    digest: str


def open_source(folder: Path, recipe: Recipe) -> Source:
    """Open a converted folder without its weights. Raises UsageError if it is not one."""
    if not (folder / "asymflow.json").is_file():
        raise UsageError(f"--model {folder}: no asymflow.json in it; run convert, or name a converted folder")
    use = json.loads((folder / "asymflow.json").read_text())
    stored, _ = files.read_tensors(folder / "asymflow.safetensors")
    flow = AsymFlow(stored["basis"].float(), stored["scale"].float(), sigma_min=use["sigma_min"])
    # Frozen weights are read in the precision they are used in; trained ones become float32 later.
    settings = recipe.finetune
    half = settings.trainable == "lora" and settings.precision == "bf16"
    base = bases.open_base(folder, torch.bfloat16 if half else torch.float32)
    return Source(folder, base, flow, use["patch_size"], export.digest_of([flow.basis, flow.scale]))


def prepare(recipe: Recipe, run: Path, model: Path | None = None, gpus: int = 1) -> None:
    """Find what is wrong, make the cache, embed the sample prompts: in one process, before any process group.

    Raises UsageError or Flux2PixelError with one line. Prints how the recipe differs from a checkpoint's.
    """
    settings = recipe.finetune
    parallel.check_world(settings, gpus)
    check_trackers(settings.trackers)
    source = open_source(model or run / "converted", recipe)
    if settings.trainable == "lora":
        with torch.device("meta"):
            network = source.base.network_class()(**_constructor(source.base))
        lora_modules(network, source.base, settings.lora_targets)
    if settings.perceptual:
        if settings.loss != "variance-reduction":
            raise UsageError("finetune.perceptual is gated by the variance reduction; set finetune.loss to that")
        load_lpips()
    latent = encode.open_encoders(recipe)
    cache = encode.ensure(recipe, run, latent, launch.here(gpus))
    samples.encode_prompts(latent, settings.prompts, run / "samples")
    found = checkpoint.newest(run / "checkpoints")
    if found is not None:
        _compare(found, recipe, _identity(source, cache), gpus)


def _constructor(base: Base) -> dict[str, Any]:
    return {name: value for name, value in base.config.items() if not name.startswith("_")}


def _identity(source: Source, cache: Cache) -> dict[str, str]:
    return {"model": source.digest, "data": cache.digest}


def _compare(path: Path, recipe: Recipe, identity: dict[str, str], world: int) -> None:
    """Say how this run differs from the checkpoint's; UsageError where it cannot go on from it."""
    manifest = checkpoint.read_manifest(path)
    for what, words in (("model", "converted model"), ("data", "training cache")):
        if manifest[what] != identity[what]:
            raise UsageError(f"{path}: is a checkpoint of another {words}; delete {path.parent} or use another --run")
    sections = ("base", "seed", "data", "finetune")
    stored, present = ({name: table[name] for name in sections} for table in (manifest["recipe"], as_dict(recipe)))
    changes = checkpoint.differences(stored, present)
    for key, before, now in changes:
        log(f"recipe: {key} was {before!r} at the checkpoint, is {now!r} now")
    if refused := [key for key, _, _ in changes if checkpoint.fixed(key)]:
        raise UsageError(
            f"{path}: is a checkpoint of another recipe ({', '.join(refused)}), and a run cannot go on under other "
            f"values of that; restore them, delete {path.parent}, or use another --run"
        )
    if changes:
        log(f"recipe: the recipe wins over the checkpoint from step {manifest['step']} on")
    if manifest["processes"] != world:
        again = "" if recipe.finetune.micro_batch else "; batches are cut otherwise, as finetune.micro_batch = 0 says"
        log(
            f"finetune: the checkpoint is of {manifest['processes']} process(es), now {world}: resharded; sums of "
            f"gradients are taken in another order, so results agree to rounding, not bit by bit{again}"
        )


def finetune(recipe: Recipe, run: Path, model: Path | None = None, out: Path | None = None) -> Path:
    """Train the converted model, log to ``finetune.jsonl``, and write the averaged weights; returns the folder.

    In a launched process, one of the run's; else alone. A signal saves, marks ``finetune-stopped.json`` and exits 0.
    """
    launch.set_threads(recipe.threads, processes=1)  # the leading process prepares alone
    torch.set_flush_denormal(True)
    torch.manual_seed(recipe.seed)

    def prepared() -> None:
        files.check_new(out or run / "finetuned", "finetune")  # else the days are lost at their end
        prepare(recipe, run, model, launch.world_size())

    with join(prepared) as team:
        launch.set_threads(recipe.threads)
        return train(recipe, run, parallel.meshed(team, recipe.finetune.replicas), model, out)


def train(recipe: Recipe, run: Path, team: Team, model: Path | None, out: Path | None) -> Path:
    """One process's part of a prepared training, from loading to the written model."""
    settings, folder = recipe.finetune, run / "checkpoints"
    source, cache = open_source(model or run / "converted", recipe), Cache(encode.cache_folder(recipe, run))
    held = hold_out(cache, settings.validation_images)
    if team.leads:
        (run / STOPPED).unlink(missing_ok=True)
        log(f"finetune: model {source.folder}, {len(cache)} images, loss {settings.loss}, {team.world} process(es)")
    trainer = build(recipe, source, team)
    if (found := team.broadcast(checkpoint.newest(folder))) is not None:  # file systems show it late
        checkpoint.load(trainer.state, found, team)
    watch = Watch(recipe, run, trainer, source, cache, held)
    order = Order(held.training(cache), _unit(recipe, team), recipe.seed)
    steps = range(trainer.state.step, settings.steps)
    loader = Loader(
        cache,
        order,
        settings.batch,
        steps,
        caption_dropout=settings.caption_dropout,
        rank=team.rank,
        world=team.world,
        device=team.device,
    )
    stopped = False
    identity = _identity(source, cache)
    with trainer.stop.listening(), bar("finetune", settings.steps, team.leads, "steps") as progress:
        progress.skip(trainer.state.step)
        if trainer.state.step == 0:
            watch.look(0)
        for batches in loader:
            stepped = trainer.advance(batches)
            step, last = trainer.state.step, trainer.state.step == settings.steps
            watch.note(step, stepped, batches, loader.waited, progress)
            stopped = stepped.stop and not last
            if stopped or (settings.keep_final and last) or (step % settings.save_every == 0 and not last):
                watch.saved(step, checkpoint.save(trainer.state, folder, recipe, team, identity))
            if stopped:
                break
            watch.look(step, last)
    if stopped:
        _mark_stopped(run, trainer, team)
        raise SystemExit(0)
    return _finish(recipe, run, source, trainer, watch, cache, out)


def build(recipe: Recipe, source: Source, team: Team) -> Trainer:
    """The network, marked, sharded and compiled as the recipe says, with its objective and optimizer."""
    settings, flow = recipe.finetune, source.flow.to(team.device)
    network = source.base.transformer
    groups = mark_trainable(network, source.base, settings, recipe.seed)
    if settings.frozen_int8:
        quantise(network)
    if settings.checkpointing:
        network.enable_gradient_checkpointing()
    reference: Velocity | None = None
    if settings.loss == "variance-reduction":
        if settings.trainable == "lora":
            reference = SharedReference(source.base, network, flow.basis)
        else:
            reference = LatentReference(source.base, _place(_frozen(recipe), recipe, team))
    network = _place(network, recipe, team)
    lpips = load_lpips(team.device) if settings.perceptual else None
    return Trainer(recipe, network, groups, Objective(settings, source.base, flow, reference, lpips), team)


def _frozen(recipe: Recipe) -> nn.Module:
    """The latent base of a full finetuning. Its Linear weights are cast once, where autocast would at every call."""
    network: nn.Module = bases.open_base(recipe.base).transformer
    if recipe.finetune.precision == "bf16":
        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
    return network


def _place(network: nn.Module, recipe: Recipe, team: Team) -> nn.Module:
    """Compile and shard ``network``, or move it to the device."""
    if recipe.finetune.compile:
        parallel.compile_blocks(network)
        if recipe.finetune.trainable == "lora":
            log("note: compiled on the CPU, a few small LoRA gradients differ from eager (benchmarks/compiled_step.py)")
    if team.mesh is None:
        return network.to(team.device)
    parallel.shard(network, team.mesh, recipe.finetune.precision)
    return network


def _unit(recipe: Recipe, team: Team) -> int:
    return recipe.finetune.micro_batch or recipe.finetune.batch // team.world


class Watch:
    """What a training shows of itself: log lines, validation and samples; only the leading process writes."""

    def __init__(self, recipe: Recipe, run: Path, trainer: Trainer, source: Source, cache: Cache, held: Held):
        self.settings, self.trainer, self.team = recipe.finetune, trainer, trainer.team
        step, self.unit = trainer.state.step, _unit(recipe, trainer.team)
        self.log = Log(run, self.settings.trackers, step, as_dict(recipe)) if self.team.leads else None
        self.validation = Validation(cache, held, trainer.objective, recipe, self.team, self.unit)
        model = PixelModel(
            source.base,
            read_folder(source.folder).sampler.changed({"gamut_clamp": True}).changed(recipe.sample),
            Codec(source.patch),
            flow=trainer.objective.flow,
        )
        self.samples = samples.Samples(run / "samples", model, cache.buckets[0], recipe.seed, self.team.device)
        if self.team.leads:
            self.samples.forget_after(step if step else -1)
        self.window: list[Stepped] = []
        self.tokens, self.waited, self.since = 0, 0.0, time.perf_counter()

    def note(self, step: int, stepped: Stepped, batches: list[Any], waited: float, progress: Bar) -> None:
        """Count a step, and write a line of the log when one is due."""
        progress.advance(1, note=f"loss {stepped.loss:.4f}")
        self.window.append(stepped)
        self.tokens += sum(len(b.rgb) * b.grid[0] * b.grid[1] for b in batches) * self.team.world
        if step % self.settings.log_every and step != self.settings.steps:
            return
        seconds, count = time.perf_counter() - self.since, len(self.window)
        if self.log:
            means = {
                name: sum(getattr(s, name) for s in self.window) / count
                for name in ("loss", "regression", "perceptual", "lam", "grad_norm")
            }
            self.log.write(
                step,
                **means,
                lr=stepped.lr,
                images_per_second=count * self.settings.batch / seconds,
                tokens_per_second=self.tokens / seconds,
                data_wait=(waited - self.waited) / seconds,
                memory_gib=memory(),
            )
        self.window, self.tokens, self.waited, self.since = [], 0, waited, time.perf_counter()

    def look(self, step: int, last: bool = False) -> None:
        """Validate and draw samples with the averaged weights when they are due: first, every so often, and last."""
        every, often = self.settings.validate_every, self.settings.sample_every
        validate = self.validation.units and every and (step % every == 0 or last)
        draw = often and (step % often == 0 or last)
        if not (validate or draw):
            return
        began, state = time.perf_counter(), self.trainer.state
        with state.ema.swapped(state.network):
            if validate:
                found = self.validation(state.network)
                if self.log:
                    first = self.log.first("validation") or found
                    against = {"start": first["mean"], "edges": self.validation.edges}
                    self.log.write(step, validation=found | against)
            if draw:
                images = self.samples(state.network)
                if self.team.leads:
                    self.samples.write(images, step)
        self.since += time.perf_counter() - began  # a look is no part of the rate

    def saved(self, step: int, seconds: float) -> None:
        """Note how long a save held the training up."""
        if self.log:
            self.log.write(step, save_seconds=seconds)
        self.since += seconds


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
        record |= {"images": len(cache), "processes": team.world} | _identity(source, cache)
        with files.new_folder(destination, "finetune") as folder:
            export.write_model(folder, source.folder, source.base, trained, recipe)
            export.write_card(folder, recipe, watch.log, record, run / "samples")
        if not recipe.finetune.keep_final:
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
        log(f"wrote {destination}")
    team.barrier()
    return destination
