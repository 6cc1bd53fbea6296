"""The eval stage: encode the prompts, draw with each model, then score, and write ``report.html`` and ``report.json``.

Text encoders, models and judges are in memory one after the other, never together. Everything is kept under the
digests of what decided it (``<run>/eval/{texts,images,scores}``), so a run that was stopped goes on, and one that was
complete does no model work when repeated.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flux2pixel.evaluate import drawing, layout, results
from flux2pixel.evaluate.columns import Candidate, Weights, candidate, named
from flux2pixel.evaluate.drawing import Clock, Order
from flux2pixel.evaluate.fidelity.compare import compare_with_images, compare_with_renders
from flux2pixel.evaluate.layout import ImageFile
from flux2pixel.evaluate.report.build import Gallery, for_readers, write_report
from flux2pixel.evaluate.report.claims import claims
from flux2pixel.evaluate.report.comparable import comparable
from flux2pixel.evaluate.results import Outcome
from flux2pixel.evaluate.store import Digests, Entry, Key, Ledger, Memo, Texts
from flux2pixel.evaluate.suite import Sample
from flux2pixel.evaluate.suites import NO_TRUTH, Suite, has_truth, open_suites
from flux2pixel.models import base as bases
from flux2pixel.models.offload import Offload, Quantize
from flux2pixel.recipe import Recipe
from flux2pixel.runtime import device as devices
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.launch import set_threads
from flux2pixel.runtime.processes import Team, join
from flux2pixel.runtime.progress import bar, log

SHOWN = 20  # faults printed one by one; the rest is counted
FEW = 2048  # images below which Inception's covariance, of as many dimensions, cannot be filled


def evaluate(
    recipe: Recipe,
    run: Path,
    models: Sequence[str] = (),
    out: Path | None = None,
    images: Sequence[str] = (),
    *,
    matched: bool = False,
    dtype: torch.dtype | None = None,
    offload: Offload | None = None,
    quantize: Quantize | None = None,
) -> Path:
    """Score models and folders of images side by side; returns the path of the page, report.json is beside it.

    ``models`` are ``[name=]folder[+adapter]`` (none and no ``images``: base, converted and finetuned of the run),
    ``images`` are ``[name=]folder`` in a suite's official layout; ``matched`` as in `columns.candidate`; ``dtype``,
    ``offload`` and ``quantize`` of what draws, as in `open_model`. Under torchrun the work is shared and the first
    process writes the report. Raises UsageError before any work for what no run can mend.
    """
    set_threads(recipe.threads)
    with join(device=recipe.device) as team:
        return _evaluate(recipe, run, models, out, images, matched, Weights(dtype, offload, quantize), team)


def _evaluate(
    recipe: Recipe,
    run: Path,
    models: Sequence[str],
    out: Path | None,
    images: Sequence[str],
    matched: bool,
    weights: Weights,
    team: Team,
) -> Path:
    started, place, home = time.perf_counter(), team.device, run / "eval"
    digests, texts = Digests(home / "digests.json"), Texts(home / "texts")
    memo = Memo(home / "scores" / f"sets.{team.rank}.json")
    suites = open_suites(recipe, digests, memo, str(place))
    candidates = _candidates(recipe, run, models, images, digests, texts, place, matched, weights)
    tasks = [Task(one, suite, recipe, home, digests, team) for one in candidates for suite in suites]
    if team.leads:
        _announce(recipe, candidates, place)
    _encode(tasks, texts, team)
    for one in candidates:
        _draw(one, [task for task in tasks if task.candidate is one])
    team.barrier()
    for suite in suites:
        _score(suite, [task for task in tasks if task.suite is suite])
    digests.save()
    page = out or run / "report.html"
    team.barrier()
    if team.leads:
        outcomes = [task.collect() for task in tasks]
        report = _report(recipe, run, outcomes, memo, digests, place)
        report["seconds"] = results.seconds(run, time.perf_counter() - started)
        report = for_readers(report, run)
        files.write_json(page.with_suffix(".json"), report)
        write_report(report, Gallery(results.shots(outcomes), home / "sheets", digests), page)
        digests.save()
        for line in results.lines(report):
            log(line)
        log(f"wrote {page}")
    return page


def check(
    recipe: Recipe,
    run: Path,
    models: Sequence[str],
    images: Sequence[str],
    *,
    matched: bool = False,
    dtype: torch.dtype | None = None,
    offload: Offload | None = None,
    quantize: Quantize | None = None,
) -> None:
    """Raise UsageError for what `evaluate` would refuse; loads no weights and writes nothing but digests."""
    home, place = run / "eval", devices.choose(recipe.device)
    digests = Digests(home / "digests.json")
    suites = open_suites(recipe, digests, Memo(home / "scores" / "sets.0.json"), "cpu")
    weights, texts = Weights(dtype, offload, quantize), Texts(home / "texts")
    for one in _candidates(recipe, run, models, images, digests, texts, place, matched, weights):
        for suite in suites:
            Task(one, suite, recipe, home, digests)
    digests.save()


def _candidates(
    recipe: Recipe,
    run: Path,
    models: Sequence[str],
    images: Sequence[str],
    digests: Digests,
    texts: Texts,
    place: torch.device,
    matched: bool,
    weights: Weights,
) -> list[Candidate]:
    """What is compared, in order; two columns of one name are refused."""
    if not models and not images:
        models = [str(bases.resolve(recipe.base))]
        models += [
            str(run / name)
            for name in ("converted", "readout", "finetuned")
            if (run / name / "asymflow.json").is_file()
        ]
    found = [candidate(text, recipe, run, digests, texts, place, matched, weights) for text in models]
    for text in images:
        name, word = named(text)
        folder = Path(word)
        if not folder.is_dir():
            raise UsageError(f"--images {text}: no such folder")
        found.append(Candidate(name or folder.name, folder, "images"))
    seen: dict[str, Path] = {}
    for one in found:
        if one.name in seen:
            raise UsageError(f"{one.path} and {seen[one.name]} are both called {one.name}; name one: other={one.path}")
        seen[one.name] = one.path
    return found


def _announce(recipe: Recipe, candidates: Sequence[Candidate], place: torch.device) -> None:
    if "fidelity" in recipe.eval.suite and not has_truth(recipe):
        log(f"eval: fidelity is left out: {NO_TRUTH}")
    if "fidelity" in recipe.eval.suite and recipe.eval.reference and recipe.eval.fidelity_images < FEW:
        log(
            f"eval: FID of {recipe.eval.fidelity_images} images (eval.fidelity_images) is biased and compares with no "
            f"published figure; it takes {FEW} and more. KID is not biased"
        )
    log("eval: " + ", ".join(f"{c.name} {c.path}" for c in candidates))
    log(f"eval: draws and scores on {devices.describe(place)}")


class Task:
    """The work of one candidate in one suite; ``home`` holds images/ and scores/ of the run.

    A process's share of the files is fixed, so processes need not agree on what is done.
    """

    def __init__(
        self,
        candidate: Candidate,
        suite: Suite,
        recipe: Recipe,
        home: Path,
        digests: Digests,
        team: Team | None = None,
    ):
        self.candidate, self.suite, self._digests = candidate, suite, digests
        self._team = team or Team()
        self._folder = home / "images" / candidate.name / suite.name
        self._scores = home / "scores" / candidate.name
        self.order, self._batch = None, recipe.eval.batch
        if candidate.open is None:
            self.files = _foreign(candidate, suite, sized=recipe.eval.size > 0)
        else:
            self.order = Order(candidate.digest, candidate.settings, recipe.seed, suite.places, suite.size_of)
            self.files = layout.image_files(suite.name, self._folder, suite.asked, suite.samples)

    @cached_property
    def stale(self) -> set[Path]:
        """The files to draw, of all processes; asked before any of them is drawn."""
        return {file.path for file in drawing.stale(self.order, self.files)} if self.order else set()

    @cached_property
    def work(self) -> list[list[ImageFile]]:
        """This process's share of what is missing, in batches."""
        if self.order is None:
            return []
        mine = self._team.share(drawing.batches(self.order, self.files, self._batch))
        return [rest for group in mine if (rest := [file for file in group if file.path in self.stale])]

    def draw(self, drawer: drawing.Drawer) -> None:
        """Draw this process's share of what is missing."""
        work, clock, total = self.work, Clock(), sum(len(file.indices) for group in self.work for file in group)
        if self.order is None or not total:
            return
        layout.write_companions(self.suite.name, self._folder, [f.prompt for group in work for f in group])
        with bar(f"{self.suite.name} {self.candidate.name}", total) as progress:
            for images in drawing.draw(self.order, work, drawer, self._batch, clock):
                progress.advance(images)
        speed = {"seconds_per_image": clock.seconds / clock.images, "images": clock.images}
        files.write_json(self._scores / f"{self.suite.name}.speed.{self._team.rank}.json", speed)

    def score(self) -> None:
        """Judge this process's share of what has no record yet; each record is kept at once."""
        ledger = self._ledger()
        mine = [sample for file in self._team.share(self.files) for sample in self._samples(file)]
        waiting = [sample for sample in mine if ledger.get(self._key(sample)) is None]
        if not waiting:
            return
        with bar(f"{self.suite.name} {self.candidate.name}, scores", len(waiting)) as progress:
            for sample, record in zip(waiting, self.suite.judge.score(waiting), strict=True):
                ledger.add(Entry(self._digests.of_file(sample.path), self.suite.digest, record))
                progress.advance()

    def collect(self) -> Outcome:
        """Read back every sample and record, of all processes; the ledger is settled to what counts."""
        outcome = Outcome(self.candidate, self.suite)
        outcome.samples = [sample for file in self.files for sample in self._samples(file)]
        speeds = [json.loads(path.read_text()) for path in sorted(self._scores.glob(f"{self.suite.name}.speed.*.json"))]
        if images := sum(speed["images"] for speed in speeds):
            outcome.seconds_per_image = sum(s["seconds_per_image"] * s["images"] for s in speeds) / images
        if self.suite.open_judge is None:
            return outcome
        ledger, keys = self._ledger(), [self._key(sample) for sample in outcome.samples]
        found = [(key, record) for key in keys if (record := ledger.get(key)) is not None]
        ledger.settle([key for key, _ in found])
        outcome.records = [record for _, record in found]
        return outcome

    def _ledger(self) -> Ledger:
        return Ledger(self._scores / f"{self.suite.name}.jsonl", self._team.rank)

    def _samples(self, file: ImageFile) -> list[Sample]:
        return file.samples(self.suite.size_of(file.prompt))

    def _key(self, sample: Sample) -> Key:
        """What a sample's record is kept under."""
        return (self._digests.of_file(sample.path), self.suite.digest, sample.prompt.id, sample.index)


