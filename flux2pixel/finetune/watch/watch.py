"""What a training shows of itself: log lines, validation, samples; and what of that a checkpoint must remember."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flux2pixel.data.cache import Batch, Cache
from flux2pixel.finetune.network.parallel import unit
from flux2pixel.finetune.prepare import Source
from flux2pixel.finetune.step.trainer import Stepped, Trainer
from flux2pixel.finetune.watch import speed
from flux2pixel.finetune.watch.log import Log, memory
from flux2pixel.finetune.watch.samples import Samples, sample_model
from flux2pixel.finetune.watch.validation import Held, Validation
from flux2pixel.recipe import Recipe, as_dict
from flux2pixel.runtime.progress import Bar

MEANS = ("loss", "regression", "perceptual", "lam", "grad_norm")


class Watch:
    """Every process has one and must call it alike; only the leading one writes.

    ``saved`` is what :meth:`state` gave when the checkpoint was written that the training goes on from.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        trainer: Trainer,
        source: Source,
        cache: Cache,
        held: Held,
        saved: dict[str, Any],
    ):
        self.settings, self.trainer, self.team = recipe.finetune, trainer, trainer.team
        step = trainer.state.step
        self.log = Log(run, self.settings.trackers, step, as_dict(recipe)) if self.team.leads else None
        each = unit(self.settings, self.team.world)
        self.validation = Validation(cache, held, trainer.objective, recipe, self.team, each)
        model = sample_model(source, trainer.objective.flow, recipe)
        text = cache.text([*self.settings.prompts, ""])
        self.samples = Samples(run / "samples", model, text, cache.buckets[0], recipe.seed, self.team.device)
        if self.team.leads:
            self.samples.forget_after(step if step else -1)
        self.due = bool(saved.get("due", False))
        self.window = [Stepped(**{"skipped": (), **row}) for row in saved.get("window", ())]
        self.peak = speed.peak(self.team.device)
        self._restart(0.0)

    def state(self, due: bool) -> dict[str, Any]:
        """What a checkpoint keeps: the steps since the last line of the log, and if this step is not yet looked at."""
        return {"due": due, "window": [asdict(stepped) | {"stop": False, "skipped": ()} for stepped in self.window]}

    def _restart(self, waited: float) -> None:
        self.steps, self.tokens, self.operations = 0, 0, 0.0
        self.waited, self.since = waited, time.perf_counter()

    def note(self, step: int, stepped: Stepped, batches: list[Batch], waited: float, progress: Bar) -> None:
        """Count a step, and write a line of the log when one is due; a step that was left out has its own."""
        progress.advance(1, note=f"loss {stepped.loss:.4f}")
        if not stepped.skipped:
            self.window.append(stepped)
        elif self.log:
            self.log.write(step, skipped=list(stepped.skipped))
        self.steps += 1
        self.tokens += sum(len(b.rgb) * b.grid[0] * b.grid[1] for b in batches) * self.team.world
        if self.peak:
            self.operations += sum(speed.operations(self.trainer.network, self.settings, b) for b in batches)
        if step % self.settings.log_every and step != self.settings.steps:
            return
        if self.log and self.window:
            count = len(self.window)
            means = {name: sum(getattr(s, name) for s in self.window) / count for name in MEANS}
            self.log.write(step, **means, lr=stepped.lr, **self._rates(waited))
        self.window = []
        self._restart(waited)

    def _rates(self, waited: float) -> dict[str, float]:
        """Of the steps since this start of the run, or since the last line."""
        seconds = time.perf_counter() - self.since
        rates = {
            "images_per_second": self.steps * self.settings.batch / seconds,
            "tokens_per_second": self.tokens / seconds,
            "data_wait": (waited - self.waited) / seconds,
            "memory_gib": memory(self.team.device),
        }
        if self.peak:
            rates["mfu"] = self.operations / seconds / self.peak
        return rates

    def look(self, step: int, last: bool = False) -> None:
        """Validate and draw samples with the averaged weights when they are due: first, every so often, and last."""
        validate = self.validation.units and (step % self.settings.validate_every == 0 or last)
        draw = step % self.settings.sample_every == 0 or last
        self.due = False
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
                if self.log:
                    self.log.pictures(step, self.samples.write(images, step))
        self.since += time.perf_counter() - began  # a look is no part of the rate

    def saved(self, step: int, seconds: float) -> None:
        """Note how long a save held the training up."""
        if self.log:
            self.log.write(step, save_seconds=seconds)
        self.since += seconds
