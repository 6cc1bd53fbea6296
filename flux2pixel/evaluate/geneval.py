"""GenEval's verdict: from detections to right or wrong, as the official scorer decides it.

Protocol: djghosh13/geneval, ``evaluate_images.py`` at its default options. Boxes are ``(x1, y1, x2, y2)`` in pixels,
y down; scores are compared in float32 and strictly, so a score of exactly the threshold is dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Box = tuple[float, float, float, float]
ClassifyColor = Callable[[str, Box], str]
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


@dataclass(frozen=True)
class Verdict:
    """Whether the image shows its prompt; ``reason`` has one line per failed clause and is empty when correct."""

    correct: bool
    reason: str


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, with the protocol's +1-pixel sides."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a[:4]) + area(*b[:4]) - shared
    return shared / union if union else 0.0


def relations(a: Sequence[float], b: Sequence[float], position_threshold: float = 0.1) -> set[str]:
    """Name the relations of box ``a`` to box ``b``: none, one or two of left of, right of, above, below."""
    boxes = np.array([a[:4], b[:4]], dtype=np.float32).reshape(2, 2, 2)  # (box, corner, axis)
    centre, size = boxes.mean(axis=1), np.abs(np.diff(boxes, axis=1))[:, 0]
    offset = centre[0] - centre[1]
    shrunk = np.maximum(np.abs(offset) - position_threshold * (size[0] + size[1]), 0) * np.sign(offset)
    if np.all(np.abs(shrunk) < 1e-3):
        return set()
    x, y = shrunk / np.linalg.norm(offset)
    named = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in named.items() if holds}


def keep(
    found: Sequence[Sequence[float]], threshold: float, max_objects: int = 16, max_overlap: float = 1.0
) -> list[tuple[float, ...]]:
    """Apply threshold, cap and (only if ``max_overlap`` is not 1) greedy suppression to one class's detections."""
    ranked = sorted((tuple(d) for d in found), key=lambda d: -d[4])
    best = [d for d in ranked if np.float32(d[4]) > np.float32(threshold)][:max_objects]
    if max_overlap == 1.0:
        return best
    kept: list[tuple[float, ...]] = []
    for candidate in best:
        if all(iou(candidate, other) < max_overlap for other in kept):
            kept.append(candidate)
    return kept


def _box(detection: Sequence[float]) -> Box:
    return (detection[0], detection[1], detection[2], detection[3])


def _color_failure(clause: Mapping, found: Sequence[Sequence[float]], classify_color: ClassifyColor) -> str:
    """Return the reason why too few of ``found`` have the wanted colour, or an empty string."""
    name, wanted, count = clause["class"], clause["color"], clause["count"]
    seen = Counter(classify_color(name, _box(d)) for d in found)
    if seen[wanted] >= count:
        return ""
    order = [c for c in COLORS if c in seen] + [c for c in seen if c not in COLORS]
    tail = ", ".join(f"{seen[c]} {c}" for c in order)
    return f"expected {wanted} {name}>={count}, found {seen[wanted]} {wanted}; and {tail}"


def _position_failure(
    clause: Mapping, found: Sequence[Sequence[float]], target: Sequence[Sequence[float]] | None, threshold: float
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
    detections: Mapping[str, Sequence[Sequence[float]]],
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
    ``(x1, y1, x2, y2, score)`` tuples before any threshold; ``classify_color(class_name, box)`` names a colour.
    """
    floor = counting_threshold if metadata["tag"] == "counting" else threshold
    kept = {name: keep(found, floor, max_objects, max_overlap) for name, found in detections.items()}
    reasons: list[str] = []
    groups: list[Sequence[Sequence[float]] | None] = []
    for clause in metadata.get("include", ()):
        name, count = clause["class"], clause["count"]
        found = kept.get(name, [])[:count]
        if len(found) < count:
            why = f"expected {name}>={count}, found {len(found)}"
        else:
            why = _color_failure(clause, found, classify_color) if "color" in clause else ""
            if not why and "position" in clause:
                why = _position_failure(clause, found, groups[clause["position"][1]], position_threshold)
        if why:
            reasons.append(why)
        groups.append(None if why else found)
    for clause in metadata.get("exclude", ()):
        number = len(kept.get(clause["class"], []))
        if number >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return Verdict(not reasons, "\n".join(reasons))
