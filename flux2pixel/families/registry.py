"""Bases that come with more than weights: their own pictures, suites and true images, registered by entry point.

A package declares ``[project.entry-points."flux2pixel.bases"]`` with ``<name> = "<module>:<Plugin>"``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

GROUP = "flux2pixel.bases"
_added: dict[str, Plugin] = {}


@dataclass(frozen=True)
class Plugin:
    """What a base brings; every callable imports what it needs when it is called.

    ``suites`` maps a suite's name to what opens the base's own rows and judge of it (`evaluate.suites.OwnSuite`),
    ``sources`` a source's name to what opens its pictures, ``truth`` draws true images of a suite's rows.
    """

    name: str
    folder: Path
    sources: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    suites: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    truth: Callable[..., Any] | None = None


def register(plugin: Plugin) -> None:
    """Add a plug-in without an entry point, for this process alone."""
    _added[plugin.name] = plugin


@cache
def _declared() -> dict[str, Any]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


@cache
def _load(name: str) -> Plugin:
    found: Plugin = _declared()[name].load()
    return found


def plugin(name: str) -> Plugin | None:
    """The plug-in of the base of this name, None if it has none."""
    return _added.get(name) or (_load(name) if name in _declared() else None)
