"""The suites of a run: their prompts, how many are asked, at what size, and who judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flux2pixel.errors import UsageError
from flux2pixel.evaluate.generate import Size
from flux2pixel.evaluate.png import settings_digest
from flux2pixel.evaluate.suite import Prompt, Scorer
from flux2pixel.recipe import Recipe

MINIATURE = "klein-tiny"


@dataclass
class Suite:
    """One suite of this run.

    ``asked`` are those of the suite's ``prompts`` that this run draws, ``samples`` images each at most. ``load`` opens
    the scorer; None where only the images are wanted, for the fidelity measures.
    """

    name: str
    prompts: Sequence[Prompt]
    asked: Sequence[Prompt]
    samples: int
    side: int
    load: Callable[[], Scorer] | None

    @cached_property
    def scorer(self) -> Scorer:
        if self.load is None:
            raise UsageError(f"{self.name}: was not asked for")
        return self.load()

    @cached_property
    def digest(self) -> str:
        """Digest of all that decides a score beside the image."""
        return settings_digest(self.scorer.provenance())

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Every prompt's number in the suite."""
        return {prompt.id: place for place, prompt in enumerate(self.prompts)}

    def size_of(self, prompt: Prompt) -> Size:
        """(width, height) that the prompt's images are drawn at."""
        size = prompt.data.get("size")
        return (int(size[0]), int(size[1])) if size else (self.side, self.side)


def open_suites(recipe: Recipe) -> list[Suite]:
    """The suites that the recipe names; for fidelity alone, GenEval's images without its judge."""
    wanted = [name for name in recipe.eval.suite if name != "fidelity"]
    if recipe.base == MINIATURE:
        if strange := [name for name in wanted if name != "geneval"]:
            raise UsageError(f"--suite {strange[0]}: the miniature draws its own world only; use geneval and fidelity")
        return [_miniature(recipe, scored="geneval" in wanted)]
    raise UsageError("eval: only the miniature's detector is wired in this version; use base klein-tiny")


def _asked(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """``count`` prompts spread evenly over the suite's order, which is that of its groups; 0 means all."""
    wanted = min(count or len(prompts), len(prompts))
    return [prompts[i] for i in np.linspace(0, len(prompts) - 1, wanted).round().astype(int)]


def _miniature(recipe: Recipe, scored: bool) -> Suite:
    from flux2pixel.evaluate.geneval.promptset import SAMPLES
    from flux2pixel.miniature import judge, world

    scorer = judge.geneval(SAMPLES)
    asked = _asked(scorer.prompts, recipe.eval.prompts)
    side = recipe.eval.size or world.SIZE
    return Suite("geneval", scorer.prompts, asked, recipe.eval.samples, side, (lambda: scorer) if scored else None)
