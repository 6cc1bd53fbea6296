"""GenEval's verdict: from detections to right or wrong, as the official scorer decides it.

Protocol: djghosh13/geneval, ``evaluate_images.py``. Boxes are ``(x1, y1, x2, y2)`` in pixels, y down. Scores and
geometry are compared in float32, and scores strictly: a score of exactly the threshold is dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from flux2pixel.runtime.errors import UsageError

Box = tuple[float, float, float, float]
Detection = Sequence[float]  # x1, y1, x2, y2, score
ClassifyColor = Callable[[str, Box], str]
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


@dataclass(frozen=True)
class Verdict:
    """Whether the image shows its prompt; ``reason`` has one line per failed clause and is empty when correct."""

    correct: bool
    reason: str


def iou(a: Detection, b: Detection) -> float:
    """Intersection over union of two boxes, with the protocol's +1-pixel sides, in float32."""
    one = np.float32(1)

    def area(box: NDArray[np.float32]) -> np.float32:
        return max(box[2] - box[0] + one, np.float32(0)) * max(box[3] - box[1] + one, np.float32(0))

    p, q = np.asarray(a[:4], dtype=np.float32), np.asarray(b[:4], dtype=np.float32)
    shared = area(np.concatenate([np.maximum(p[:2], q[:2]), np.minimum(p[2:], q[2:])]))
    union = area(p) + area(q) - shared
    return float(shared / union) if union else 0.0


def relations(a: Detection, b: Detection, position_threshold: float = 0.1) -> set[str]:
    """Name the relations of box ``a`` to box ``b``: none, one or two of left of, right of, above, below.

    The offset of the centres is shrunk on each axis by ``position_threshold`` times both boxes' sizes, then divided
    by its length before shrinking; an axis counts beyond one half.
    """
    boxes = np.array([a[:4], b[:4]], dtype=np.float32).reshape(2, 2, 2)  # (box, corner, axis)
    centre, size = boxes.mean(axis=1), np.abs(np.diff(boxes, axis=1))[:, 0]
    offset = centre[0] - centre[1]
    shrunk = np.maximum(np.abs(offset) - position_threshold * (size[0] + size[1]), 0) * np.sign(offset)
    if np.all(np.abs(shrunk) < 1e-3):
        return set()
    x, y = shrunk / np.linalg.norm(offset)
    named = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in named.items() if holds}


@cache
def _edges(threshold: float) -> tuple[float, float]:
    """The float32 that a threshold is, and the next one above it."""
    floor = np.float32(threshold)
    return float(floor), float(np.nextafter(floor, np.float32(np.inf)))


def keep(
    found: Sequence[Detection], threshold: float, max_objects: int = 16, max_overlap: float = 1.0
) -> list[tuple[float, ...]]:
    """Apply threshold, cap and (only if ``max_overlap`` is not 1) greedy suppression to one class's detections.

    The best come first. Of equal scores the later one does, as in the official reversed ascending sort.
    """
    low, high = _edges(threshold)
    # Only between two neighbours in float32 does rounding decide; asking it of every score would cost the most.
    above = [tuple(d) for d in found if d[4] >= high or (d[4] > low and np.float32(d[4]) > low)]
    if not above:
        return []
    best = sorted(above, key=itemgetter(4))[::-1][:max_objects]
    if max_overlap == 1.0:
        return best
    kept: list[tuple[float, ...]] = []
    for candidate in best:
        if all(iou(other, candidate) < max_overlap for other in kept):
            kept.append(candidate)
    return kept


def floor_of(metadata: Mapping, threshold: float = 0.3, counting_threshold: float = 0.9) -> float:
    """Return the score that a detection must exceed to count for this prompt."""
    return counting_threshold if metadata.get("tag") == "counting" else threshold


def _box(detection: Detection) -> Box:
    return (detection[0], detection[1], detection[2], detection[3])


def _color_failure(clause: Mapping, found: Sequence[Detection], classify_color: ClassifyColor) -> str:
    """Return the reason why too few of ``found`` have the wanted colour, or an empty string."""
    name, wanted, count = clause["class"], clause["color"], clause["count"]
    seen = Counter(classify_color(name, _box(d)) for d in found)
    if seen[wanted] >= count:
        return ""
    tail = ", ".join(f"{seen[c]} {c}" for c in COLORS if c in seen)
    return f"expected {wanted} {name}>={count}, found {seen[wanted]} {wanted}; and {tail}"


def _position_failure(
    clause: Mapping, found: Sequence[Detection], target: Sequence[Detection] | None, threshold: float
) -> str:
    """Return the reason why not every found object stands in the relation to every target, or an empty string."""
    name, (relation, _) = clause["class"], clause["position"]
    if target is None:
        return f"no target for {name} to be {relation}"
    for thing in found:
        for other in target:
            held = relations(thing, other, threshold)
            if relation not in held:
                return f"expected {name} {relation} target, found {' and '.join(sorted(held))} target"
    return ""


def judge(
    metadata: Mapping,
    detections: Mapping[str, Sequence[Detection]],
    classify_color: ClassifyColor,
    *,
    threshold: float = 0.3,
    counting_threshold: float = 0.9,
    max_objects: int = 16,
    max_overlap: float = 1.0,
    position_threshold: float = 0.1,
) -> Verdict:
    """Judge one image by GenEval's rules.

    ``metadata`` is one object of ``evaluation_metadata.jsonl``; ``detections`` maps class name to
    ``(x1, y1, x2, y2, score)`` before any threshold; ``classify_color(class_name, box)`` names a colour and is asked
    only about the objects that count. Raises UsageError if a position refers to a group that is not before it.
    """
    floor = floor_of(metadata, threshold, counting_threshold)
    named = {clause["class"] for part in ("include", "exclude") for clause in metadata.get(part, ())}
    kept = {name: keep(detections.get(name, ()), floor, max_objects, max_overlap) for name in named}
    return judge_kept(metadata, kept, classify_color, position_threshold)


def judge_kept(
    metadata: Mapping,
    kept: Mapping[str, Sequence[Detection]],
    classify_color: ClassifyColor,
    position_threshold: float = 0.1,
) -> Verdict:
    """Judge what `keep` left of one image, best first; the second half of `judge`."""
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", ()):
        name, count = clause["class"], clause["count"]
        found = kept.get(name, ())[:count]
        if len(found) < count:
            why = f"expected {name}>={count}, found {len(found)}"
        else:
            why = _color_failure(clause, found, classify_color) if "color" in clause else ""
            if not why and "position" in clause:
                why = _position_failure(clause, found, _target(clause, groups), position_threshold)
        if why:
            reasons.append(why)
        groups.append(None if why else found)
    for clause in metadata.get("exclude", ()):
        number = len(kept.get(clause["class"], ()))
        if number >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return Verdict(not reasons, "\n".join(reasons))


def _target(clause: Mapping, groups: Sequence[Sequence[Detection] | None]) -> Sequence[Detection] | None:
    index = clause["position"][1]
    if not -len(groups) <= index < len(groups):
        raise UsageError(f"position of {clause['class']}: refers to group {index}, but {len(groups)} come before it")
    return groups[index]
