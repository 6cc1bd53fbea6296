"""Intervals of scores: a percentile bootstrap over prompts, since images of one prompt are not independent.

Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13: clusters are resampled whole.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

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


def paired_difference(a: Verdicts, b: Verdicts, seed: int = 0, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean of ``a`` minus mean of ``b`` and its 95 % interval, both systems on the same prompts in the same order.

    ``(difference, low, high)``, each in [-1, 1]. A resample takes both systems' verdicts of the prompts it draws, so
    that the difficulty of a prompt cancels. Raises ValueError if the numbers of prompts differ.
    """
    sums_a, counts_a = _sums(a)
    sums_b, counts_b = _sums(b)
    if len(sums_a) != len(sums_b):
        raise ValueError(f"paired_difference: {len(sums_a)} prompts against {len(sums_b)}; both must be the same")
    picks = _draws(len(sums_a), seed, resamples)
    mean_a = sums_a[picks].sum(axis=1) / counts_a[picks].sum(axis=1)
    mean_b = sums_b[picks].sum(axis=1) / counts_b[picks].sum(axis=1)
    low, high = _percentiles(mean_a - mean_b)
    return float(sums_a.sum() / counts_a.sum() - sums_b.sum() / counts_b.sum()), low, high


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
