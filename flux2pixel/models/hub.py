"""Bases on the Hugging Face Hub: huggingface_hub downloads, caches and resumes; here is which files, what to say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flux2pixel.runtime.errors import UsageError, first_line
from flux2pixel.runtime.progress import log

PARTS = ("transformer", "vae", "scheduler", "text_encoder*", "tokenizer*")
INDEXES = ("model_index.json", "modular_model_index.json")


def download(repo: str, parts: Sequence[str] = PARTS) -> Path:
    """Fetch ``parts`` of a Hub repository, or what is missing of them; returns the snapshot's folder.

    The configurations of all parts come too; original single-file weights beside them do not. A download that was cut
    off goes on where it stopped.
    Raises UsageError with what to do if the repository is gated, absent, or cannot be reached and is not cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    page = f"https://huggingface.co/{repo}"
    log(f"base: {repo} from the Hub, or its cache")
    try:
        wanted = [*INDEXES, "*/config.json", "*/scheduler_config.json", *(f"{part}/*" for part in parts)]
        folder = Path(snapshot_download(repo, allow_patterns=wanted))
    except GatedRepoError as error:
        raise UsageError(
            f"base: {repo} is gated; accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"base: {repo} is not on the Hub, or private; check the name, or log in with `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UsageError(
            f"base: {repo} is not in the local cache and the Hub cannot be reached; connect and run again, "
            "or give --base a folder that holds it"
        ) from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        reason = first_line(error)
        raise UsageError(f"base: {repo}: the download stopped ({reason}); run again to resume it") from error
    if not (folder / "transformer" / "config.json").is_file():
        raise UsageError(f"base: {repo} has no transformer/config.json: not a base in diffusers' format; see {page}")
    return folder
