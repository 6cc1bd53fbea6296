"""The suites of a run: their prompts, how many are asked, at what size, and who judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from flux2pixel.data import open_source
from flux2pixel.evaluate import open_scorers
from flux2pixel.evaluate.assets.fetch import default_folder
from flux2pixel.evaluate.digests import Digests
from flux2pixel.evaluate.drawing import Size
from flux2pixel.evaluate.memo import Memo
from flux2pixel.evaluate.png import settings_digest
from flux2pixel.evaluate.suite import Prompt, Scorer
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.errors import UsageError

MINIATURE = "klein-tiny"
NO_TRUTH = "no true images to compare with; name a folder of them with --reference (eval.reference)"
SIDE = 1024  # of an image where recipe and suite say nothing


@dataclass
class Suite:
    """One suite of this run.

    ``asked`` are those of the suite's ``prompts`` that this run draws, ``samples`` images each at most, ``side``
    pixels square; with side 0, at the size that the suite gives each prompt. ``load`` opens the scorer with its
    networks. ``provenance`` says what decides its scores and ``sum_up`` makes a scorer of that alone, which can sum up
    but not score: with them a rerun loads nothing. ``load`` None: only the images are wanted.
    """

    name: str
    prompts: Sequence[Prompt]
    asked: Sequence[Prompt]
    samples: int
    side: int
    load: Callable[[], Scorer] | None
    provenance: Callable[[], dict[str, Any]]
    sum_up: Callable[[dict[str, Any]], Scorer]

    @cached_property
    def scorer(self) -> Scorer:
        """The scorer with its networks."""
        if self.load is None:
            raise UsageError(f"{self.name}: was not asked for")
        return self.load()

    @cached_property
    def decided_by(self) -> dict[str, Any]:
        """What decides a score beside the image."""
        return self.provenance()

    @cached_property
    def digest(self) -> str:
        """Digest of all that decides a score beside the image."""
        return settings_digest(self.decided_by)

    @cached_property
    def summariser(self) -> Scorer:
        """A scorer that sums up."""
        return self.sum_up(self.decided_by)

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Every prompt's number in the suite."""
        return {prompt.id: place for place, prompt in enumerate(self.prompts)}

    def size_of(self, prompt: Prompt) -> Size:
        """(width, height) that the prompt's images are drawn at."""
        if self.side:
            return (self.side, self.side)
        width, height = prompt.data["size"]
        return (int(width), int(height))


@dataclass(frozen=True)
class Judge:
    """Who judged, known from an earlier run; a GenEval detector, a DPG-Bench judge and an HPSv3 model in name."""

    name: str
    decided_by: Mapping[str, Any]

    def provenance(self) -> dict[str, Any]:
        return dict(self.decided_by)

    def look(self, images: Any) -> Any:
        raise AssertionError("a judge in name only was asked to score")

    def ask(self, images: Any, questions: Any) -> Any:
        raise AssertionError("a judge in name only was asked to score")

    def __call__(self, images: Any, prompts: Any) -> Any:
        raise AssertionError("a judge in name only was asked to score")


def assets_folder(recipe: Recipe) -> Path:
    """Where the scorers' weights and data lie."""
    return Path(recipe.eval.assets) if recipe.eval.assets else default_folder()


def open_suites(recipe: Recipe, digests: Digests, memo: Memo, device: str) -> list[Suite]:
    """The suites that the recipe names; for fidelity alone, GenEval's images without its judge.

    Loads no network. Raises UsageError, with what to fetch, if a suite's weights or data are not there.
    """
    if recipe.eval.suite == ("fidelity",) and recipe.base != MINIATURE and not recipe.eval.reference:
        raise UsageError(f"--suite fidelity: {NO_TRUTH}")
    if "fidelity" in recipe.eval.suite and recipe.eval.reference:
        open_source(recipe.eval.reference)
    wanted = [name for name in recipe.eval.suite if name != "fidelity"] or ["geneval"]
    scored = set(recipe.eval.suite)
    known = _Known(recipe, digests, memo, device)
    found = []
    for name in wanted:
        if name == "geneval":
            found.append(
                _miniature(recipe, name in scored) if recipe.base == MINIATURE else known.geneval(name in scored)
            )
        else:
            dpg_bench = partial(_miniature_dpg, recipe) if recipe.base == MINIATURE else known.dpg_bench
            found.append(dpg_bench() if name == "dpg-bench" else known.hpsv3())
    return found


