"""The model folder of a readout: the converted one with its out-projection rewritten and a few tensors more."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux2pixel.asymflow.readout import Readout
from flux2pixel.models.base import Base
from flux2pixel.models.folder import PixelFolder, write_folder
from flux2pixel.readout.gather import row_order
from flux2pixel.readout.solve import Fit
from flux2pixel.recipe import Recipe
from flux2pixel.runtime import files
from flux2pixel.weights.checkpoint import open_checkpoint
from flux2pixel.weights.write import Output, link_or_copy, write_file


def write_model(
    target: Path,
    source: Path,
    pixel: Base,
    stored: PixelFolder,
    found: Fit,
    readout: Readout,
    sign: float,
    recipe: Recipe,
) -> dict[str, Any]:
    """Write the model into ``target``, a new folder; returns SHA-256 by name of the weight files that differ.

    Everything unchanged is shared with ``source`` by hard links, or copied where that is impossible.
    """
    name = f"{pixel.pixel_name(pixel.projections.output)}.weight"
    checkpoint = open_checkpoint(source / "transformer")
    changed = checkpoint.tensors[name].spans[0].path.name if bool(found.head.any()) else ""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        elif place.name in (changed, files.LISTING):
            continue
        elif path.parent == source or path.suffix in (".json", ".py", ".md"):
            shutil.copyfile(path, place)  # small, and some of them are rewritten below
        else:
            link_or_copy(path, place)
    digests: dict[str, Any] = {}
    if changed:
        delta = out_delta(found.head, stored, pixel, sign)
        outputs = tuple(
            Output(n, t.dtype, tuple(t.shape), t, *((_rows(t, delta), "detail head") if n == name else ()))
            for n, t in checkpoint.tensors.items()
            if t.spans[0].path.name == changed
        )
        notes = {"format": "pt", "made_by": "flux2pixel fit-readout", "base": stored.base}
        digests[changed] = write_file(target / "transformer" / changed, outputs, notes).digest
    offset = found.offset.float() if bool(found.offset.any()) else None
    tensors = dict(stored.tensors) | readout.tensors() | ({} if offset is None else {"offset": offset})
    written = replace(stored, tensors=tensors, codec=replace(stored.codec, offset=offset))
    write_folder(target, written, recipe)
    return digests


def out_delta(head: Tensor, stored: PixelFolder, pixel: Base, sign: float) -> Tensor:
    """What the detail head W_c (D, C) adds to the out-projection's weight: -(1 / s)(I - P) W_c, rows as its class has.

    ``sign`` is that of v in the projection's output.
    """
    delta = -sign * head / float(stored.flow.scale)
    return delta[row_order(pixel, len(delta))]


def _rows(stored: Any, delta: Tensor) -> Any:
    def rows(first: int, last: int) -> Tensor:
        return stored.slice(first, last).read().double() + delta[first:last]

    return rows


def leak(head: Tensor, flow_basis: Tensor, dtype: torch.dtype) -> float:
    """How far rounding to ``dtype`` takes the head out of the complement, relative to its own size."""
    rounded = head.to(dtype).double()
    return float((flow_basis.mT.double() @ rounded).norm() / head.norm().clamp(min=1e-300))


def finished(folder: Path) -> bool:
    """Whether a model folder has a readout already."""
    return (folder / "readout.json").is_file()


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write ``readout.json``, which makes the folder a read-out one."""
    files.write_json(folder / "readout.json", record)
