"""Sums over records: groups with intervals, what is missing, and an overall only where nothing is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flux2pixel.evaluate.statistics import mean_interval, tag_mean_interval
from flux2pixel.evaluate.suite import Prompt, Record
from flux2pixel.runtime.errors import UsageError


def by_prompt(prompts: Sequence[Prompt], records: Iterable[Record]) -> dict[str, list[Record]]:
    """Sort records by prompt, in the suite's order, and by index; UsageError for a stranger or a duplicate."""
    known = {prompt.id: prompt for prompt in prompts}
    found: dict[str, dict[int, Record]] = {prompt.id: {} for prompt in prompts}
    for record in records:
        if record.prompt not in known:
            raise UsageError(f"record of prompt {record.prompt!r}: the suite has no such prompt; score with its own")
        wanted = known[record.prompt].samples
        if not 0 <= record.index < wanted:
            raise UsageError(f"prompt {record.prompt}: image {record.index} is one too many, the protocol has {wanted}")
        if record.index in found[record.prompt]:
            raise UsageError(f"prompt {record.prompt}: image {record.index} was scored twice; drop one")
        found[record.prompt][record.index] = record
    return {key: [rows[index] for index in sorted(rows)] for key, rows in found.items() if rows}


def missing(prompts: Sequence[Prompt], grouped: Mapping[str, Sequence[Record]]) -> list[tuple[str, int]]:
    """Name the images that the protocol wants and that have no record: ``(prompt id, index)``."""
    seen = {(key, record.index) for key, rows in grouped.items() for record in rows}
    return [(p.id, i) for p in prompts for i in range(p.samples) if (p.id, i) not in seen]


def groups(prompts: Sequence[Prompt], grouped: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, Any]]:
    """Mean score of each group over its images, with its 95 % interval over prompts; empty groups are left out."""
    rows: dict[str, list[list[float]]] = {}
    for prompt in prompts:
        if prompt.id in grouped:
            rows.setdefault(prompt.group, []).append([record.score for record in grouped[prompt.id]])
    table = {}
    for name, scores in rows.items():
        mean, low, high = mean_interval(scores)
        images = sum(map(len, scores))
        table[name] = {"score": mean, "low": low, "high": high, "prompts": len(scores), "images": images}
    return table


def mean_of_groups(prompts: Sequence[Prompt], grouped: Mapping[str, Sequence[Record]]) -> dict[str, float]:
    """Unweighted mean of the groups' means with its 95 % interval, prompts resampled within their group."""
    scores: dict[str, list[float]] = {}
    for prompt in prompts:
        rows = grouped.get(prompt.id, ())
        if rows:
            scores.setdefault(prompt.group, []).append(sum(r.score for r in rows) / len(rows))
    mean, low, high = tag_mean_interval(scores)
    return {"score": mean, "low": low, "high": high}
