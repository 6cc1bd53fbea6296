"""The miniature's analytic detector in place of Mask2Former and CLIP: GenEval runs whole without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flux2pixel.evaluate.geneval.promptset import prompts
from flux2pixel.evaluate.geneval.scorer import GenEval
from flux2pixel.evaluate.suite import Rgb
from flux2pixel.miniature import detector, world


@dataclass
class _Seen:
    image: Rgb

    @cached_property
    def detections(self) -> dict[str, list[detector.Detection]]:
        return detector.detect(self.image)

    def color(self, class_name: str, box: tuple[float, float, float, float]) -> str:
        return detector.classify_color(self.image, box)


class Analytic:
    """A GenEval `Detector` for the miniature's world of shapes; it knows nothing of photographs."""

    name = "miniature"

    def look(self, images: Sequence[Rgb]) -> list[_Seen]:
        """Find the shapes; images must be of the world's size."""
        return [_Seen(image) for image in images]

    def provenance(self) -> dict[str, Any]:
        """No weights: the code and the world's constants decide."""
        return {"name": self.name, "classes": list(world.SHAPES), "colors": list(world.COLORS), "size": world.SIZE}


def geneval(samples: int, rows: list[dict] | None = None) -> GenEval:
    """GenEval over the miniature's held-back prompts (or ``rows`` of them), judged by the analytic detector."""
    return GenEval(prompts(rows or list(world.EVAL_METADATA), samples), Analytic())
