"""The bases that register themselves, such as the one that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple


class Plugin(NamedTuple):
    """A base in the package or beside it: its folder, and what else it brings."""

    name: str
    folder: Path
    suites: Any = None
    sources: Any = ()
    truth: Any = None


def names() -> list[str]:
    """The aliases of all registered bases."""
    from flux2pixel.families import ALIASES

    return sorted(ALIASES)


def plugin(name: str) -> Plugin | None:
    """The registered base of that alias, or None."""
    from flux2pixel.families import ALIASES

    return Plugin(name, ALIASES[name], sources={"scenes": None}) if name in ALIASES else None