def _foreign(candidate: Candidate, suite: Suite, sized: bool) -> list[ImageFile]:
    """Images made elsewhere, refused whole if any would be scored wrongly; ``sized``: eval.size says a sample's size.

    Of grids it must: cut at another size, their samples would be parts of pictures.
    """
    folder = candidate.path / suite.name if (candidate.path / suite.name).is_dir() else candidate.path
    found = layout.read_folder(suite.name, folder, suite.asked, (suite.side, suite.side) if sized else None)
    for line in [*found.faults[:SHOWN], *found.missing[:SHOWN]]:
        log(line)
    for lines, what in ((found.faults, "faults"), (found.missing, "prompts with missing images")):
        if len(lines) > SHOWN:
            log(f"{folder}: {len(lines)} {what}, {len(lines) - SHOWN} not shown")
    if found.faults:
        raise UsageError(
            f"--images {folder}: {len(found.faults)} files would be scored wrongly (above); nothing was scored"
        )
    if not found.files:
        raise UsageError(f"--images {folder}: holds no image of {suite.name} in its official layout")
    if found.missing:
        log(f"{folder}: images are missing, so {suite.name} is partial and has no overall")
    return found.files


def _encode(tasks: Sequence[Task], texts: Texts, team: Team) -> None:
    """Encode what will be drawn, once for all models of one encoder, each process its share; then let it go."""
    wanted: dict[str, list[str]] = {}
    for task in tasks:
        if task.candidate.encoder and task.stale:
            asked = [file.prompt.text for file in task.files if file.path in task.stale]
            wanted.setdefault(task.candidate.encoder, [""]).extend(asked)
    todo = {encoder: texts.missing(encoder, prompts) for encoder, prompts in wanted.items()}
    team.barrier()  # every process has the same list before any adds to it
    openers = {task.candidate.encoder: task.candidate.encode for task in tasks if task.candidate.encode is not None}
    for encoder, chunks in todo.items():
        if mine := team.share(chunks):
            encode = openers[encoder]()
            with bar("text", sum(map(len, mine))) as progress:
                for chunk in mine:
                    texts.add(encoder, chunk, encode)
                    progress.advance(len(chunk))
            del encode
            _free()
    team.barrier()


