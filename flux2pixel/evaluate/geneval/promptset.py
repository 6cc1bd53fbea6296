"""GenEval's 553 prompts with their metadata, drawn as the official generator draws them.

Protocol: djghosh13/geneval, ``prompts/create_prompts.py`` with seed 43 and n = 100. The lines are byte-identical to the
official ``evaluation_metadata.jsonl``; quirks of the language ("a photo of two benchs") are the benchmark's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flux2pixel.evaluate.geneval.verdict import COLORS
from flux2pixel.evaluate.suite import Prompt
from flux2pixel.runtime.errors import UsageError

SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
SAMPLES = 4
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four")
# COCO's classes in its order, which is the detector's; mouse, remote and keyboard carry GenEval's longer names.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis",
    "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _plural(name: str) -> str:
    return f"{name}{'es' if name.endswith('s') else 's'}"


def _draws(rng: np.random.Generator, repeats: int) -> Iterator[dict[str, Any]]:
    """Draw all metadata, duplicates included; one generator feeds every block, so their order is part of the seed."""

    def things(count: int, first: int = 0) -> list[str]:
        """Distinct classes; ``first`` = 1 leaves out person, which has no colour of its own."""
        return [CLASSES[first + i] for i in rng.choice(len(CLASSES) - first, size=count, replace=False)]

    for name in things(len(CLASSES)):
        yield {
            "tag": "single_object",
            "include": [{"class": name, "count": 1}],
            "prompt": f"a photo of {_article(name)}",
        }
    for _ in range(repeats):
        a, b = things(2)
        yield {
            "tag": "two_object",
            "include": [{"class": a, "count": 1}, {"class": b, "count": 1}],
            "prompt": f"a photo of {_article(a)} and {_article(b)}",
        }
    for _ in range(repeats):
        name, number = CLASSES[rng.choice(len(CLASSES))], int(rng.integers(2, 5))
        yield {
            "tag": "counting",
            "include": [{"class": name, "count": number}],
            "exclude": [{"class": name, "count": number + 1}],
            "prompt": f"a photo of {NUMBERS[number]} {_plural(name)}",
        }
    for _ in range(repeats):
        name, color = CLASSES[1 + rng.choice(len(CLASSES) - 1)], COLORS[rng.choice(len(COLORS))]
        yield {
            "tag": "colors",
            "include": [{"class": name, "count": 1, "color": color}],
            "prompt": f"a photo of {_article(color)} {name}",
        }
    for _ in range(repeats):
        a, b = things(2)
        relation = RELATIONS[rng.choice(len(RELATIONS))]
        yield {
            "tag": "position",
            "include": [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}],
            "prompt": f"a photo of {_article(a)} {relation} {_article(b)}",
        }
    for _ in range(repeats):
        a, b = things(2, first=1)
        one, other = (COLORS[i] for i in rng.choice(len(COLORS), size=2, replace=False))
        yield {
            "tag": "color_attr",
            "include": [{"class": a, "count": 1, "color": one}, {"class": b, "count": 1, "color": other}],
            "prompt": f"a photo of {_article(one)} {a} and {_article(other)} {b}",
        }


def metadata() -> list[dict[str, Any]]:
    """Return the 553 metadata objects in the official order; exact duplicates among the 580 draws are dropped."""
    drawn = {json.dumps(row): row for row in _draws(np.random.default_rng(43), 100)}
    return list(drawn.values())


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    """Return the bytes of ``evaluation_metadata.jsonl`` for these rows."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def digest(rows: list[dict[str, Any]]) -> str:
    """SHA-256 of `jsonl`: equals `SHA256` for the official prompts."""
    return hashlib.sha256(jsonl(rows)).hexdigest()


def read(path: Path) -> list[dict[str, Any]]:
    """Read a metadata file of one's own; UsageError with the line for what `judge` could not use."""
    rows: list[dict[str, Any]] = []
    first: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a GenEval metadata file ({error})") from error
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}: not JSON ({error}); want one metadata object a line") from error
        _check(row, where)
        if line in first:
            raise UsageError(f"{where}: the same as line {first[line]}; drop one")
        first[line] = number
        rows.append(row)
    if not rows:
        raise UsageError(f"{path}: holds no prompt")
    return rows


def _check(row: Any, where: str) -> None:
    if not isinstance(row, dict) or not {"tag", "include", "prompt"} <= row.keys():
        raise UsageError(f"{where}: want an object with tag, include and prompt, as in evaluation_metadata.jsonl")
    for clause in (*row["include"], *row.get("exclude", ())):
        if not isinstance(clause, dict) or not {"class", "count"} <= clause.keys():
            raise UsageError(f"{where}: every clause of include and exclude needs class and count")
        if clause.get("color", COLORS[0]) not in COLORS:
            raise UsageError(f"{where}: color {clause['color']!r} is none of {', '.join(COLORS)}")
        if clause.get("position", RELATIONS)[0] not in RELATIONS:
            raise UsageError(f"{where}: relation {clause['position'][0]!r} is none of {', '.join(RELATIONS)}")


def prompts(rows: list[dict[str, Any]], samples: int = SAMPLES) -> list[Prompt]:
    """Return the suite's prompts; ids are the official folder names 00000, 00001, ..."""
    return [Prompt(f"{i:05d}", row["prompt"], row["tag"], samples, row) for i, row in enumerate(rows)]
