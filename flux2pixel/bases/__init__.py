"""Everything that differs between base models, one module per family."""

from __future__ import annotations

from pathlib import Path

from flux2pixel.errors import UsageError

ALIASES = {"klein-tiny": Path(__file__).parent.parent / "miniature" / "klein-tiny"}


def resolve(base: str) -> Path:
    """Turn an alias or a folder into the base's folder. Raises UsageError if there is neither."""
    folder = ALIASES.get(base, Path(base))
    if not (folder / "model_index.json").is_file():
        known = ", ".join(ALIASES)
        raise UsageError(f"base: {base!r} is neither a known alias ({known}) nor a folder with a model_index.json")
    return folder