def _draw(one: Candidate, tasks: Sequence[Task]) -> None:
    """Draw all of one candidate; its weights are loaded only if something is missing, and let go."""
    if one.open is None or not any(task.work for task in tasks):
        return
    drawer = one.open()
    for task in tasks:
        task.draw(drawer)
    drawer.close()
    _free()


def _score(suite: Suite, tasks: Sequence[Task]) -> None:
    """Score all candidates in one suite; its judge is opened only if something has no record, and let go."""
    if suite.open_judge is not None:
        for task in tasks:
            task.score()
        suite.close()
        _free()


def _free() -> None:
    """Give back the memory of what was let go."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _report(
    recipe: Recipe, run: Path, outcomes: list[Outcome], memo: Memo, digests: Digests, place: torch.device
) -> dict[str, Any]:
    report = results.rows(recipe, outcomes)
    if drawn := [one for one in outcomes if one.suite.name == "geneval"]:
        compare_with_renders(recipe, report, drawn, memo, digests)
    if "fidelity" in recipe.eval.suite and recipe.eval.reference:
        compare_with_images(recipe, report, outcomes, memo, digests, place)
    report["paired"] = results.paired(outcomes)
    report |= results.earlier(run)
    report["comparable"] = comparable(report["models"])
    report["claims"] = claims(report)
    report["prompts"] = results.prompt_rows(outcomes)
    return report
