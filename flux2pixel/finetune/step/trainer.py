"""One optimizer step after another: the state of a training, the step, and what can stop it."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flux2pixel.data.cache import Batch
from flux2pixel.finetune.network.checkpoint import State
from flux2pixel.finetune.network.parallel import local, sync_gradients, whole
from flux2pixel.finetune.network.trainable import Group, make_optimizer, set_rate
from flux2pixel.finetune.step.ema import PowerEma
from flux2pixel.finetune.step.objective import DROPOUT, Objective, draw, seeded
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.errors import Flux2PixelError
from flux2pixel.runtime.processes import Team
from flux2pixel.runtime.progress import log


@dataclass(frozen=True)
class Stepped:
    """What a step gave, averaged over the global batch; ``stop`` if any process was asked to."""

    loss: float
    regression: float
    perceptual: float
    lam: float
    grad_norm: float
    lr: float
    stop: bool
    skipped: tuple[str, ...] = ()  # images of a step that was left out, because a loss or gradient was not finite


class Stop:
    """Notes SIGTERM and SIGUSR1, so that a step is finished, saved and then left."""

    def __init__(self):
        self.signal = 0

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Handle the signals while the block runs; outside the main thread there are none to handle."""
        try:
            before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        except ValueError:
            before = {}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        self.signal = number


class Trainer:
    """A network in training on one of the team's processes.

    Everything random is a function of the recipe's seed and of the place in the data's order, so that neither a resume
    nor the number of processes changes it.
    """

    def __init__(self, recipe: Recipe, network: nn.Module, groups: list[Group], objective: Objective, team: Team):
        self.recipe, self.settings, self.team = recipe, recipe.finetune, team
        self.network, self.objective = network, objective
        self.groups = groups
        optimizer = make_optimizer(network, groups, self.settings)
        self.state = State(network, optimizer, PowerEma(network, self.settings.ema_gamma), groups)
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.stop = Stop()
        network.train()

    def advance(self, batches: list[Batch]) -> Stepped:
        """One step on this process's micro-batches.

        If a loss or a gradient is not finite the weights, the optimizer and the average stay as they are, and the step
        only counts. More than ``finetune.skip_limit`` such steps in a row raise Flux2PixelError in every process.
        """
        settings, state = self.settings, self.state
        lr = self._set_rates()
        state.optimizer.zero_grad()
        parts = torch.stack([self._backward(batch, len(batches), batch is batches[-1]) for batch in batches]).cpu()
        norm = float(whole(nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])))
        mean = parts.mean(0).tolist()
        bad = not (math.isfinite(norm) and bool(parts.isfinite().all()))
        *sums, bad_count, stops = self.team.sum([*mean, bad, bool(self.stop.signal)])
        loss, regression, seen, lam = (total / self.team.world for total in sums)
        if bad_count:
            skipped = self._skip(batches, parts[:, 0], norm)
            return Stepped(loss, regression, seen, lam, norm, lr, bool(stops), skipped)
        state.skipped = 0
        if state.step >= settings.clip_start and norm > settings.clip:
            torch._foreach_mul_([local(p.grad) for p in self.trained if p.grad is not None], settings.clip / norm)
        state.optimizer.step()
        (state.ema.update if state.step >= settings.ema_start else state.ema.follow)(self.network)
        state.step += 1
        return Stepped(loss, regression, seen, lam, norm, lr, bool(stops))

    def _backward(self, batch: Batch, count: int, last: bool) -> Tensor:
        """Add a micro-batch's gradient; its loss, regression, perceptual term and mean lam, (4,)."""
        sigma, eps = draw(batch, self.recipe.seed, self.settings.shift)
        if self.settings.trainable == "lora" and self.settings.lora_dropout:
            torch.manual_seed(seeded(torch.device("cpu"), self.recipe.seed, DROPOUT, batch.number).initial_seed())
        sync_gradients(self.network, last)
        parts = self.objective(self.network, batch, sigma, eps)
        (parts.loss / count).backward()
        return torch.stack([parts.loss.detach(), parts.regression, parts.perceptual, parts.lam])

    def _set_rates(self) -> float:
        """Warm-up, then the schedule; returns the rate of plain ``lr``."""
        settings, step = self.settings, self.state.step
        factor = min(1.0, (step + 1) / max(1, settings.warmup))
        if settings.schedule == "sqrt":
            factor *= math.sqrt(max(0.0, 1 - step / settings.steps))
        for group, table in zip(self.groups, self.state.optimizer.param_groups, strict=True):
            set_rate(table, group.lr * factor)
        return settings.lr * factor

    def _skip(self, batches: list[Batch], losses: Tensor, norm: float) -> tuple[str, ...]:
        """Leave the step out; its images: of all micro-batches whose loss is not finite, or of all if only gradients
        are. Every process knows them, and raises Flux2PixelError past the limit."""
        mine = [(name, loss) for batch, loss in zip(batches, losses.tolist(), strict=True) for name in batch.names]
        everyone = [pair for pairs in self.team.gather(mine) for pair in pairs]
        guilty = [name for name, loss in everyone if not math.isfinite(loss)] or [name for name, _ in everyone]
        shown = ", ".join(guilty[:20]) + (f" and {len(guilty) - 20} more" if len(guilty) > 20 else "")
        what = f"finetune: loss or gradient not finite at step {self.state.step} (gradient norm {norm:g})"
        if self.state.skipped >= self.settings.skip_limit:
            before = f" after {self.state.skipped} left out in a row (finetune.skip_limit)" * bool(self.state.skipped)
            raise Flux2PixelError(
                f"{what}{before}; stopped before the step, checkpoints are as they were; leave bad images out by "
                f"data.exclude; images: {shown}"
            )
        self.state.optimizer.zero_grad()
        self.state.step += 1
        self.state.skipped += 1
        if self.team.leads:
            log(f"{what}; the step is left out; images: {shown}")
        return tuple(guilty)
