"""The suites of a run: their prompts, which are asked and at what size, who judges, and how records are summed up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flux2pixel.data import open_source
from flux2pixel.evaluate import dpg_bench, geneval, hpsv3, open_scorers
from flux2pixel.evaluate.assets.fetch import default_folder
from flux2pixel.evaluate.png import settings_digest
from flux2pixel.evaluate.store import Digests, Memo, versions
from flux2pixel.evaluate.suite import Judge, Prompt, Record, Size
from flux2pixel.families import registry
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.errors import UsageError

NO_TRUTH = "no true images to compare with; name a folder of them with --reference (eval.reference)"
SIDE = 1024  # of an image where recipe and suite say nothing

Summary = dict[str, Any]


class OwnSuite(Protocol):
    """A suite as a base's plug-in brings it (`registry.Plugin.suites`), in the suite's own file format.

    ``rows`` are GenEval's metadata or DPG-Bench's questions, ``judge`` a `geneval.Detector` or a DPG-Bench judge,
    ``side`` that of an image in pixels, ``held_out`` the prompts that no training image of the base's world has.
    """

    rows: Sequence[Mapping[str, Any]]
    judge: Any
    side: int
    held_out: frozenset[str]


@dataclass
class Suite:
    """One suite of this run.

    ``asked`` are those of the suite's ``prompts`` that this run draws, ``samples`` images each at most, ``side``
    pixels square; with side 0, at the size that the suite gives each prompt.

    ``open_judge`` loads who scores; None where only the images are wanted. ``summarise`` sums records up: ``groups``
    (each score, low, high, prompts, images), counts, ``missing``, and ``overall`` where nothing is missing; UsageError
    for records that are not of this suite, or twice the same. ``remember`` keeps what the judge said decides a score,
    so that a rerun opens none.
    """

    name: str
    prompts: Sequence[Prompt]
    asked: Sequence[Prompt]
    samples: int
    side: int
    open_judge: Callable[[], Judge] | None
    summarise: Callable[[Iterable[Record]], Summary]
    remember: Callable[[Callable[[], Summary]], Summary] = lambda ask: ask()
    held_out: frozenset[str] | None = None
    _judge: list[Judge] = field(default_factory=list)

    @property
    def judge(self) -> Judge:
        """Who scores, opened when first needed."""
        if self.open_judge is None:
            raise UsageError(f"{self.name}: was not asked for")
        if not self._judge:
            self._judge.append(self.open_judge())
        return self._judge[0]

    def close(self) -> None:
        """Let the judge's networks go."""
        self._judge.clear()

    @cached_property
    def decided_by(self) -> dict[str, Any]:
        """What decides a score beside the image; empty where nothing is scored."""
        return self.remember(lambda: self.judge.provenance()) if self.open_judge is not None else {}

    @cached_property
    def digest(self) -> str:
        """Digest of all that decides a score beside the image."""
        return settings_digest(self.decided_by)

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Every prompt's number in the suite."""
        return {prompt.id: place for place, prompt in enumerate(self.prompts)}

    def size_of(self, prompt: Prompt) -> Size:
        """(height, width) that the prompt's images are drawn at."""
        if self.side:
            return (self.side, self.side)
        height, width = prompt.data["size"]
        return (int(height), int(width))


def assets_folder(recipe: Recipe) -> Path:
    """Where the judges' weights and data lie."""
    return Path(recipe.eval.assets) if recipe.eval.assets else default_folder()


