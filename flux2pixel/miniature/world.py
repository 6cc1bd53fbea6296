"""The miniature's procedural world: small scenes of coloured shapes, with captions in GenEval's six tags.

A scene is 32 x 32 pixels, four 16-pixel cells, at most one upright shape per cell, over a grey gradient with
pixel-sized luminance grain. The grain is on purpose finer than the latent carries (16 numbers per 8 x 8 patch): it is
what a pixel-space model can gain over the VAE. The grey is dark enough for the mean colour to lie near the offset of
normalised Oklab, as it does for photographs: FLUX.2 has no bias to carry another mean. Everything is a pure function
of a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIZE = 32
CELL = 16
GRAIN = 10.0  # standard deviation of the grain, in 8-bit levels
SUPERSAMPLE = 4

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (220, 40, 40),
    "yellow": (245, 215, 40),
    "green": (40, 170, 70),
    "blue": (50, 90, 220),
    "white": (245, 245, 245),
}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TAG_WEIGHTS = (0.06, 0.12, 0.22, 0.14, 0.24, 0.22)
NUMBERS = {2: "two", 3: "three", 4: "four"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITE)


@dataclass(frozen=True)
class Shape:
    """One drawn object: class, colour name, centre and radius in pixels."""

    kind: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """An image (SIZE, SIZE, 3) uint8, the objects in it, and its GenEval metadata (tag, include, prompt)."""

    image: np.ndarray
    objects: tuple[Shape, ...]
    metadata: dict

    @property
    def caption(self) -> str:
        return self.metadata["prompt"]


def plural(kind: str) -> str:
    """GenEval's plural rule: names that end in "s" add "es", all others "s"."""
    return kind + ("es" if kind.endswith("s") else "s")


def describe(tag: str, kinds: Sequence[str], colors: Sequence[str] = (), count: int = 1, relation: str = "") -> dict:
    """Build the GenEval metadata object, prompt included, of one scene description."""
    include: list[dict] = [{"class": kind, "count": 1} for kind in kinds]
    extra: dict = {}
    if tag in ("single_object", "two_object"):
        text = " and ".join(f"a {kind}" for kind in kinds)
    elif tag == "counting":
        text = f"{NUMBERS[count]} {plural(kinds[0])}"
        include = [{"class": kinds[0], "count": count}]
        extra = {"exclude": [{"class": kinds[0], "count": count + 1}]}
    elif tag in ("colors", "color_attr"):
        text = " and ".join(f"a {color} {kind}" for color, kind in zip(colors, kinds, strict=True))
        include = [{"class": k, "count": 1, "color": c} for k, c in zip(kinds, colors, strict=True)]
    elif tag == "position":
        text = f"a {kinds[0]} {relation} a {kinds[1]}"
        # GenEval lists the reference object first; the positioned one points at it by index.
        include = [
            {"class": kinds[1], "count": 1},
            {"class": kinds[0], "count": 1, "position": [relation, 0]},
        ]
    else:
        raise ValueError(f"tag: {tag!r} is none of {', '.join(TAGS)}")
    return {"tag": tag, "include": include, **extra, "prompt": f"a photo of {text}"}


def all_metadata() -> dict[str, list[dict]]:
    """Every description the world can pose, by tag, in a fixed order."""
    pairs = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    hues = [(a, b) for a in COLORS for b in COLORS if a != b]
    return {
        "single_object": [describe("single_object", [k]) for k in SHAPES],
        "two_object": [describe("two_object", p) for p in pairs],
        "counting": [describe("counting", [k], count=n) for k in SHAPES for n in NUMBERS],
        "colors": [describe("colors", [k], [c]) for k in SHAPES for c in COLORS],
        "position": [describe("position", p, relation=r) for p in pairs for r in RELATIONS],
        "color_attr": [describe("color_attr", p, c) for p in pairs for c in hues],
    }


def _split() -> tuple[list[dict], frozenset[str]]:
    """Choose the evaluation prompts, and those of them that no training caption contains."""
    rng = np.random.default_rng(20260)
    everything = all_metadata()
    suite: list[dict] = []
    unseen: set[str] = set()
    for tag, (posed, withheld) in {
        "single_object": (4, 0),
        "two_object": (12, 3),
        "counting": (12, 0),
        "colors": (20, 4),
        "position": (32, 16),
        "color_attr": (40, 40),
    }.items():
        order = rng.permutation(len(everything[tag]))
        suite += [everything[tag][i] for i in sorted(order[:posed])]
        unseen |= {everything[tag][i]["prompt"] for i in order[:withheld]}
    return suite, frozenset(unseen)


