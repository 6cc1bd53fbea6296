"""What a base brings along beside its weights: suites, sources and truth of its own, found as entry points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Plugin:
    """A base with a world of its own."""

    name: str
    folder: str
    suites: Callable[..., Any] | None = None
    sources: Callable[..., Any] | None = None
    truth: Callable[..., Any] | None = None


@cache
def _known() -> dict[str, Plugin]:
    return {one.name: one for one in [import_module("flux2pixel.miniature").klein_tiny]}


def plugin(base_name: str) -> Plugin | None:
    """The plug-in of a base, if it has one."""
    return _known().get(base_name)
