"""Models on the Hugging Face Hub: huggingface_hub downloads, caches and resumes; here is which files, what to say."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flux2pixel.runtime.errors import UsageError, first_line
from flux2pixel.runtime.progress import log

PARTS = ("transformer", "vae", "scheduler", "text_encoder*", "tokenizer*")
INDEXES = ("model_index.json", "modular_model_index.json")
CONFIGS = (*INDEXES, "*/config.json", "*/scheduler_config.json")
SPARE = 2**30  # bytes to leave free on a disk


def download(repo: str, parts: Sequence[str] = PARTS, revision: str | None = None, *, offline: bool = False) -> Path:
    """Fetch ``parts`` of a Hub repository, or what is missing of them; returns the snapshot's folder.

    The configurations of all parts come too; original single-file weights beside them do not. A download that was cut
    off goes on where it stopped. ``revision`` is a branch, tag or commit; ``offline`` asks the local cache alone.
    Raises UsageError with what to do if the repository is gated, absent, or cannot be reached and is not cached, or
    the disk of the cache is too small.
    """
    from huggingface_hub import snapshot_download

    wanted = [*CONFIGS, *(f"{part}/*" for part in parts)]
    named = f"{repo}@{revision}" if revision else repo
    with _one_line(named, repo):
        if offline:
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, local_files_only=True))
        else:
            log(f"base: {named} from the Hub, or its cache")
            _check_space(named, repo, revision, wanted)
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    if not (folder / "transformer" / "config.json").is_file():
        page = f"https://huggingface.co/{repo}"
        raise UsageError(f"base: {named} has no transformer/config.json: not a base in diffusers' format; see {page}")
    return folder


def _check_space(named: str, repo: str, revision: str | None, wanted: Sequence[str]) -> None:
    """Raise UsageError if what is missing in the cache does not fit on its disk."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        return
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except (OSError, ConnectionError, TimeoutError) as error:
        if type(error).__module__.startswith("huggingface_hub"):
            raise  # gated, absent: the answer
        return  # not reached: the cache may have it
    missing = 0
    for file in info.siblings or ():
        if file.size and any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in wanted):
            cached = try_to_load_from_cache(repo, file.rfilename, revision=info.sha)
            missing += 0 if isinstance(cached, str) and os.path.isfile(cached) else file.size
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(path for path in (cache, *cache.absolute().parents) if path.exists())).free
    if missing + SPARE > free and missing:
        raise UsageError(
            f"base: {named} needs {missing / 1e9:.1f} GB, {free / 1e9:.1f} GB are free at {cache}; free some, or set "
            "HF_HUB_CACHE to another disk"
        )


@contextmanager
def _one_line(named: str, repo: str) -> Iterator[None]:
    """What the Hub refuses, in one line with what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        page = f"https://huggingface.co/{repo}"
        raise UsageError(
            f"base: {named} is gated; accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(f"base: {named}: the repository has no such revision; name a branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        mistyped = "" if Path(repo).parent == Path() or not Path(repo).parent.is_dir() else _beside(repo)
        raise UsageError(
            f"base: {named} is not on the Hub, or private, and no folder here; check the name, or log in with "
            f"`hf auth login`{mistyped}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UsageError(
            f"base: {named} is not in the local cache and the Hub cannot be reached, or was not to be asked; "
            "connect and run again, or give --base a folder that holds it (no folder of this name is here)"
        ) from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        reason = first_line(error)
        raise UsageError(f"base: {named}: the download stopped ({reason}); run again to resume it") from error


def _beside(path: str) -> str:
    """What else is in the folder that a mistyped path names."""
    there = sorted(one.name for one in Path(path).parent.iterdir() if one.is_dir())[:5]
    return f"; {Path(path).parent}/ holds {', '.join(there) or 'no folder'}"
