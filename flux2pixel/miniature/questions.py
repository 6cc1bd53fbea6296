"""DPG-Bench in the miniature's world: questions from the prompts' own metadata, answered by the analytic detector.

The suite's real code runs on them, grids and dependencies included; only the judge is another, and so named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flux2pixel.miniature import detector, world
from flux2pixel.miniature.judge import Suite

_IS_THERE = re.compile(r"Is there a (\w+)\?")
_COLOR = re.compile(r"Is the (\w+) (\w+)\?")
_COUNT = re.compile(r"Are there (\w+) (\w+)\?")
_RELATION = re.compile(r"Is the (\w+) (left of|right of|above|below) the (\w+)\?")
NUMBERS = {word: number for number, word in world.NUMBERS.items()}


def rows() -> list[dict[str, str]]:
    """The questions of the held-back prompts, in dpg_bench.csv's columns; an object first, then what depends on it."""
    found = []
    for number, metadata in enumerate(world.EVAL_METADATA):
        for place, (category, dependency, text) in enumerate(_questions(metadata), 1):
            found.append(
                {
                    "item_id": f"{metadata['tag']}{number}",
                    "text": metadata["prompt"],
                    "keywords": "",
                    "proposition_id": str(place),
                    "dependency": dependency,
                    "category_broad": category.split(" - ")[0],
                    "category_detailed": category.split(" - ")[1],
                    "tuple": f"{category} ({text})",
                    "question_natural_language": text,
                }
            )
    return found


def _questions(metadata: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Category, dependency and words of each question about a prompt."""
    clauses = metadata["include"]
    asked = [("entity - whole", "0", f"Is there a {clause['class']}?") for clause in clauses]
    for place, clause in enumerate(clauses, 1):
        name = clause["class"]
        if "color" in clause:
            asked.append(("attribute - color", str(place), f"Is the {name} {clause['color']}?"))
        if clause["count"] > 1:
            number = world.NUMBERS[clause["count"]]
            asked.append(("other - count", str(place), f"Are there {number} {world.plural(name)}?"))
        if "position" in clause:
            relation, target = clause["position"]
            other = clauses[target]["class"]
            asked.append(("relation - spatial", f"{target + 1}, {place}", f"Is the {name} {relation} the {other}?"))
    return asked


class Analytic:
    """Answers the questions above from what the analytic detector finds; a DPG-Bench judge."""

    name = "miniature"

    def ask(self, images: Sequence[np.ndarray], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        """Answer yes or no; images must be of the world's size. ValueError for a question of another kind."""
        answers = []
        for image, asked in zip(images, questions, strict=True):
            seen = {name: _best(found) for name, found in detector.detect(image).items()}
            answers.append(["yes" if _holds(question, image, seen) else "no" for question in asked])
        return answers

    def provenance(self) -> dict[str, Any]:
        """No weights: the code and the world's constants decide."""
        return {"name": self.name, "classes": list(world.SHAPES), "colors": list(world.COLORS), "size": world.SIZE}


def _holds(question: str, image: np.ndarray, seen: Mapping[str, Sequence[tuple[float, ...]]]) -> bool:
    if match := _IS_THERE.fullmatch(question):
        return bool(seen.get(match[1]))
    if match := _COUNT.fullmatch(question):
        (kind,) = (kind for kind in world.SHAPES if world.plural(kind) == match[2])
        return len(seen.get(kind, ())) == NUMBERS[match[1]]
    if match := _RELATION.fullmatch(question):
        ours, theirs = seen.get(match[1], ()), seen.get(match[3], ())
        return bool(ours and theirs) and match[2] in _relations(ours[0], theirs[0])
    if match := _COLOR.fullmatch(question):
        return any(detector.classify_color(image, found[:4]) == match[2] for found in seen.get(match[1], ()))
    raise ValueError(f"{question!r}: not a question of the miniature's world")


def _best(found: Sequence[detector.Detection]) -> list[detector.Detection]:
    """What passes GenEval's threshold, the best first."""
    return sorted((one for one in found if np.float32(one[4]) > np.float32(0.3)), key=lambda one: -one[4])


def _relations(ours: Sequence[float], theirs: Sequence[float]) -> set[str]:
    """How one box lies to another, by GenEval's rule: offset of the centres less a tenth of both sizes."""
    boxes = np.array([ours[:4], theirs[:4]]).reshape(2, 2, 2)  # (box, corner, axis)
    offset = boxes[0].mean(0) - boxes[1].mean(0)
    shrunk = np.maximum(np.abs(offset) - 0.1 * np.ptp(boxes, axis=1).sum(0), 0) * np.sign(offset)
    if not shrunk.any():
        return set()
    x, y = shrunk / np.linalg.norm(offset)
    return {
        name
        for name, holds in (("left of", x < -0.5), ("right of", x > 0.5), ("above", y < -0.5), ("below", y > 0.5))
        if holds
    }


DPG_BENCH = Suite(rows(), Analytic())
