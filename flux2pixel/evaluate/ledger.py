"""Records on disk: what an image scored, under the digests of the image and of the scorer, one JSON line each.

Lines are appended while scoring goes on, by every process to its own file, so that nothing scored is lost; a line cut
off by a crash is dropped and its image scored again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux2pixel.evaluate.suite import Record
from flux2pixel.runtime import files

Key = tuple[str, str, str, int]  # digest of the image, digest of the scorer, prompt id, sample index


@dataclass(frozen=True)
class Entry:
    """One scored sample and what it was scored from."""

    image: str
    scorer: str
    record: Record

    @property
    def key(self) -> Key:
        return (self.image, self.scorer, self.record.prompt, self.record.index)


class Ledger:
    """The records of one model and suite; ``process`` names the file that this process appends to."""

    def __init__(self, path: Path, process: int = 0):
        self._path, self._own = path, path.with_name(f"{path.stem}.{process}{path.suffix}")
        self._known: dict[Key, Entry] = {}
        for part in (path, *sorted(path.parent.glob(f"{path.stem}.*{path.suffix}"))):
            self._known |= {entry.key: entry for entry in _read(part)}

    def get(self, key: Key) -> Record | None:
        """The record under a key, if there is one."""
        entry = self._known.get(key)
        return entry.record if entry else None

    def add(self, entry: Entry) -> None:
        """Append one entry."""
        self._known[entry.key] = entry
        self._own.parent.mkdir(parents=True, exist_ok=True)
        line = {"image": entry.image, "scorer": entry.scorer, "record": entry.record.as_dict()}
        with self._own.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def settle(self, keys: Iterable[Key]) -> None:
        """Write the entries under ``keys`` to one file and remove the processes' own. For one process, at the end."""
        parts = sorted(self._path.parent.glob(f"{self._path.stem}.*{self._path.suffix}"))
        lines = []
        for key in keys:
            entry = self._known[key]
            lines.append(
                json.dumps({"image": entry.image, "scorer": entry.scorer, "record": entry.record.as_dict()}) + "\n"
            )
        whole = "".join(lines)
        if parts or not self._path.is_file() or self._path.read_text(encoding="utf-8") != whole:
            files.write(self._path, lambda temporary: temporary.write_text(whole, encoding="utf-8"))
        for part in parts:
            part.unlink()


def _read(path: Path) -> list[Entry]:
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row: dict[str, Any] = json.loads(line)
            found.append(Entry(row["image"], row["scorer"], Record(**row["record"])))
        except (ValueError, KeyError, TypeError):
            continue  # cut off in a crash: its image is scored again
    return found
