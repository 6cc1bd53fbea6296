"""Writing without leftovers: a file or folder appears whole, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flux2pixel.runtime.errors import Flux2PixelError, UsageError


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Call ``save(temporary)``, sync, and rename to ``path``; on any failure nothing is left.

    Raises Flux2PixelError naming ``path`` when the disk is full or refuses the write.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with _write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            save(temporary)
            _share(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _share(*written: Path) -> None:
    """Give files the permissions of the user's umask: safetensors writes for the owner's eyes only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in written:
        path.chmod(0o666 & ~mask)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Name the file and the cure when the disk is full or read-only, whichever library hears of it first."""
    try:
        yield
    except Exception as error:
        reason = _why_unwritable(error)
        if reason is None:
            raise
        raise Flux2PixelError(
            f"{path}: cannot be written ({reason}); free some space or choose another --out. Nothing was left behind"
        ) from error


def _why_unwritable(error: Exception) -> str | None:
    """The operating system's words if ``error`` is its refusal to write, else None."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        # shutil gathers errors as text, and safetensors has an exception of its own with the number in it.
        if getattr(error, "errno", None) == number or re.search(rf"(Errno|os error) {number}\b", str(error)):
            return os.strerror(number)
    return None


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``path`` when the block succeeds and vanishes when it fails.

    Only an absent or empty folder, or one that flux2pixel itself wrote, is replaced; else UsageError.
    """
    ours = any((path / name).exists() for name in ("asymflow.json", "conversion.json"))
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not ours)):
        raise UsageError(f"{path}: exists and was not written by flux2pixel; choose another --out or empty it")
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _write_errors(path):
            temporary.mkdir(parents=True)
            yield temporary
            # A file with another name elsewhere is shared, such as with the base: its mode is not ours to change.
            _share(*(file for file in temporary.rglob("*") if file.is_file() and file.stat().st_nlink == 1))
            sync(temporary)
            retired = path.with_name(path.name + ".old")
            shutil.rmtree(retired, ignore_errors=True)
            if path.exists():
                os.replace(path, retired)
            os.replace(temporary, path)
            _sync_one(path.parent)
            shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(folder: Path) -> None:
    """Have every file and folder under ``folder`` reach the disk, so that a rename after it is a promise."""
    for path in (*folder.rglob("*"), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Read a safetensors file: tensors and metadata. One clear line if it is absent, truncated or something else."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise Flux2PixelError(f"{path}: not a complete safetensors file ({error}); write or copy it again") from error
