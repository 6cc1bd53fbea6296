"""From outcomes to report.json: summaries, paired differences, every prompt's verdicts, and what decided them."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flux2pixel import __version__
from flux2pixel.evaluate.report.tables import KEYS
from flux2pixel.evaluate.run_suite import Outcome
from flux2pixel.evaluate.statistics import mean_interval, tag_mean_interval
from flux2pixel.evaluate.suite import Prompt, Record
from flux2pixel.evaluate.suites import Suite
from flux2pixel.recipe import Recipe

UNKNOWN = "unknown: images made elsewhere"
LIBRARIES = ("torch", "diffusers", "transformers", "open_clip_torch", "safetensors", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of what computes: this package, Python and the libraries."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"flux2pixel": __version__, "python": platform.python_version()} | found


def suite_figures(outcome: Outcome, recipe: Recipe) -> dict[str, Any]:
    """A suite's part of a model in report.json: its summary, and ``protocol`` with all that decided it."""
    summary = dict(outcome.suite.summariser.summary(outcome.records))
    if outcome.suite.name == "geneval":
        summary["tags"] = summary.pop("groups")
    summary["protocol"] = outcome.suite.decided_by | {
        "sizes": dict(Counter(_size(outcome, prompt) for prompt in outcome.suite.asked)),
        "seed": recipe.seed if outcome.candidate.open else UNKNOWN,
        "prompts_rewritten": bool(recipe.eval.prompt_file) if outcome.candidate.open else UNKNOWN,
    }
    return summary


def _size(outcome: Outcome, prompt: Prompt) -> str:
    width, height = outcome.suite.size_of(prompt)
    return f"{width}x{height}"


def by_prompt(outcome: Outcome) -> dict[str, float]:
    """Mean score of each prompt over its images."""
    rows: dict[str, list[float]] = {}
    for record in outcome.records:
        rows.setdefault(record.prompt, []).append(record.score)
    return {key: float(np.mean(scores)) for key, scores in rows.items()}


def difference(suite: Suite, ours: Outcome, theirs: Outcome) -> dict[str, float] | None:
    """Our score minus theirs over the prompts that both have, with its 95 % interval; None if there are none.

    The mean is the suite's own: of the groups' means, or, for DPG-Bench, of the items times 100.
    """
    mine, other = by_prompt(ours), by_prompt(theirs)
    gaps = [
        (prompt.group, mine[prompt.id] - other[prompt.id])
        for prompt in suite.prompts
        if prompt.id in mine.keys() & other.keys()
    ]
    if not gaps:
        return None
    if suite.name == "dpg-bench":
        found = [100 * value for value in mean_interval([[gap] for _, gap in gaps])]
    else:
        grouped: dict[str, list[float]] = {}
        for group, gap in gaps:
            grouped.setdefault(group, []).append(gap)
        found = list(tag_mean_interval(grouped))
    return dict(zip(("difference", "low", "high"), found, strict=True)) | {"prompts": len(gaps)}


def paired(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Every model against the first one, suite by suite, as ``{"<model>-<first>": {suite: difference}}``."""
    found: dict[str, dict[str, Any]] = {}
    first: dict[str, Outcome] = {}
    for outcome in outcomes:
        name = outcome.suite.name
        if outcome.suite.load is None:
            continue
        reference = first.setdefault(name, outcome)
        if reference is outcome:
            continue
        gap = difference(outcome.suite, outcome, reference)
        if gap is not None:
            pair = f"{outcome.candidate.name}-{reference.candidate.name}"
            found.setdefault(pair, {})[KEYS[name]] = gap
    return found


def prompt_rows(outcomes: Sequence[Outcome], held_out: frozenset[str] | None) -> list[dict[str, Any]]:
    """Every prompt of every suite with each model's verdicts, in the suites' order."""
    suites = {outcome.suite.name: outcome.suite for outcome in outcomes}
    records: dict[tuple[str, str, str], list[Record]] = {}
    for outcome in outcomes:
        for record in outcome.records:
            records.setdefault((outcome.suite.name, record.prompt, outcome.candidate.name), []).append(record)
    names = list(dict.fromkeys(outcome.candidate.name for outcome in outcomes))
    rows = []
    for name, suite in suites.items():
        for prompt in suite.asked:
            row: dict[str, Any] = {"suite": name, "id": prompt.id, "prompt": prompt.text, "tag": prompt.group}
            if held_out is not None:
                row["held_out"] = prompt.text in held_out
            verdicts = {
                model: [_verdict(name, r) for r in records.get((name, prompt.id, model), ())] for model in names
            }
            rows.append(row | {"verdicts": {model: found for model, found in verdicts.items() if found}})
    return rows


def _verdict(suite: str, record: Record) -> dict[str, Any]:
    if suite == "geneval":
        return {"correct": bool(record.score), "reason": record.reason}
    return {"score": record.score} | ({"reason": record.reason} if record.reason else {})


def missing_count(figures: Mapping[str, Any]) -> int:
    """How many images a suite's summary says are missing."""
    return len(figures.get("missing") or ())
