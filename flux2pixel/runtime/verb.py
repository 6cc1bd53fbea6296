"""Packages that are called by their own name."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any


class Verb(ModuleType):
    """A verb's package that is also its function: ``flux2pixel.convert(recipe, run)`` is that of ``convert.run``.

    ``import flux2pixel.convert.plan`` must go on working, so the package cannot give way to the function.
    """

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Call the function of the package's name in its module ``run``."""
        return getattr(import_module(f"{self.__name__}.run"), self.__name__.rpartition(".")[2])(*given, **named)
