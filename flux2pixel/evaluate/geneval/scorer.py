"""GenEval as a suite: images in, a verdict each, the official summary with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from flux2pixel.evaluate import statistics
from flux2pixel.evaluate.geneval import promptset
from flux2pixel.evaluate.geneval.verdict import Box, Detection, floor_of, judge_kept, keep
from flux2pixel.evaluate.suite import Prompt, Record, Rgb, Sample, read_ahead, read_rgb

PROTOCOL = "geneval@af4902f"


class Seen(Protocol):
    """What a detector saw in one image."""

    @property
    def detections(self) -> Mapping[str, Sequence[Detection]]:
        """Class name -> ``(x1, y1, x2, y2, score)`` before any threshold."""

    def colors(self, class_name: str, boxes: Sequence[Box]) -> Sequence[str]:
        """Name the colours of the objects of this class in these boxes, which are ``detections``' own."""


class Detector(Protocol):
    """Finds objects in images; ``name`` is "official" only for the protocol's own detector and colours."""

    @property
    def name(self) -> str:
        """Who sees."""

    def look(self, images: Sequence[Rgb]) -> Sequence[Seen]:
        """Detect in a batch of (H, W, 3) uint8 images of any sizes."""

    def provenance(self) -> dict[str, Any]:
        """Say which weights, by digest, and which settings decide what is seen."""


class GenEval:
    """The suite over ``prompts`` (`geneval.prompts`) with a detector; a `Judge`.

    ``batch`` images are detected at once; it changes no verdict beyond float rounding. A record's score is 1 or 0.
    """

    suite = "geneval"

    def __init__(self, prompts: Sequence[Prompt], detector: Detector, batch: int = 8):
        self.prompts = prompts
        self.judge = detector.name
        self._detector, self._batch = detector, batch

    def score(self, samples: Iterable[Sample]) -> Iterator[Record]:
        """Yield a record for each sample, in order; see `Judge`."""
        for group, images in read_ahead(samples, read_rgb, self._batch):
            for sample, seen in zip(group, self._detector.look(images), strict=True):
                yield judged(sample.prompt, sample.index, seen)

    def provenance(self) -> dict[str, Any]:
        """Say what decides the scores; ``prompts_official`` is true for the 553 of the protocol at 4 images each."""
        rows = [dict(prompt.data) for prompt in self.prompts]
        digest = promptset.digest(rows)
        official = digest == promptset.SHA256 and {p.samples for p in self.prompts} == {promptset.SAMPLES}
        return {
            "suite": self.suite,
            "judge": self.judge,
            "protocol": PROTOCOL,
            "prompts": len(rows),
            "prompts_sha256": digest,
            "prompts_official": official,
            "detector": self._detector.provenance(),
        }


def summarise(prompts: Sequence[Prompt], records: Iterable[Record]) -> dict[str, Any]:
    """Sum up as the official script does: shares of right images by tag, overall as the mean of the tags.

    Also the share of right images and of prompts with a right image among those scored; see `suites.Suite`.
    """
    grouped = statistics.by_prompt(prompts, records)
    lost = statistics.missing(prompts, grouped)
    rows = list(grouped.values())
    images = sum(map(len, rows))
    summary: dict[str, Any] = {
        "groups": statistics.groups(prompts, grouped),
        "prompts": len(rows),
        "images": images,
        "missing": lost,
    }
    if images:
        summary["correct_images"] = sum(r.score for row in rows for r in row) / images
        summary["correct_prompts"] = sum(any(r.score for r in row) for row in rows) / len(rows)
    if not lost and {p.group for p in prompts} == set(promptset.TAGS):
        summary["overall"] = statistics.mean_of_groups(prompts, grouped)
    return summary


def judged(prompt: Prompt, index: int, seen: Seen) -> Record:
    """Judge what was seen in one image at the official settings; keeps the boxes that passed the threshold."""
    floor = floor_of(prompt.data)
    kept = {name: rows for name, found in seen.detections.items() if (rows := keep(found, floor))}
    # The protocol asks for the colours of the best ``count`` of a class, and of none where they are fewer.
    named: dict[tuple[str, Box], str] = {}
    for clause in prompt.data.get("include", ()):
        best = kept.get(clause["class"], [])[: clause["count"]]
        if "color" in clause and len(best) == clause["count"]:
            asked: list[Box] = [(d[0], d[1], d[2], d[3]) for d in best]
            colors = seen.colors(clause["class"], asked)
            named |= {(clause["class"], box): color for box, color in zip(asked, colors, strict=True)}
    verdict = judge_kept(prompt.data, kept, lambda name, box: named[name, box])
    boxes = {name: [list(d) for d in rows] for name, rows in kept.items()}
    return Record(prompt.id, index, prompt.group, float(verdict.correct), verdict.reason, {"boxes": boxes})
