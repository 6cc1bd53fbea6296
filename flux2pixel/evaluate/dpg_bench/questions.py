"""DPG-Bench's questions file: read, checked, and turned into the suite's prompts."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flux2pixel.evaluate.suite import Prompt
from flux2pixel.runtime.errors import UsageError

TEXTS_SHA256 = (
    "07e28c32fc79d71af5087b566a6c6bbffe279c875e44edbb6df93c7e398fc6ae"  # `texts_digest` of the 1065 .txt files
)
GIT_BLOB = "98457fc9901943f51ff9a30367250fc292533bed"
COLUMNS = (
    "item_id",
    "text",
    "keywords",
    "proposition_id",
    "dependency",
    "category_broad",
    "category_detailed",
    "tuple",
    "question_natural_language",
)
CROPS = 4


def git_blob(content: bytes) -> str:
    """The id that git gives to a file of these bytes: SHA-1 over a header and the content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def read(path: Path) -> tuple[list[dict[str, str]], str]:
    """Read a questions csv: its rows and its git blob id (`GIT_BLOB` for the official file); UsageError if unusable."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as DPG-Bench's questions ({error})") from error
    reader = csv.DictReader(text.splitlines(keepends=True))
    lacking = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if lacking:
        raise UsageError(f"{path}: lacks the columns {', '.join(lacking)}; want dpg_bench.csv of ELLA")
    rows = list(reader)
    if not rows:
        raise UsageError(f"{path}: holds no question")
    return rows, git_blob(content)


def prompts(
    rows: Sequence[Mapping[str, Any]], texts: Mapping[str, str] | None = None, samples: int = CROPS
) -> list[Prompt]:
    """Return one prompt an item, in the csv's order; ``data["questions"]`` are its rows.

    ``texts`` maps item to the prompt to generate from where it is not the csv's own ``text``: the official .txt files
    differ from it in 13 items. The group is empty: categories belong to questions, not to items.
    """
    items: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        items.setdefault(str(row["item_id"]), []).append(dict(row))
    if texts is not None and (strange := sorted(texts.keys() - items.keys())):
        raise UsageError(f"{len(strange)} prompts without questions, such as {strange[0]}; use DPG-Bench's own ids")
    return [
        Prompt(item, texts[item] if texts and item in texts else str(own[0]["text"]), "", samples, {"questions": own})
        for item, own in items.items()
    ]


def read_texts(path: Path) -> dict[str, str]:
    """Read prompts to generate from, byte for byte: a folder of ``<item>.txt``, or JSON Lines of id and prompt."""
    if path.is_dir():
        texts = {file.stem: file.read_bytes().decode("utf-8") for file in sorted(path.glob("*.txt"))}
    else:
        texts = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                key, text = row["id"], row["prompt"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UsageError(f"{path}:{number}: want an object with id and prompt ({error})") from error
            if key in texts:
                raise UsageError(f"{path}:{number}: id {key} was there before; ids must be unique")
            texts[key] = text
    if not texts:
        raise UsageError(f"{path}: no prompts there")
    return texts


def texts_digest(texts: Mapping[str, str]) -> str:
    """SHA-256 of prompts to generate from, by item."""
    return hashlib.sha256(json.dumps(sorted(texts.items())).encode()).hexdigest()
