"""HPDv3's benchmark: twelve categories of prompts, each with the size that the official generator draws it at."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flux2pixel.evaluate.suite import Prompt
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import UsageError

CATEGORIES = (
    "Characters",
    "Arts",
    "Design",
    "Architecture",
    "Animals",
    "Natural Scenery",
    "Transportation",
    "Products",
    "Others",
    "Plants",
    "Food",
    "Science",
)
BASE = 1024


def size_of(entry: Mapping[str, Any]) -> tuple[int, int]:
    """The official ``(height, width)`` of an entry: 1024 x 1024 pixels at its aspect ratio, multiples of 64.

    The ratio is ``aspect_ratio`` where there is a real image (which the official script opens first, if it can), and
    ``width`` over ``height`` where there is none.
    """
    ratio = entry["aspect_ratio"] if entry.get("image_file") else entry["width"] / entry["height"]
    root = math.sqrt(ratio)
    return int(BASE / root // 64 * 64), int(BASE * root // 64 * 64)


def script_text(entry: Mapping[str, Any]) -> str:
    """The text that the official scripts score against: the caption, an empty line, the name of the image file.

    Their generator writes caption and name on lines of a .txt, and their benchmark joins the lines with one newline
    more, so that newlines inside a caption are doubled too.
    """
    written = f"{entry['caption']}\n{entry.get('image_file') or entry['save_name']}"
    return written.replace("\n", "\n\n")


def read(folder: Path) -> list[Prompt]:
    """Read ``benchmark_<Category>.json`` of all categories; the official size and script text are in ``data``.

    Ids number the entries of a category in the file's order. Raises UsageError for an absent file or a bad entry.
    """
    found: list[Prompt] = []
    for category in CATEGORIES:
        path = folder / f"benchmark_{category}.json"
        if not path.is_file():
            raise UsageError(f"{path}: absent; `flux2pixel eval --suite hpsv3 --fetch` gets the twelve categories")
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            found += [_prompt(category, number, entry) for number, entry in enumerate(entries)]
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}: not JSON ({error}); fetch it again") from error
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise UsageError(f"{path}: an entry lacks what HPDv3's have ({type(error).__name__}: {error})") from error
    return found


def unchanged(folder: Path, digests: Mapping[str, str]) -> bool:
    """Whether the files in ``folder`` are those that were fetched: ``digests`` are SHA-256 by name (``digests.json``).

    HPDv3 publishes no digests of its own, so the first fetch pins them.
    """
    names = [f"benchmark_{category}.json" for category in CATEGORIES]
    return all(digests.get(f"hpdv3/{name}") == files.digest(folder / name) for name in names)


def _prompt(category: str, number: int, entry: Mapping[str, Any]) -> Prompt:
    data = {"size": size_of(entry), "script_text": script_text(entry)}
    return Prompt(f"{category.replace(' ', '_')}-{number:05d}", str(entry["caption"]), category, 1, data)


def aggregate(rewards: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """The official table: count, mean, std, min and max of each category and OVERALL.

    OVERALL's mean and std are over the categories' means; its min and max over all images. Population deviations.
    """
    table = {
        name: {
            "count": len(values),
            "mean": float(np.mean(values)),
            "std": float(np.std(values)),
            "min": float(min(values)),
            "max": float(max(values)),
        }
        for name, values in rewards.items()
    }
    means = [row["mean"] for row in table.values()]
    every = [value for values in rewards.values() for value in values]
    table["OVERALL"] = {
        "count": len(every),
        "mean": float(np.mean(means)),
        "std": float(np.std(means)),
        "min": float(min(every)),
        "max": float(max(every)),
    }
    return table
