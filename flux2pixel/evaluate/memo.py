"""Figures of whole sets, kept under the digest of what they were computed from: a rerun computes none again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flux2pixel.evaluate.png import settings_digest
from flux2pixel.runtime import files


class Memo:
    """A JSON file of computed values under digests of their inputs."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._known: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            self._known = {}  # only a memory

    def of(self, inputs: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The JSON value computed from ``inputs``, taken from the file if it is there."""
        key = settings_digest(inputs)
        if key not in self._known:
            self._known[key] = compute()
            files.write_json(self._path, self._known)
        return self._known[key]
