"""From outcomes to report.json: summaries, paired differences, every prompt's verdicts, and what decided them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux2pixel.evaluate.columns import Candidate
from flux2pixel.evaluate.report.pictures import basis_vectors
from flux2pixel.evaluate.report.tables import KEYS
from flux2pixel.evaluate.statistics import difference
from flux2pixel.evaluate.store import versions
from flux2pixel.evaluate.suite import Prompt, Record, Sample
from flux2pixel.evaluate.suites import Suite
from flux2pixel.recipe import Recipe, as_dict

UNKNOWN = "unknown: images made elsewhere"


@dataclass
class Outcome:
    """A candidate's images in a suite and what they scored."""

    candidate: Candidate
    suite: Suite
    samples: list[Sample] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    seconds_per_image: float | None = None


def rows(recipe: Recipe, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The report without fidelity and what follows from all of it.

    A model's ``generation`` says how it was drawn: its column's settings, the seed, and the sizes suite by suite.
    """
    report: dict[str, Any] = {"base": recipe.base, "models": {}, "settings": as_dict(recipe), "versions": versions()}
    for outcome in outcomes:
        one = outcome.candidate
        row = report["models"].setdefault(one.name, {"path": str(one.path), "kind": one.kind, "digest": one.digest})
        if one.open is not None:
            row["steps"] = one.settings.get("steps")  # None: the pipeline's own
            drawn = row.setdefault("generation", dict(one.settings) | {"seed": recipe.seed, "sizes": {}})
            drawn["sizes"][outcome.suite.name] = _sizes(outcome)
        if outcome.seconds_per_image is not None:
            row["seconds_per_image"] = outcome.seconds_per_image
        if outcome.suite.open_judge is not None:
            row[KEYS[outcome.suite.name]] = suite_figures(outcome, recipe)
    return report


def suite_figures(outcome: Outcome, recipe: Recipe) -> dict[str, Any]:
    """A suite's part of a model in report.json: its summary, and ``protocol`` with all that decided it."""
    summary = dict(outcome.suite.summarise(outcome.records))
    if outcome.suite.name == "geneval":
        summary["tags"] = summary.pop("groups")
    summary["protocol"] = outcome.suite.decided_by | {
        "sizes": _sizes(outcome),
        "seed": recipe.seed if outcome.candidate.open else UNKNOWN,
        "prompts_rewritten": bool(recipe.eval.prompt_file) if outcome.candidate.open else UNKNOWN,
    }
    return summary


def _sizes(outcome: Outcome) -> dict[str, int]:
    """How many prompts are drawn at each size, as people write it: width x height."""

    def named(prompt: Prompt) -> str:
        height, width = outcome.suite.size_of(prompt)
        return f"{width}x{height}"

    return dict(Counter(map(named, outcome.suite.asked)))


def paired(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Every model against the first one, suite by suite, as ``{"<model>-<first>": {suite: difference}}``."""
    found: dict[str, dict[str, Any]] = {}
    first: dict[str, Outcome] = {}
    for outcome in outcomes:
        suite = outcome.suite
        if suite.open_judge is None:
            continue
        reference = first.setdefault(suite.name, outcome)
        if reference is outcome:
            continue
        gap = difference(suite.prompts, outcome.records, reference.records, percent=suite.name == "dpg-bench")
        if gap is not None:
            pair = f"{outcome.candidate.name}-{reference.candidate.name}"
            found.setdefault(pair, {})[KEYS[suite.name]] = gap
    return found


def prompt_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Every prompt of every suite with each model's verdicts, in the suites' order."""
    suites = {outcome.suite.name: outcome.suite for outcome in outcomes}
    records: dict[tuple[str, str, str], list[Record]] = {}
    for outcome in outcomes:
        for record in outcome.records:
            records.setdefault((outcome.suite.name, record.prompt, outcome.candidate.name), []).append(record)
    names = list(dict.fromkeys(outcome.candidate.name for outcome in outcomes))
    found = []
    for name, suite in suites.items():
        for prompt in suite.asked:
            row: dict[str, Any] = {"suite": name, "id": prompt.id, "prompt": prompt.text, "tag": prompt.group}
            if suite.held_out is not None:
                row["held_out"] = prompt.text in suite.held_out
            verdicts = {
                model: [_verdict(name, r) for r in records.get((name, prompt.id, model), ())] for model in names
            }
            found.append(row | {"verdicts": {model: given for model, given in verdicts.items() if given}})
    return found


def _verdict(suite: str, record: Record) -> dict[str, Any]:
    if suite == "geneval":
        return {"correct": bool(record.score), "reason": record.reason}
    return {"score": record.score} | ({"reason": record.reason} if record.reason else {})


def missing_count(figures: Mapping[str, Any]) -> int:
    """How many images a suite's summary says are missing."""
    return len(figures.get("missing") or ())


def shots(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], dict[str, list[Sample]]]:
    """Every prompt's images, model by model, for the report's gallery."""
    found: dict[tuple[str, str], dict[str, list[Sample]]] = {}
    for outcome in outcomes:
        for sample in outcome.samples:
            row = found.setdefault((outcome.suite.name, sample.prompt.id), {})
            row.setdefault(outcome.candidate.name, []).append(sample)
    return found


def earlier(run: Path) -> dict[str, Any]:
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


def seconds(run: Path, mine: float) -> dict[str, float]:
    """Seconds of every stage of the run, eval's own with them."""
    path = run / "seconds.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    known["eval"] = mine
    known["total"] = sum(known.get(k, 0.0) for k in ("fit_subspace", "convert", "fit_readout", "finetune", "eval"))
    return known


def lines(report: dict[str, Any]) -> list[str]:
    """One line a model for the terminal."""
    found = []
    for name, row in report["models"].items():
        parts = []
        for suite, key in KEYS.items():
            if key in row:
                cell = row[key].get("overall")
                lost = missing_count(row[key])
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
        found.append(f"{name:>10}: {', '.join(parts)}")
    return found
