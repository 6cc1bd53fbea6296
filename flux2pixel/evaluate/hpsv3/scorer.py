"""HPSv3 as a suite: images in, raw rewards out, overall as the mean of the categories."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from flux2pixel.evaluate import statistics
from flux2pixel.evaluate.hpsv3.benchmark import CATEGORIES, aggregate
from flux2pixel.evaluate.suite import Prompt, Record, Rgb, Sample, read_ahead, read_rgb

PROTOCOL = "hpsv3 1.0.0"


class Rewards(Protocol):
    """What scores images against texts: `model.Reward`, or another under another name."""

    def __call__(self, images: Sequence[Rgb], prompts: Sequence[str]) -> Sequence[tuple[float, float]]:
        """Give ``(mu, sigma)`` for each image."""

    def provenance(self) -> dict[str, Any]:
        """Say what decides; its ``name`` is "official" only for the protocol's own weights."""


class Hpsv3:
    """The suite over ``prompts`` (`hpsv3.read`) with the reward model; a `Judge`.

    ``script_text`` scores against the text of the official scripts, the image's file name included, in place of the
    caption alone (as LakonLab does); which of the two made the published table is not known. ``official``: the
    prompts are read from the files that were fetched (`hpsv3.unchanged`). A record's score is mu.
    """

    suite = "hpsv3"

    def __init__(
        self,
        prompts: Sequence[Prompt],
        rewards: Rewards,
        script_text: bool = False,
        batch: int = 16,
        official: bool = False,
    ):
        self.prompts = prompts
        self.judge = str(rewards.provenance()["name"])
        self._rewards, self._script_text, self._batch, self._official = rewards, script_text, batch, official

    def text(self, prompt: Prompt) -> str:
        """The text that a prompt's image is scored against."""
        return str(prompt.data["script_text"]) if self._script_text else prompt.text

    def score(self, samples: Iterable[Sample]) -> Iterator[Record]:
        """Yield a record for each sample, in order; see `Judge`."""
        for group, images in read_ahead(samples, lambda s: read_rgb(s, orient=False), self._batch):
            scores = self._rewards(images, [self.text(sample.prompt) for sample in group])
            for sample, (mu, sigma) in zip(group, scores, strict=True):
                yield Record(sample.prompt.id, sample.index, sample.prompt.group, mu, details={"sigma": sigma})

    def provenance(self) -> dict[str, Any]:
        """Say what decides the scores; the prompts' digest is over ids, captions and the texts scored against."""
        rows = [[prompt.id, prompt.text, self.text(prompt)] for prompt in self.prompts]
        return {
            "suite": self.suite,
            "judge": self.judge,
            "protocol": PROTOCOL,
            "prompts": len(rows),
            "prompts_sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
            "prompts_official": self._official,
            "scored_text": "script" if self._script_text else "caption",
            "reward": self._rewards.provenance(),
        }


def summarise(prompts: Sequence[Prompt], records: Iterable[Record], script_text: bool = False) -> dict[str, Any]:
    """Sum up: mean mu by category with intervals, the official table, overall as the mean of the categories."""
    grouped = statistics.by_prompt(prompts, records)
    lost = statistics.missing(prompts, grouped)
    rewards: dict[str, list[float]] = {}
    for rows in grouped.values():
        for record in rows:
            rewards.setdefault(record.group, []).append(record.score)
    summary: dict[str, Any] = {
        "groups": statistics.groups(prompts, grouped),
        "prompts": len(grouped),
        "images": sum(map(len, grouped.values())),
        "missing": lost,
        "unit": "raw mu",
        "scored_text": "official scripts: caption and file name" if script_text else "caption only",
    }
    if grouped:
        table = aggregate(rewards)
        if not lost and set(table) - {"OVERALL"} == set(CATEGORIES):
            summary["overall"] = statistics.mean_of_groups(prompts, grouped)
        else:
            del table["OVERALL"]
        summary["table"] = table
    return summary
