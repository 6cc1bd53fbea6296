"""What eval keeps on disk, each under the digest of what it was made from, so that a rerun makes nothing again.

Digests   of files and model folders, remembered by size and time of change: 18 GB of weights are not read twice
Texts     conditionings of prompts, one file each, shared by all models of one text encoder and by all processes
Ledger    records: what an image scored, one JSON line each
Memo      figures of whole sets
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from flux2pixel.evaluate.png import settings_digest
from flux2pixel.evaluate.suite import Record
from flux2pixel.families.base import Conditioning, stack
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.version import __version__

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
CONFIGS = (".json", ".txt", ".model", ".jinja", ".csv", ".yaml")
LIBRARIES = ("torch", "diffusers", "transformers", "open_clip_torch", "safetensors", "numpy", "pillow")
CHUNK = 16  # prompts given to an encoder at once; `Base.text` cuts them further by tokens
Key = tuple[str, str, str, int]  # digest of the image, digest of the judge, prompt id, sample index
Encode = Callable[[list[str]], Conditioning]


def versions() -> dict[str, str]:
    """Versions of what computes: this package, Python and the libraries."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"flux2pixel": __version__, "python": platform.python_version()} | found


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


class Texts:
    """Conditionings on disk in the dtype they were made in, one file a prompt in the folder of its encoder's digest.

    What one model or process encoded, every other with the same text encoder reads.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def _path(self, encoder: str, prompt: str) -> Path:
        return self._folder / encoder[:32] / f"{sha256(prompt.encode()).hexdigest()[:32]}.safetensors"

    def missing(self, encoder: str, prompts: Iterable[str]) -> list[list[str]]:
        """The distinct prompts that were never encoded, in order, cut into the chunks to encode at once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if not self._path(encoder, prompt).is_file()]
        return [new[first : first + CHUNK] for first in range(0, len(new), CHUNK)]

    @torch.no_grad()
    def add(self, encoder: str, prompts: list[str], encode: Encode) -> None:
        """Encode prompts and keep each alone."""
        from safetensors.torch import save_file

        rows = encode(prompts)
        for index, prompt in enumerate(prompts):
            row = {name: value[index : index + 1].cpu().clone() for name, value in rows.items()}
            files.write(self._path(encoder, prompt), lambda temporary, row=row: save_file(row, temporary))  # type: ignore[misc]

    def of(self, encoder: str, prompts: Sequence[str]) -> Conditioning:
        """Conditioning with the batch in the order of ``prompts``; all must have been added."""
        rows = {prompt: files.read_tensors(self._path(encoder, prompt))[0] for prompt in dict.fromkeys(prompts)}
        # Joined, not padded here: rows of one encoder come from one call's length or carry a mask.
        return stack(*[rows[prompt] for prompt in prompts])


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
    """The records of one model and suite; ``process`` names the file that this process appends to.

    Lines are appended while scoring goes on, so that nothing scored is lost; one cut off by a crash is dropped.
    """

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
