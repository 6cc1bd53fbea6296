"""Figures over records with intervals: what is missing, groups, overall where nothing is, differences of two models.

Intervals are a percentile bootstrap over prompts, since images of one prompt are not independent.

Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13: clusters are resampled whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flux2pixel.evaluate.suite import Prompt, Record
from flux2pixel.runtime.errors import UsageError

Verdicts = Sequence[Sequence[float]]  # one inner sequence a prompt, one value an image; a verdict is 0 or 1


def _sums(values_by_prompt: Verdicts) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    sums = np.array([float(sum(values)) for values in values_by_prompt])
    counts = np.array([float(len(values)) for values in values_by_prompt])
    if len(counts) == 0 or not counts.all():
        raise ValueError("values_by_prompt: want at least one prompt and at least one verdict for each")
    return sums, counts


def _draws(prompts: int, seed: int, resamples: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, prompts, size=(resamples, prompts))


def _percentiles(draws: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values_by_prompt: Verdicts, seed: int = 0, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean over all images and its 95 % interval: ``(mean, low, high)``, in the unit of the values.

    One inner sequence of values for each prompt. Raises ValueError without prompts or for a prompt without values.
    """
    sums, counts = _sums(values_by_prompt)
    picks = _draws(len(sums), seed, resamples)  # (resamples, prompts)
    low, high = _percentiles(sums[picks].sum(axis=1) / counts[picks].sum(axis=1))
    return float(sums.sum() / counts.sum()), low, high


def tag_mean_interval(
    scores_by_tag: Mapping[str, Sequence[float]], seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """GenEval's overall, the mean of the tags' means, with its 95 % interval: prompts are resampled within their tag.

    One score per prompt: its share of right images, or a difference of two systems' shares for a paired comparison.
    """
    means, draws = [], np.zeros(resamples)
    for index, scores in enumerate(scores_by_tag.values()):
        values = np.asarray(scores, dtype=np.float64)
        means.append(float(values.mean()))
        draws += values[_draws(len(values), seed + index, resamples)].mean(axis=1)
    return sum(means) / len(means), *_percentiles(draws / len(means))


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


def difference(
    prompts: Sequence[Prompt], ours: Iterable[Record], theirs: Iterable[Record], percent: bool = False
) -> dict[str, float] | None:
    """Our score minus theirs over the prompts that both have, with its 95 % interval; None if there are none.

    Both systems' scores of a prompt are drawn together, so that its difficulty cancels. The mean is that of the
    groups' means, or, with ``percent``, of the prompts times 100, as DPG-Bench sums up.
    """
    mine, other = _means(ours), _means(theirs)
    shared = [p for p in prompts if p.id in mine and p.id in other]
    if not shared:
        return None
    gaps: dict[str, list[float]] = {}
    for prompt in shared:
        gaps.setdefault("" if percent else prompt.group, []).append(mine[prompt.id] - other[prompt.id])
    scale = 100 if percent else 1
    found = [scale * value for value in tag_mean_interval(gaps)]
    return dict(zip(("difference", "low", "high"), found, strict=True)) | {"prompts": len(shared)}


def _means(records: Iterable[Record]) -> dict[str, float]:
    """Mean score of each prompt over its images."""
    rows: dict[str, list[float]] = {}
    for record in records:
        rows.setdefault(record.prompt, []).append(record.score)
    return {key: float(np.mean(scores)) for key, scores in rows.items()}
