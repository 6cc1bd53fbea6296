"""``inspect``: what a safetensors file or a model folder is, from its header alone.

The header is read by hand: no tensor is loaded, and a broken file gets a sentence, not a stack trace.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.weights.header import read_header

_SHOWN = 40  # tensors listed one by one
_BINARY = 200  # characters without a space, from which a text is data and not for reading


def inspect_command(file: Annotated[Path, typer.Argument(help="A safetensors file or a model folder.")]) -> None:
    """Say what a file or a model folder is."""
    typer.echo(inspect(file))


def inspect(file: Path) -> str:
    """Describe a safetensors file, or a folder with ``asymflow.json``, ``conversion.json`` or a diffusers model.

    Raises ``UsageError`` when ``file`` is missing and ``Flux2PixelError`` when it cannot be understood.
    """
    if not file.exists():
        raise UsageError(f"{file}: no such file or folder; check the path")
    return _inspect_folder(file) if file.is_dir() else _inspect_file(file)


def _inspect_file(path: Path) -> str:
    if path.suffix in (".pth", ".pt"):
        return _inspect_reference(path)
    header = read_header(path)
    kind = header.metadata.get("format", "safetensors")
    lines = [f"{path}: {kind}, {_amounts(header.parameters, path.stat().st_size)}, {len(header.tensors)} tensors"]
    lines += _table("metadata", header.metadata)
    lines.append("tensors")
    for name, (dtype, shape) in list(header.tensors.items())[:_SHOWN]:
        lines.append(f"  {name}  {dtype}  ({', '.join(map(str, shape))})")
    if len(header.tensors) > _SHOWN:
        lines.append(f"  ... and {len(header.tensors) - _SHOWN} more")
    return "\n".join(lines)


def _inspect_reference(path: Path) -> str:
    from flux2pixel.weights.subspace import read_subspace

    flow, metadata = read_subspace(path)
    lines = [f"{path}: subspace of the reference implementation, {path.stat().st_size / 1e6:.2f} MB"]
    facts = {"patch_size": metadata["patch_size"], "basis": str(tuple(flow.basis.shape)), "scale": f"{flow.scale:.6g}"}
    return "\n".join(lines + _table("contents", facts))


def _inspect_folder(folder: Path) -> str:
    asymflow, conversion, index = folder / "asymflow.json", folder / "conversion.json", folder / "model_index.json"
    weights = sorted(folder.rglob("*.safetensors"))
    if asymflow.is_file():
        kind = "pixel model"
    elif index.is_file():
        kind = "diffusers model"
    elif weights:
        kind = "folder of weights"
    else:
        raise Flux2PixelError(f"{folder}: not a model: no asymflow.json, model_index.json or safetensors file in it")
    lines = [f"{folder}: {kind}"]
    for path in (asymflow, conversion, index):
        if path.is_file():
            lines += _table(path.name, _read_json(path))
    lines.append("weights")
    for path in weights:
        header = read_header(path)
        lines.append(f"  {path.relative_to(folder)}  {_amounts(header.parameters, path.stat().st_size)}")
    return "\n".join(lines)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Flux2PixelError(f"{path}: not valid JSON: {error}; write the model again") from error
    if not isinstance(content, dict):
        raise Flux2PixelError(f"{path}: not a JSON object; write the model again")
    return content


def _table(title: str, content: Mapping[str, Any]) -> list[str]:
    """Return a titled block of ``key: value`` lines, long values (recipes) cut and packed data only counted."""
    lines = [title] if content else []
    for key, value in content.items():
        text = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
        if isinstance(value, str) and len(text) > _BINARY and " " not in text:  # such as the basis of a pipeline
            text = f"({len(text):,} characters of data)"
        lines.append(f"  {key}: {text if len(text) <= 160 else text[:157] + '...'}")
    return lines


def _amounts(parameters: int, size: int) -> str:
    return f"{parameters:,} parameters, {size / 1e6:.2f} MB"