def _asked(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """``count`` prompts spread evenly over the suite's order, which is that of its groups; 0 means all."""
    wanted = min(count or len(prompts), len(prompts))
    return [prompts[i] for i in np.linspace(0, len(prompts) - 1, wanted).round().astype(int)]


def _side(recipe: Recipe) -> int:
    if recipe.base == MINIATURE:
        from flux2pixel.miniature.world import SIZE as MINIATURE_SIDE

        return MINIATURE_SIDE
    return recipe.eval.size or SIDE


def _miniature(recipe: Recipe, scored: bool) -> Suite:
    from flux2pixel.evaluate.geneval.promptset import SAMPLES
    from flux2pixel.miniature import judge

    if recipe.eval.size not in (0, _side(recipe)):
        raise UsageError(f"eval.size = {recipe.eval.size}: the miniature draws {_side(recipe)} pixels; leave it out")
    scorer = judge.geneval(SAMPLES)
    asked = _asked(scorer.prompts, recipe.eval.prompts)
    load = partial(judge.geneval, SAMPLES) if scored else None
    return Suite(
        "geneval", scorer.prompts, asked, recipe.eval.samples, _side(recipe), load, scorer.provenance, lambda _: scorer
    )


def _miniature_dpg(recipe: Recipe) -> Suite:
    """DPG-Bench over questions of the miniature's own prompts, answered by its detector."""
    from flux2pixel.miniature.questions import dpg_bench

    scorer = dpg_bench()
    asked, samples = _asked(scorer.prompts, recipe.eval.prompts), recipe.eval.samples
    return Suite(
        "dpg-bench", scorer.prompts, asked, samples, _side(recipe), dpg_bench, scorer.provenance, lambda _: scorer
    )


class _Known:
    """The official suites; what a judge says decided its scores is asked of it once, then remembered."""

    def __init__(self, recipe: Recipe, digests: Digests, memo: Memo, device: str):
        self._recipe, self._settings = recipe, recipe.eval
        self._digests, self._memo, self._device = digests, memo, device
        self._assets = assets_folder(recipe)

    def _provenance(
        self, name: str, load: Callable[[], Scorer], options: Mapping[str, Any]
    ) -> Callable[[], dict[str, Any]]:
        folder = self._assets / name

        def ask() -> dict[str, Any]:
            from flux2pixel.evaluate.results import versions

            inputs = {"suite": name, "assets": self._digests.of_model(folder), "versions": versions()}
            found: dict[str, Any] = self._memo.of(
                inputs | {"device": self._device.split(":")[0]} | dict(options), lambda: load().provenance()
            )
            return found

        if not folder.is_dir() and not options.get("judge"):
            raise UsageError(f"{folder}: absent; get it with flux2pixel eval --suite {name} --fetch")
        return ask

    def _suite(
        self,
        name: str,
        prompts: Sequence[Prompt],
        load: Callable[[], Scorer],
        sum_up: Callable[[dict[str, Any]], Scorer],
        scored: bool = True,
        **options: Any,
    ) -> Suite:
        # One loaded scorer serves the provenance and the scoring.
        loaded: list[Scorer] = []

        def once() -> Scorer:
            if not loaded:
                loaded.append(load())
            return loaded[0]

        options |= {"prompts": settings_digest({"rows": [[p.id, p.text, dict(p.data)] for p in prompts]})}
        provenance = self._provenance(name, once, options) if scored else dict
        asked = _asked(prompts, self._settings.prompts)
        side = (
            0 if name == "hpsv3" and not self._settings.size and self._recipe.base != MINIATURE else _side(self._recipe)
        )
        return Suite(name, prompts, asked, self._settings.samples, side, once if scored else None, provenance, sum_up)

    def geneval(self, scored: bool) -> Suite:
        from flux2pixel.evaluate.geneval import GenEval

        own = Path(self._settings.prompt_file) if self._settings.prompt_file else None
        prompts = open_scorers.geneval_prompts(own)
        load = partial(open_scorers.geneval, self._assets, self._device, prompts)

        def sum_up(decided: dict[str, Any]) -> Scorer:
            return GenEval(prompts, Judge(decided["judge"], decided["detector"]))

        return self._suite("geneval", prompts, load, sum_up, scored)

    def dpg_bench(self) -> Suite:
        from flux2pixel.evaluate.dpg_bench import DpgBench

        own = Path(self._settings.prompt_file) if self._settings.prompt_file else None
        prompts, blob = open_scorers.dpg_bench_prompts(self._assets, own)
        judge = self._settings.dpg_judge
        load = partial(open_scorers.dpg_bench, self._assets, self._device, prompts, blob, judge)

        def sum_up(decided: dict[str, Any]) -> Scorer:
            return DpgBench(prompts, Judge(decided["judge"], decided["vqa"]), blob)

        return self._suite("dpg-bench", prompts, load, sum_up, judge=judge)

    def hpsv3(self) -> Suite:
        from flux2pixel.evaluate.hpsv3 import Hpsv3

        script = self._settings.hpsv3_text == "script"
        prompts = open_scorers.hpsv3_prompts(self._assets)
        load = partial(open_scorers.hpsv3, self._assets, self._device, prompts, script)

        def sum_up(decided: dict[str, Any]) -> Scorer:
            return Hpsv3(prompts, Judge(decided["judge"], decided["reward"] | {"name": decided["judge"]}), script)

        return self._suite("hpsv3", prompts, load, sum_up, text=self._settings.hpsv3_text)
