"""Writing without leftovers: a file or folder appears whole, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.progress import log

WINDOWS = os.name == "nt"
LISTING = ".flux2pixel.json"  # in a folder that we wrote: which stage did, and the names of its files


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Call ``save(temporary)``, sync, and rename to ``path``; on any failure nothing is left.

    The temporary file is beside ``path`` under a name of this call alone, so writers of one path never meet: the last
    wins whole. Permissions are those of the user's umask. Raises Flux2PixelError naming ``path`` when the disk is full
    or refuses the write.
    """
    temporary = _beside(path)
    try:
        with _write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            mode = _create(temporary)
            save(temporary)
            temporary.chmod(mode)  # safetensors writes for the owner's eyes only
            _sync_one(temporary)
            os.replace(temporary, path)
            _sync_one(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path, suffix: str = "tmp") -> Path:
    """A name in the folder of ``path`` that is ours alone."""
    return path.with_name(f".flux2pixel-{secrets.token_hex(8)}.{suffix}")


def _create(path: Path) -> int:
    """Make an empty file and return its mode: the umask's, which cannot be asked for without changing it for all."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)


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
def new_folder(path: Path, stage: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block succeeds and vanishes when it fails.

    A symlink is followed: the folder that it names is replaced, on the disk where that is. The folder gets a list of
    its files (``LISTING``), by which a later call knows what is ours. Raises UsageError as :func:`check_new` does,
    before the block.
    """
    path = path.resolve()
    check_new(path, stage, overwrite)
    if path.is_dir() and any(path.iterdir()):
        log(f"{stage}: {path} is there already and will be replaced")
    temporary, retired = _beside(path), _beside(path, "old")
    try:
        with _write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            _finish(temporary, stage)
            check_new(path, stage, overwrite)  # hours may have passed
            if path.exists():
                os.rename(path, retired)
            try:
                os.rename(temporary, path)
            except OSError:
                if retired.exists():
                    os.rename(retired, path)
                raise
            _sync_one(path.parent)
            shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new(path: Path, stage: str, overwrite: bool = False) -> None:
    """Raise UsageError unless ``stage`` may write a folder at ``path``: for long work, to be called before it.

    It may be absent or empty; or the same stage's own, with no file in it that the stage did not write; or, to
    ``overwrite``, whatever flux2pixel wrote there, with all that was put into it since.
    """
    path = path.resolve()
    if path.is_mount():
        raise UsageError(f"{path}: a disk is mounted here, so it cannot be replaced as a whole; name a folder in it")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not any((path / name).is_file() for name in (LISTING, "asymflow.json", "conversion.json")):
        raise UsageError(f"{path}: exists and was not written by flux2pixel; choose another --out or empty it")
    if overwrite:
        return
    if not (path / LISTING).is_file():
        raise UsageError(f"{path}: an older flux2pixel wrote it and listed no files; move it away, or delete it")
    listed = json.loads((path / LISTING).read_text())
    if listed["stage"] != stage:
        raise UsageError(f"{path}: was written by {listed['stage']}, not {stage}; choose another --out or move it away")
    if foreign := sorted(_names(path) - set(listed["files"])):
        raise UsageError(
            f"{path}: has {len(foreign)} files that {stage} did not write ({', '.join(foreign[:3])}); "
            f"move them, or the folder, away"
        )


def _names(folder: Path) -> set[str]:
    """Every file and empty folder below ``folder``, and links as what they are, but the listing."""
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir() or not any(p.iterdir())}
    return found - {LISTING}


def _finish(folder: Path, stage: str) -> None:
    """List the files, give them the umask's permissions, and have all of it reach the disk."""
    listing = folder / LISTING
    listing.unlink(missing_ok=True)  # it may have come with a copied model, as a link even
    listing.write_text(json.dumps({"stage": stage, "files": sorted(_names(folder))}, indent=1) + "\n")
    probe = _beside(listing)
    mode = _create(probe)
    probe.unlink()
    for file in folder.rglob("*"):
        # A file with another name elsewhere is shared, such as with the base: its mode is not ours to change.
        if file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1:
            file.chmod(mode)
    sync(folder)


def sync(folder: Path) -> None:
    """Have every file and folder under ``folder`` reach the disk, so that a rename after it is a promise."""
    for path in (*folder.rglob("*"), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    """fsync. Windows does that for files open for writing only, and not at all for folders."""
    if WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
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
