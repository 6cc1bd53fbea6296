"""The miniature's analytic detector in place of Mask2Former and CLIP: GenEval runs whole without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from flux2pixel.miniature import detector, world


@dataclass(frozen=True)
class Suite:
    """A suite of the miniature's world: rows in the suite's own file format, who judges them.

    ``side`` is that of an image in pixels, ``held_out`` are the prompts that no training scene has.
    """

    rows: Sequence[Mapping[str, Any]]
    judge: Any
    side: int = world.SIZE
    held_out: frozenset[str] = world.HELD_OUT


@dataclass
class _Seen:
    image: np.ndarray

    @cached_property
    def detections(self) -> dict[str, list[detector.Detection]]:
        return detector.detect(self.image)

    def colors(self, class_name: str, boxes: Sequence[tuple[float, float, float, float]]) -> list[str]:
        return [detector.classify_color(self.image, box) for box in boxes]


class Analytic:
    """A GenEval detector for the miniature's world of shapes; it knows nothing of photographs."""

    name = "miniature"

    def look(self, images: Sequence[np.ndarray]) -> list[_Seen]:
        """Find the shapes; images must be of the world's size."""
        return [_Seen(image) for image in images]

    def provenance(self) -> dict[str, Any]:
        """No weights: the code and the world's constants decide."""
        return {"name": self.name, "classes": list(world.SHAPES), "colors": list(world.COLORS), "size": world.SIZE}


GENEVAL = Suite(world.EVAL_METADATA, Analytic())
