"""Validation on images held out from training: fixed noise, stratified noise levels, the averaged weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from flux2pixel.asymflow import schedule
from flux2pixel.data.cache import Batch, Cache
from flux2pixel.finetune.loss import flow_matching
from flux2pixel.finetune.step.objective import VALIDATION, Objective, seeded
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.processes import Team

BINS = 8


@dataclass(frozen=True)
class Held:
    """How many images at the end of each bucket are kept from training."""

    counts: tuple[int, ...]

    def training(self, cache: Cache) -> tuple[int, ...]:
        """Images of each bucket that are trained on."""
        return tuple(count - held for count, held in zip(cache.counts, self.counts, strict=True))


def hold_out(cache: Cache, wanted: int) -> Held:
    """Hold out ``wanted`` images, at most a tenth of them, from the buckets in proportion.

    A cache is sorted by content, so the end of a bucket is a random choice that stays the same.
    """
    share = min(wanted / len(cache), 0.1)
    return Held(tuple(min(round(count * share), count - 1) for count in cache.counts))


class Validation:
    """The plain flow-matching loss by noise level, the same draws every time.

    Every held-out image is seen at one level of each of BINS strata of the training's own (shifted) noise levels.
    """

    def __init__(self, cache: Cache, held: Held, objective: Objective, recipe: Recipe, team: Team, unit: int):
        self.cache, self.objective, self.recipe, self.team = cache, objective, recipe, team
        self.units: list[tuple[int, np.ndarray]] = []
        for bucket, (count, kept) in enumerate(zip(cache.counts, held.counts, strict=True)):
            indices = np.arange(count - kept, count)
            self.units += [(bucket, indices[i : i + unit]) for i in range(0, kept, unit)]

    @property
    def edges(self) -> list[float]:
        """Noise levels between the strata, BINS + 1, of the most filled bucket."""
        factor = schedule.shift_at(self.recipe.finetune.shift, *self.cache.buckets[0])
        levels = schedule.shift(torch.linspace(0, 1, BINS + 1), factor)
        return [round(level, 4) for level in levels.tolist()]

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> dict[str, float | list[float]]:
        """``mean`` and ``bins``, from low to high noise. Every process must call it: units are shared out."""
        training, sums = network.training, np.zeros((BINS, 2))
        network.eval()
        for start in range(0, len(self.units), self.team.world):
            number = start + self.team.rank
            # Sharded weights want every process in every forward, so a short round is filled up and not counted.
            counted = number < len(self.units)
            batch = self._load(number % len(self.units))
            for stratum in range(BINS):
                loss = self._loss(network, batch, stratum)
                sums[stratum] += (counted * float(loss) * len(batch.rgb), counted * len(batch.rgb))
        network.train(training)
        total = np.array(self.team.sum(sums.flatten().tolist())).reshape(BINS, 2)
        bins = (total[:, 0] / total[:, 1]).tolist()
        return {"mean": float(np.mean(bins)), "bins": bins}

    def _load(self, number: int) -> Batch:
        bucket, indices = self.units[number]
        return replace(self.cache.load(bucket, indices), number=number).to(self.team.device)

    def _loss(self, network: nn.Module, batch: Batch, stratum: int) -> Tensor:
        settings, device = self.recipe.finetune, self.team.device
        generator = seeded(device, self.recipe.seed, VALIDATION, batch.number, stratum)
        x0 = batch.pixels(self.objective.codec)
        t = (stratum + torch.rand(len(x0), generator=generator, device=device)) / BINS
        sigma = schedule.shift(t, schedule.shift_at(settings.shift, *batch.rgb.shape[-2:]))
        eps = torch.randn(x0.shape, generator=generator, device=device)
        x0_hat = self.objective.predict(network, batch, x0, sigma, eps)
        return flow_matching(x0, x0_hat, sigma, settings.sigma_min)
