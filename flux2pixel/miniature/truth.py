"""The miniature's true renders: what its models are compared with, and what a perfect model would score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from flux2pixel.miniature import detector, world

FIRST_REFERENCE = 3_000_000  # true renders that the fidelity measures compare with
FIRST_CEILING = 4_000_000  # other true renders: what a perfect model would score
SAMPLES = 4  # true renders a prompt that the detector judges


class Renders:
    """``count`` scenes of the posed prompts in turn, (H, W, 3) uint8, drawn anew each time they are read."""

    size = (world.SIZE, world.SIZE)  # (height, width)

    def __init__(self, posed: Sequence[dict], count: int, first: int = FIRST_REFERENCE):
        self._posed, self.count, self._first = posed, count, first

    def __iter__(self) -> Iterator[np.ndarray]:
        for i in range(self.count):
            posed = self._posed[i % len(self._posed)]
            yield world.sample(self._first + i, metadata=posed, held_out=frozenset()).image

    @property
    def digest(self) -> str:
        """Digest of what is posed, how often and from which seed on."""
        posed = json.dumps([self._posed, self.count, self._first, self.size])
        return hashlib.sha256(posed.encode()).hexdigest()

    def others(self) -> Renders:
        """As many other renders of the same prompts: what a perfect model would draw."""
        return Renders(self._posed, self.count, FIRST_CEILING)

    def detector_ceiling(self, judge: Callable[..., Any]) -> float:
        """GenEval of four true renders a prompt, by its ``judge``: the mean over tags that the detector allows."""
        shares: dict[str, list[float]] = {}
        for place, metadata in enumerate(self._posed):
            for sample in range(SAMPLES):
                start = FIRST_CEILING + 10 * place + sample
                image = world.sample(start, metadata=metadata, held_out=frozenset()).image
                verdict = judge(metadata, detector.detect(image), partial(_color, image))
                shares.setdefault(metadata["tag"], []).append(float(verdict.correct))
        return float(np.mean([np.mean(rows) for rows in shares.values()]))


def _color(image: np.ndarray, _: str, box: tuple[float, ...]) -> str:
    return detector.classify_color(image, box)
