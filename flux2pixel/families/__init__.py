"""Everything that differs between base models, one module per family. Importing this package loads nothing heavy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flux2pixel.families.known import KNOWN
from flux2pixel.models.hub import PARTS, download
from flux2pixel.runtime.errors import UsageError

if TYPE_CHECKING:
    import torch

    from flux2pixel.families.base import Base

ALIASES = {"klein-tiny": Path(__file__).parent.parent / "miniature" / "klein-tiny"}
"""Bases that come with the package; those on the Hub are in :data:`flux2pixel.families.known.KNOWN`."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(base: str, parts: Sequence[str] = PARTS) -> Path:
    """Turn an alias, a folder or a Hub id into the base's folder, downloading what is missing of ``parts``.

    Raises UsageError if there is no such base, or it cannot be had, or cannot be converted.
    """
    folder = ALIASES.get(base, Path(base))
    if (folder / "transformer" / "config.json").is_file():
        return folder
    known = KNOWN.get(base)
    if known and known.refused:
        raise UsageError(f"base: {base!r} cannot be converted: {known.refused}; use {known.undistilled}")
    if known or (_HUB_ID.fullmatch(base) and not folder.exists()):
        return download(known.hub if known else base, parts)
    if folder.is_dir():
        raise UsageError(f"base: {base!r} has no transformer/config.json: it is not a diffusers folder")
    everything = [*ALIASES, *KNOWN]
    near = difflib.get_close_matches(base, everything, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(everything)}"
    raise UsageError(f"base: {base!r} is neither an alias nor a folder; {hint}")


def open_base(name: str | Path, dtype: torch.dtype | None = None, parts: Sequence[str] = PARTS) -> Base:
    """Open a base, or a model converted from one, by alias, folder or Hub id; nothing heavy is loaded yet.

    The family is told from the class name in ``transformer/config.json``. ``dtype`` is that of the transformer and
    the text encoders, float32 if not given; ``parts`` are those whose weights will be asked for. Raises UsageError if
    there is no such base or its family is unknown.
    """
    import torch

    from flux2pixel.families.base import read_config

    folder = Path(name)
    if not (folder / "asymflow.json").is_file():
        folder = resolve(str(name), parts)
    config = folder / "transformer" / "config.json"
    name_of_class = read_config(config).get("_class_name")
    family = family_of(name_of_class)
    if family is None:
        raise UsageError(f"{config}: _class_name {name_of_class!r} is of no family that can be converted")
    return family(folder, dtype or torch.float32)


def family_of(class_name: str | None) -> type[Base] | None:
    """The family of a stock transformer class."""
    match class_name:
        case "Flux2Transformer2DModel":
            from flux2pixel.families.flux2 import Flux2

            return Flux2
        case "FluxTransformer2DModel":
            from flux2pixel.families.flux1 import Flux1

            return Flux1
        case "SD3Transformer2DModel":
            from flux2pixel.families.sd3 import SD3

            return SD3
        case "QwenImageTransformer2DModel":
            from flux2pixel.families.qwen_image import QwenImage

            return QwenImage
        case "ZImageTransformer2DModel":
            from flux2pixel.families.z_image import ZImage

            return ZImage
        case "Flux3Transformer2DModel":
            from flux2pixel.families.flux3 import Flux3

            return Flux3
    return None
