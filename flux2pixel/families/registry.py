"""Bases that come with a package rather than from the Hub: each registers by an entry point, and is asked for by name.

A package names a :class:`Plugin` in its entry points, group ``flux2pixel.bases``, under the base's alias:

    [project.entry-points."flux2pixel.bases"]
    my-base = "my_package:my_base"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from flux2pixel.runtime.errors import UsageError

GROUP = "flux2pixel.bases"


@dataclass(frozen=True)
class Plugin:
    """A base that brings what the Hub's bases take from elsewhere.

    ``folder`` is its checkpoint; ``sources`` and ``suites`` are the training images and the evaluations that only it
    has, by name, and ``truth`` its true images for the fidelity figures: callables that import what they need when they
    are called. ``licence`` is that of the checkpoint.
    """

    name: str
    folder: Path
    suites: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    sources: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    truth: Callable[..., Any] | None = None
    licence: str = "Apache-2.0"


@cache
def _found() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=GROUP)}


def names() -> list[str]:
    """The aliases of all registered bases."""
    return sorted(_found())


def plugin(name: str) -> Plugin | None:
    """The registered base of that alias, or None. Raises UsageError if its package cannot be imported."""
    point = _found().get(name)
    if point is None:
        return None
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"base: {name!r} is registered by {point.value}, which fails: {error}") from error
    if not isinstance(found, Plugin):
        raise UsageError(f"base: {name!r} is registered by {point.value}, which is no flux2pixel Plugin")
    return found