def open_suites(recipe: Recipe, digests: Digests, memo: Memo, device: str) -> list[Suite]:
    """The suites that the recipe names; for fidelity alone, GenEval's images without its judge.

    A base that brings a suite of its own is judged by that. Loads no network. Raises UsageError, with what to fetch,
    if a suite's weights or data are not there.
    """
    if recipe.eval.suite == ("fidelity",) and not has_truth(recipe):
        raise UsageError(f"--suite fidelity: {NO_TRUTH}")
    if "fidelity" in recipe.eval.suite and recipe.eval.reference:
        open_source(recipe.eval.reference)
    plugin = registry.plugin(recipe.base)
    own: dict[str, OwnSuite] = {name: load() for name, load in plugin.suites.items()} if plugin else {}
    side = next((suite.side for suite in own.values()), 0)
    if side and recipe.eval.size not in (0, side):
        raise UsageError(f"eval.size = {recipe.eval.size}: {recipe.base} draws {side} pixels; leave it out")
    found = []
    for name in [name for name in recipe.eval.suite if name != "fidelity"] or ["geneval"]:
        suite = _own(name, own[name], recipe) if name in own else _official(name, recipe, digests, memo, device, side)
        if name not in recipe.eval.suite:
            suite.open_judge = None
        found.append(suite)
    return found


def has_truth(recipe: Recipe) -> bool:
    """Whether there are true images to compare with, the user's or the base's own."""
    plugin = registry.plugin(recipe.base)
    return bool(recipe.eval.reference) or (plugin is not None and plugin.truth is not None)


def _asked(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """``count`` prompts spread evenly over the suite's order, which is that of its groups; 0 means all."""
    wanted = min(count or len(prompts), len(prompts))
    return [prompts[i] for i in np.linspace(0, len(prompts) - 1, wanted).round().astype(int)]


def _own(name: str, own: OwnSuite, recipe: Recipe) -> Suite:
    """The suite's real code over the prompts and the judge of the base's own world."""
    if name == "geneval":
        prompts = geneval.prompts([dict(row) for row in own.rows])
        judge: Callable[[], Judge] = lambda: geneval.GenEval(prompts, own.judge)  # noqa: E731
        summarise = partial(geneval.summarise, prompts)
    else:
        prompts = dpg_bench.prompts(own.rows)
        judge = lambda: dpg_bench.DpgBench(prompts, own.judge, "")  # noqa: E731
        summarise = partial(dpg_bench.summarise, prompts)
    asked = _asked(prompts, recipe.eval.prompts)
    return Suite(name, prompts, asked, recipe.eval.samples, own.side, judge, summarise, held_out=own.held_out)


def _official(name: str, recipe: Recipe, digests: Digests, memo: Memo, device: str, side: int) -> Suite:
    """A suite with the official judge, whose weights lie in the assets folder."""
    settings, assets = recipe.eval, assets_folder(recipe)
    text = Path(settings.prompt_file) if settings.prompt_file else None
    options: dict[str, Any] = {}
    summarise: Callable[[Iterable[Record]], Summary]
    if name == "geneval":
        prompts = open_scorers.geneval_prompts(text)
        judge = partial(open_scorers.geneval, assets, device, prompts)
        summarise = partial(geneval.summarise, prompts)
    elif name == "dpg-bench":
        prompts, blob = open_scorers.dpg_bench_prompts(assets, text)
        options = {"judge": settings.dpg_judge}
        judge = partial(open_scorers.dpg_bench, assets, device, prompts, blob, settings.dpg_judge)
        summarise = partial(dpg_bench.summarise, prompts)
    else:
        prompts, script = open_scorers.hpsv3_prompts(assets), settings.hpsv3_text == "script"
        options = {"text": settings.hpsv3_text}
        judge = partial(open_scorers.hpsv3, assets, device, prompts, script)
        summarise = partial(hpsv3.summarise, prompts, script_text=script)
    scored = name in settings.suite
    if scored and not any((assets / name).glob("*")) and not options.get("judge"):
        raise UsageError(f"{assets / name}: absent; get it with flux2pixel eval --suite {name} --fetch")

    def remember(ask: Callable[[], Summary]) -> Summary:
        rows = settings_digest({"rows": [[p.id, p.text, dict(p.data)] for p in prompts]})
        inputs = {"suite": name, "assets": digests.of_model(assets / name), "versions": versions(), "prompts": rows}
        found: Summary = memo.of(inputs | {"device": device.split(":")[0]} | options, ask)
        return found

    side = settings.size or side or (0 if name == "hpsv3" else SIDE)
    return Suite(
        name, prompts, _asked(prompts, settings.prompts), settings.samples, side, judge, summarise, remember
    )  # fmt: skip
