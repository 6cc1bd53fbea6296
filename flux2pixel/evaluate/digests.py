"""Digests of files and folders, remembered by size and time of change: 18 GB of weights are not read twice."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from flux2pixel.runtime import files
from flux2pixel.runtime.errors import UsageError

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
CONFIGS = (".json", ".txt", ".model", ".jinja", ".csv", ".yaml")


class Digests:
    """SHA-256 of files, kept in a small JSON file between runs.

    A file whose size and modification time (ns) are as noted is not read again.
    """

    def __init__(self, path: Path):
        self._path = path
        self._known: dict[str, tuple[int, int, str]] = {}
        self._changed = False
        if path.is_file():
            try:
                self._known = {
                    name: (int(a), int(b), str(c)) for name, (a, b, c) in json.loads(path.read_text()).items()
                }
            except (ValueError, TypeError, AttributeError):
                self._known = {}  # only a memory: what it lost is read again

    def of_file(self, path: Path) -> str:
        """SHA-256 of the file, hexadecimal. Raises OSError if it cannot be read."""
        path = path.resolve()
        stat = path.stat()
        known = self._known.get(str(path))
        if known is None or known[:2] != (stat.st_size, stat.st_mtime_ns):
            known = (stat.st_size, stat.st_mtime_ns, files.digest(path))
            self._known[str(path)] = known
            self._changed = True
        return known[2]

    def of_files(self, paths: Iterable[Path], root: Path) -> str:
        """One digest of several files under ``root``, by relative name and content."""
        lines = (f"{path.relative_to(root).as_posix()} {self.of_file(path)}\n" for path in sorted(paths))
        return sha256("".join(lines).encode()).hexdigest()

    def of_model(self, folder: Path, parts: Iterable[str] = (".",)) -> str:
        """One digest of a model folder (or of ``parts`` of it): weights, configurations and tokenizers."""
        found: set[Path] = set()
        for part in parts:
            inside = (folder / part).rglob("*") if (folder / part).is_dir() else ()
            found |= {path for path in inside if path.suffix in WEIGHTS + CONFIGS and path.is_file()}
        if not found:
            raise UsageError(f"{folder}: holds no weights or configuration; give a model folder")
        return self.of_files(found, folder)

    def save(self) -> None:
        """Write what was learnt, atomically."""
        if self._changed:
            files.write(self._path, lambda temporary: temporary.write_text(json.dumps(self._known)))
            self._changed = False
