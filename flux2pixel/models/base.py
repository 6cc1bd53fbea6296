"""Shim until the checkpoint's own module is merged."""

from __future__ import annotations

import tomllib
from typing import Any

import torch
from torch import Tensor

from flux2pixel import families
from flux2pixel.families import resolve as resolve
from flux2pixel.families.base import Base as Base
from flux2pixel.families.base import read_config


def open_base(name: Any, dtype: torch.dtype | None = None, device: torch.device | None = None, **options: Any) -> Base:
    base = families.open_base(name, dtype, **options)
    base.device = device or torch.device("cpu")
    return base


def _defaults(self: Base) -> dict[str, Any]:
    path = self.folder / "flux2pixel.toml"
    return tomllib.loads(path.read_text()) if path.is_file() else {}


def _levels(self: Base, steps: int, tokens: int) -> Tensor:
    from flux2pixel.asymflow.schedule import grid

    config = read_config(self.folder / "scheduler" / "scheduler_config.json")
    return grid(steps, float(config["shift"]))


Base.defaults = property(_defaults)  # type: ignore[attr-defined]
Base.levels = _levels  # type: ignore[attr-defined]
Base.free_text = lambda self: None  # type: ignore[attr-defined]