EVAL_METADATA, HELD_OUT = _split()


def _coverage(kind: str, dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    """Boolean inside-test of a shape of radius ``r`` at offsets (dx, dy) from its centre."""
    if kind == "circle":
        return dx * dx + dy * dy <= r * r
    if kind == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) <= 0.92 * r
    if kind == "triangle":
        return (dy <= r) & (dy >= -r) & (np.abs(dx) <= (dy + r) / 2 * 1.05)
    if kind == "cross":
        arm = 0.34 * r
        return (np.minimum(np.abs(dx), np.abs(dy)) <= arm) & (np.maximum(np.abs(dx), np.abs(dy)) <= 1.05 * r)
    raise ValueError(f"shape: {kind!r} is none of {', '.join(SHAPES)}")


def _grid() -> tuple[np.ndarray, np.ndarray]:
    centres = (np.arange(SIZE * SUPERSAMPLE, dtype=np.float32) + 0.5) / SUPERSAMPLE
    return centres[None, :], centres[:, None]


def coverage(shape: Shape) -> np.ndarray:
    """Antialiased alpha of one shape, (SIZE, SIZE) in [0, 1]."""
    x, y = _grid()
    inside = _coverage(shape.kind, x - shape.x, y - shape.y, shape.radius)
    return inside.reshape(SIZE, SUPERSAMPLE, SIZE, SUPERSAMPLE).mean((1, 3), dtype=np.float32)


def render(objects: Sequence[Shape], rng: np.random.Generator) -> np.ndarray:
    """Draw the objects over a fresh background; returns (SIZE, SIZE, 3) uint8."""
    level, slope, angle = rng.uniform(85, 135), rng.uniform(0, 24), rng.uniform(0, 2 * np.pi)
    ramp = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE - 0.5
    grey = level + slope * (np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None])
    canvas = (grey + GRAIN * rng.standard_normal((SIZE, SIZE)))[..., None].repeat(3, axis=2)
    for shape in objects:
        color = np.array(COLORS[shape.color]) + rng.uniform(-6, 6, 3)
        alpha = coverage(shape)[..., None]
        canvas = canvas * (1 - alpha) + alpha * color
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def _place(kinds: Sequence[str], colors: Sequence[str], cells: Sequence[int], rng: np.random.Generator) -> list[Shape]:
    placed = []
    for kind, color, cell in zip(kinds, colors, cells, strict=True):
        dx, dy = rng.uniform(-1, 1, 2)
        x, y = CELL * (cell % 2) + CELL / 2 + dx, CELL * (cell // 2) + CELL / 2 + dy
        placed.append(Shape(kind, color, float(x), float(y), float(rng.choice((5.4, 6.4)))))
    return placed


def _cells_for(relation: str, rng: np.random.Generator) -> tuple[int, int]:
    """Two cells (first, second) in one row or column with first ``relation`` second."""
    low, high = {0: (0, 1), 1: (2, 3), 2: (0, 2), 3: (1, 3)}[
        int(rng.integers(2)) + (0 if relation in ("left of", "right of") else 2)
    ]
    return (low, high) if relation in ("left of", "above") else (high, low)


def sample(seed: int, *, metadata: dict | None = None, held_out: frozenset[str] = HELD_OUT) -> Scene:
    """Draw scene number ``seed``: of any training caption, or of the given metadata.

    Captions in ``held_out`` are redrawn, so a training set never contains an evaluation prompt marked unseen.
    """
    rng = np.random.default_rng([7041, seed])
    if metadata is None:
        posed = all_metadata()
        while metadata is None or metadata["prompt"] in held_out:
            tag = TAGS[rng.choice(len(TAGS), p=TAG_WEIGHTS)]
            metadata = posed[tag][rng.integers(len(posed[tag]))]
    include = metadata["include"]
    kinds = [group["class"] for group in include for _ in range(group["count"])]
    hues = list(COLORS)
    colors = [group.get("color") or hues[rng.integers(len(hues))] for group in include for _ in range(group["count"])]
    if metadata["tag"] == "position":
        second, first = _cells_for(include[1]["position"][0], rng)[::-1]
        cells: Sequence[int] = (second, first)
    else:
        cells = rng.permutation(4)[: len(kinds)].tolist()
    objects = _place(kinds, colors, cells, rng)
    return Scene(render(objects, rng), tuple(objects), metadata)
