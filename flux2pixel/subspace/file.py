"""``subspace.safetensors``: ``basis`` (D, r) and ``scale`` () in float32, with provenance as metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from flux2pixel import __version__, files
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.errors import Flux2PixelError

FORMAT = "flux2pixel.subspace"


def write_subspace(path: Path, basis: Tensor, scale: Tensor, metadata: Mapping[str, object]) -> None:
    """Write a subspace; ``metadata`` values are stored as strings beside format and version."""
    from safetensors.torch import save_file

    tensors = {"basis": basis.float().contiguous(), "scale": scale.float().reshape(())}
    described = {"format": FORMAT, "version": __version__} | {k: str(v) for k, v in metadata.items()}
    files.write(path, lambda temporary: save_file(tensors, temporary, described))


def read_subspace(path: Path) -> tuple[AsymFlow, dict[str, str]]:
    """Read a subspace file. Raises Flux2PixelError if it is not one, or its basis is not orthonormal."""
    tensors, metadata = files.read_tensors(path)
    if metadata.get("format") != FORMAT or set(tensors) != {"basis", "scale"}:
        raise Flux2PixelError(f"{path}: not a subspace file (tensors {', '.join(tensors)}); make one with fit-subspace")
    try:
        return AsymFlow(tensors["basis"], tensors["scale"]), dict(metadata)
    except ValueError as error:
        raise Flux2PixelError(f"{path}: {error}") from error
