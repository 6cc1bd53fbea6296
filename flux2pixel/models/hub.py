"""Models on the Hugging Face Hub: huggingface_hub downloads, caches and resumes; here is which files, what to say."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux2pixel.runtime.errors import UsageError, first_line
from flux2pixel.runtime.progress import log

PARTS = ("transformer", "vae", "scheduler", "text_encoder*", "tokenizer*")
INDEXES = ("model_index.json", "modular_model_index.json")
CONFIGS = (*INDEXES, "*/config.json", "*/scheduler_config.json")
SPARE = 2**30  # bytes to leave free on a disk


@dataclass(frozen=True)
class RemotePlan:
    """What a repository holds, known from its configurations and headers alone, without a download of weights.

    ``configs`` by part as in :class:`flux2pixel.families.base.Family`; ``tensors`` by part and name, each a dtype as
    safetensors names it and a shape; ``sizes`` in bytes by file; ``commit`` of the revision.
    """

    commit: str
    configs: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, tuple[str, tuple[int, ...]]]]
    sizes: dict[str, int]


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


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the Hub's cache is a snapshot of; None for any other folder."""
    folder = folder.absolute()
    return folder.name if folder.parent.name == "snapshots" else None


def remote_plan(repo: str, parts: Sequence[str] = ("transformer",), revision: str | None = None) -> RemotePlan:
    """Read configurations, sizes and the headers of ``parts``' weights over the network; nothing large is fetched.

    Raises UsageError as :func:`download`.
    """
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi()
    with _one_line(repo, repo):
        info = api.model_info(repo, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        configs: dict[str, dict[str, Any]] = {}
        tensors: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
        for name in sizes:
            if any(fnmatch.fnmatch(name, pattern) for pattern in CONFIGS):
                part = "model_index" if name in INDEXES else name.split("/")[0]
                configs[part] = json.loads(Path(hf_hub_download(repo, name, revision=info.sha)).read_text())
            part = name.split("/")[0]
            if name.endswith(".safetensors") and any(fnmatch.fnmatch(part, wanted) for wanted in parts):
                header = api.parse_safetensors_file_metadata(repo, name, revision=info.sha)
                found = {key: (str(t.dtype), tuple(t.shape)) for key, t in header.tensors.items()}
                tensors.setdefault(part, {}).update(found)
    return RemotePlan(str(info.sha), configs, tensors, sizes)


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
