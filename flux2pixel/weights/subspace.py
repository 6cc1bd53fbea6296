"""``subspace.safetensors``: ``basis`` (D, r) and ``scale`` () in float32, with provenance as metadata.

The reference implementation's file is read and written too: a torch file with ``proj_mat_p16`` (D, r) float32 and
``scale_p16``, 16 being the patch size; its PCA files have no scale, which is then 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError, UsageError, first_line
from flux2pixel.runtime.version import __version__

FORMAT = "flux2pixel.subspace"
REFERENCE = ("pth", "pt")


def write_subspace(path: Path, basis: Tensor, scale: Tensor, metadata: Mapping[str, object]) -> None:
    """Write a subspace; ``metadata`` values are stored as strings beside format and version."""
    from safetensors.torch import save_file

    tensors = {"basis": basis.float().contiguous(), "scale": scale.float().reshape(())}
    described = {"format": FORMAT, "version": __version__} | {k: str(v) for k, v in metadata.items()}
    files.write(path, lambda temporary: save_file(tensors, temporary, described))


def read_subspace(path: Path) -> tuple[AsymFlow, dict[str, str]]:
    """Read a subspace file, ours or the reference's. Raises Flux2PixelError if it is none, or not orthonormal."""
    tensors, metadata = _read_reference(path) if _is_reference(path) else _read_own(path)
    try:
        return AsymFlow(tensors["basis"], tensors["scale"]), metadata
    except ValueError as error:
        raise Flux2PixelError(f"{path}: {error}") from error


def _read_own(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = files.read_tensors(path)
    if metadata.get("format") != FORMAT or set(tensors) != {"basis", "scale"}:
        raise Flux2PixelError(f"{path}: not a subspace file (tensors {', '.join(tensors)}); make one with fit-subspace")
    return tensors, dict(metadata)


def _is_reference(path: Path) -> bool:
    return path.suffix.lstrip(".") in REFERENCE


def _read_reference(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        # Weights only: a pickle may otherwise run whatever its author liked.
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly every type on a damaged or foreign file
        raise Flux2PixelError(f"{path}: not a torch file of plain tensors ({first_line(error)})") from error
    names = [n for n in content if re.fullmatch(r"proj_mat_p\d+", str(n))] if isinstance(content, dict) else []
    if len(names) != 1:
        raise Flux2PixelError(f"{path}: no subspace in it: one tensor proj_mat_p16 (or another patch size) is expected")
    patch = int(names[0].removeprefix("proj_mat_p"))
    basis, scale = content[names[0]], content.get(f"scale_p{patch}", 1.0)
    if not isinstance(basis, Tensor) or basis.ndim != 2 or basis.shape[0] != 3 * patch**2:
        raise Flux2PixelError(f"{path}: {names[0]} is not a matrix of {3 * patch**2} rows")
    tensors = {"basis": basis.float(), "scale": torch.as_tensor(scale).float().reshape(())}
    return tensors, {"method": "imported", "patch_size": str(patch), "patch_order": "c,ph,pw"}


def write_reference(path: Path, flow: AsymFlow) -> None:
    """Write the reference implementation's torch file."""
    patch = round((flow.basis.shape[0] / 3) ** 0.5)
    content = {f"proj_mat_p{patch}": flow.basis.float().contiguous(), f"scale_p{patch}": flow.scale.float()}
    files.write(path, lambda temporary: torch.save(content, temporary))


def export(source: Path, target: Path) -> None:
    """Rewrite a subspace in the format that the suffix of ``target`` names: .safetensors, or the reference's .pth."""
    flow, metadata = read_subspace(source)
    if _is_reference(target):
        write_reference(target, flow)
    elif target.suffix == ".safetensors":
        kept = {key: value for key, value in metadata.items() if key not in ("format", "version")}
        write_subspace(target, flow.basis, flow.scale, kept | {"imported_from": source.name})
    else:
        raise UsageError(f"{target}: a subspace is written as .safetensors (ours) or .pth (the reference's)")
