"""The eval stage: draw what is missing, score beside it, and write ``report.html`` and ``report.json``.

Everything is kept under the digests of what decided it (``<run>/eval/images``, ``<run>/eval/scores``), so a run that
was stopped goes on, and one that was complete does no model work when repeated.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flux2pixel.evaluate import results
from flux2pixel.evaluate.columns import Candidate, candidate, named
from flux2pixel.evaluate.digests import Digests
from flux2pixel.evaluate.fidelity.compare import compare_with_images, compare_with_renders
from flux2pixel.evaluate.memo import Memo
from flux2pixel.evaluate.report.build import Gallery, write_report
from flux2pixel.evaluate.report.claims import claims
from flux2pixel.evaluate.report.comparable import comparable
from flux2pixel.evaluate.report.pictures import basis_vectors
from flux2pixel.evaluate.report.tables import KEYS
from flux2pixel.evaluate.run_suite import Outcome, Task
from flux2pixel.evaluate.suite import Sample
from flux2pixel.evaluate.suites import MINIATURE, NO_TRUTH, open_suites
from flux2pixel.evaluate.texts import Texts
from flux2pixel.miniature import world
from flux2pixel.models import base as bases
from flux2pixel.recipe import Recipe, as_dict
from flux2pixel.runtime import device, files
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.launch import set_threads
from flux2pixel.runtime.processes import Team, join
from flux2pixel.runtime.progress import log


def evaluate(
    recipe: Recipe,
    run: Path,
    models: Sequence[str] = (),
    out: Path | None = None,
    images: Sequence[str] = (),
) -> Path:
    """Score models and folders of images side by side; returns the path of the page, report.json is beside it.

    ``models`` are ``[name=]folder[+adapter]`` (none and no ``images``: base, converted and finetuned of the run),
    ``images`` are ``[name=]folder`` in a suite's official layout. Under torchrun the work is shared and the first
    process writes the report. Raises UsageError before any work for what no run can mend.
    """
    set_threads(recipe.threads)
    with join() as team:
        return _evaluate(recipe, run, models, out, images, team)


def _evaluate(
    recipe: Recipe, run: Path, models: Sequence[str], out: Path | None, images: Sequence[str], team: Team
) -> Path:
    started, place = time.perf_counter(), team.device
    home = run / "eval"
    digests, texts, memo = (
        Digests(home / "digests.json"),
        Texts(),
        Memo(home / "scores" / f"sets.{team.rank}.json"),
    )
    suites = open_suites(recipe, digests, memo, str(place))
    candidates = _candidates(recipe, run, models, images, digests, texts)
    tasks = [
        Task(c, suite, recipe.seed, home, digests, team.rank, recipe.eval.size > 0)
        for c in candidates
        for suite in suites
    ]
    if team.leads:
        if "fidelity" in recipe.eval.suite and recipe.base != MINIATURE and not recipe.eval.reference:
            log(f"eval: fidelity is left out: {NO_TRUTH}")
        log("eval: " + ", ".join(f"{c.name} {c.path}" for c in candidates))
        log(f"eval: draws and scores on {device.describe(place)}")
    for one in candidates:
        _work(one, [task for task in tasks if task.candidate is one], recipe, team, texts)
    digests.save()
    page = out or run / "report.html"
    team.barrier()
    if team.leads:
        outcomes = [task.collect() for task in tasks]
        report = _report(recipe, run, outcomes, memo, digests, place)
        report["seconds"] = _seconds(run, time.perf_counter() - started)
        gallery = Gallery(_shots(outcomes), home / "sheets", digests)
        files.write_json(page.with_suffix(".json"), report)
        write_report(report, gallery, page)
        digests.save()
        for line in _lines(report):
            log(line)
        log(f"wrote {page}")
    return page


def check(recipe: Recipe, run: Path, models: Sequence[str], images: Sequence[str]) -> None:
    """Raise UsageError for what `evaluate` would refuse; loads no weights and writes nothing but digests."""
    digests = Digests(run / "eval" / "digests.json")
    suites = open_suites(recipe, digests, Memo(run / "eval" / "scores" / "sets.0.json"), "cpu")
    for one in _candidates(recipe, run, models, images, digests, Texts()):
        for suite in suites:
            Task(one, suite, recipe.seed, run / "eval", digests, sized=recipe.eval.size > 0)
    digests.save()


def _candidates(
    recipe: Recipe, run: Path, models: Sequence[str], images: Sequence[str], digests: Digests, texts: Texts
) -> list[Candidate]:
    """What is compared, in order; two columns of one name are refused."""
    if not models and not images:
        models = [str(bases.resolve(recipe.base))]
        models += [str(run / name) for name in ("converted", "finetuned") if (run / name / "asymflow.json").is_file()]
    found = [candidate(text, recipe, run, digests, texts) for text in models]
    for text in images:
        name, place = named(text)
        folder = Path(place)
        if not folder.is_dir():
            raise UsageError(f"--images {text}: no such folder")
        found.append(Candidate(name or folder.name, folder, "images"))
    seen: dict[str, Path] = {}
    for one in found:
        if one.name in seen:
            raise UsageError(f"{one.path} and {seen[one.name]} are both called {one.name}; name one: other={one.path}")
        seen[one.name] = one.path
    return found


def _work(one: Candidate, tasks: Sequence[Task], recipe: Recipe, team: Team, texts: Texts) -> None:
    """Draw and score one candidate in every suite; its weights are loaded only if something is to be drawn."""
    drawer = None
    for task in tasks:
        work = task.plan(team, recipe.eval.batch)
        if work.draw:
            texts.expect(["", *(file.prompt.text for group in work.draw for file in group)])
            if drawer is None and one.open is not None:
                drawer = one.open()
        task.run(work, drawer, recipe.eval.batch)
    del drawer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _report(
    recipe: Recipe, run: Path, outcomes: list[Outcome], memo: Memo, digests: Digests, place: torch.device
) -> dict[str, Any]:
    report: dict[str, Any] = {"base": recipe.base, "models": {}, "settings": as_dict(recipe)}
    report["versions"] = results.versions()
    for outcome in outcomes:
        one = outcome.candidate
        row = report["models"].setdefault(one.name, {"path": str(one.path), "kind": one.kind, "digest": one.digest})
        if one.open is not None:
            row["steps"] = recipe.sample.steps
            row["generation"] = dict(one.settings) | {"seed": recipe.seed}
        if outcome.seconds_per_image is not None:
            row["seconds_per_image"] = outcome.seconds_per_image
        if outcome.suite.load is not None:
            row[KEYS[outcome.suite.name]] = results.suite_figures(outcome, recipe)
    if recipe.base == MINIATURE and (drawn := [one for one in outcomes if one.suite.name == "geneval"]):
        compare_with_renders(recipe, report, drawn, memo, digests)
    if "fidelity" in recipe.eval.suite and recipe.eval.reference:
        compare_with_images(recipe, report, outcomes, memo, digests, place)
    report["paired"] = results.paired(outcomes)
    report |= _provenance(run)
    report["comparable"] = comparable(report["models"])
    report["claims"] = claims(report)
    report["prompts"] = results.prompt_rows(outcomes, world.HELD_OUT if recipe.base == MINIATURE else None)
    return report


def _shots(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], dict[str, list[Sample]]]:
    found: dict[tuple[str, str], dict[str, list[Sample]]] = {}
    for outcome in outcomes:
        for sample in outcome.samples:
            row = found.setdefault((outcome.suite.name, sample.prompt.id), {})
            row.setdefault(outcome.candidate.name, []).append(sample)
    return found


def _provenance(run: Path) -> dict[str, Any]:
    """Exactness, basis and training figures that the earlier stages left in the run directory."""
    found: dict[str, Any] = {}
    conversion, training = run / "converted" / "conversion.json", run / "finetuned" / "finetune.json"
    if conversion.is_file():
        found["exactness"] = json.loads(conversion.read_text())["exactness"]
    if (run / "subspace.json").is_file():
        found["basis"] = json.loads((run / "subspace.json").read_text())
        found["basis"]["vectors"] = basis_vectors(run / "subspace.safetensors", count=16)
    if training.is_file():
        record = json.loads(training.read_text())
        found["training"] = {"curve": record["curve"], "images_seen": record["images_seen"]}
    return found


def _seconds(run: Path, mine: float) -> dict[str, float]:
    path = run / "seconds.json"
    seconds = json.loads(path.read_text()) if path.is_file() else {}
    seconds["eval"] = mine
    seconds["total"] = sum(seconds.get(k, 0.0) for k in ("fit_subspace", "convert", "finetune", "eval"))
    return seconds


def _lines(report: dict[str, Any]) -> list[str]:
    """One line a model for the terminal."""
    lines = []
    for name, row in report["models"].items():
        parts = []
        for suite, key in KEYS.items():
            if key in row:
                cell = row[key].get("overall")
                lost = results.missing_count(row[key])
                shown = (
                    f"{cell['score']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
                    if cell
                    else f"partial, {lost} missing"
                )
                parts.append(f"{suite} {shown}")
        if "texture_frechet" in row.get("fidelity", {}):
            parts.append(f"texture Fréchet {row['fidelity']['texture_frechet']:.4f}")
        if "inception_fid" in row.get("fidelity", {}):
            parts.append(f"FID {row['fidelity']['inception_fid']:.2f}")
        if "seconds_per_image" in row:
            parts.append(f"{row['seconds_per_image']:.3f} s per image")
        lines.append(f"{name:>10}: {', '.join(parts)}")
    return lines
