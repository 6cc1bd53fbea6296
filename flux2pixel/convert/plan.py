"""The plan of a conversion: what is written, from what, and what it takes; made from headers alone, before any work."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux2pixel.convert.fold import fold_tensor, folded_names
from flux2pixel.families.configs import init_config
from flux2pixel.models.base import Base
from flux2pixel.models.folder import companion_parts
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.weights.checkpoint import DTYPES, SINGLE, Checkpoint, Stored
from flux2pixel.weights.write import Output

SHARD = "diffusion_pytorch_model-{:05d}-of-{:05d}.safetensors"
WEIGHTS = (".safetensors",)  # large files, which --link may link; small ones are copied so that editing is safe


@dataclass(frozen=True)
class Shard:
    """One file to write. ``twin`` is the source file whose tensors it repeats unchanged, if it does."""

    name: str
    outputs: tuple[Output, ...]
    twin: Path | None = None

    @property
    def size(self) -> int:
        return sum(output.size for output in self.outputs)


class Companion(NamedTuple):
    """A file of the base that the pixel model keeps: its place in the folder, where it is, and its bytes."""

    name: str
    path: Path
    size: int

    @property
    def linkable(self) -> bool:
        """Whether it is a weight, whose bytes nobody edits in place."""
        return self.name.endswith(WEIGHTS)


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will read and write; ``fetched`` are the bytes that it would download first."""

    shards: tuple[Shard, ...]
    companions: tuple[Companion, ...]
    bytes_in: int
    link: bool
    fetched: int = 0

    @property
    def bytes_out(self) -> int:
        """Bytes that need room on the disk: without what is linked, where that works."""
        shards = sum(shard.size for shard in self.shards if not (self.link and shard.twin))
        return shards + sum(kept.size for kept in self.companions if not (self.link and kept.linkable))

    @property
    def working_memory(self) -> int:
        """Bytes, about, that the writing takes beside the libraries."""
        return max((output.working_memory for shard in self.shards for output in shard.outputs), default=0)

    @property
    def changed(self) -> list[Output]:
        """The tensors that are not copied as they are."""
        return [output for shard in self.shards for output in shard.outputs if output.action]

    def check_room(self, folder: Path) -> None:
        """Raise Flux2PixelError if the disk of ``folder`` has no room for what will be written."""
        free = free_bytes(folder)
        if self.bytes_out > free:
            raise Flux2PixelError(
                f"{folder}: {_gigabytes(self.bytes_out)} needed, {_gigabytes(free)} free; "
                f"free some, choose another --out{'' if self.link else ', or share unchanged files with --link'}"
            )

    def lines(self, folder: Path) -> list[str]:
        """The plan in words, for ``--dry-run``."""
        text = []
        for output in self.changed:
            old, new = output.source, output
            text.append(
                f"  {output.name}  {_shape(old.shape)} {old.dtype.lower()} -> {_shape(new.shape)} "
                f"{new.dtype.lower()}  {output.action}"
            )
        copied = sum(len(shard.outputs) for shard in self.shards) - len(text)
        how = "as they are, " + ("linked where a whole file is" if self.link else "copied")
        lines = [f"changes {len(text)} tensors", *text, f"keeps   {copied} tensors {how}"]
        for shard in self.shards:
            act = "linked" if self.link and shard.twin else "rewritten"
            lines.append(f"  transformer/{shard.name}  {_gigabytes(shard.size)}  {len(shard.outputs)} tensors  {act}")
        for part in dict.fromkeys(kept.name.partition("/")[0] for kept in self.companions):
            files = [kept for kept in self.companions if kept.name.startswith(f"{part}/")]
            act = "linked" if self.link and any(kept.linkable for kept in files) else "copied"
            lines.append(f"  {part}/  {_gigabytes(sum(kept.size for kept in files))}  {act}")
        free = free_bytes(folder)
        if self.fetched:
            room = _gigabytes(_cache_room())
            lines.append(f"fetches {_gigabytes(self.fetched)} from the Hub ({room} free in its cache)")
        lines.append(f"reads   {_gigabytes(self.bytes_in)}")
        lines.append(f"writes  {_gigabytes(self.bytes_out)} to {folder} ({_gigabytes(free)} free)")
        lines.append(f"memory  {self.working_memory / 1e6:.0f} MB beside the libraries")
        return lines


def make_plan(
    outputs: list[Output],
    checkpoint: Checkpoint,
    companions: list[Companion],
    *,
    dtype: str = "keep",
    shard_bytes: int = 0,
    link: bool = False,
    remote: bool = False,
) -> Plan:
    """Distribute ``outputs`` over files: those of the checkpoint, or new ones of at most ``shard_bytes``.

    ``dtype`` is "keep" or a safetensors dtype that every floating-point tensor is cast to.
    """
    if dtype != "keep":
        outputs = [_cast(output, dtype) for output in outputs]
    groups: list[list[Output]] = []
    if shard_bytes:
        room = 0
        for output in outputs:
            if output.size > room or not groups:
                groups, room = [*groups, []], shard_bytes
            groups[-1].append(output)
            room -= output.size
    else:
        by_file: dict[Path, list[Output]] = {}
        for output in outputs:
            by_file.setdefault(output.source.spans[0].path, []).append(output)
        groups = [by_file[file] for file in checkpoint.files if file in by_file]
    held = Counter(_file(tensor) for tensor in checkpoint.tensors.values())
    shards = []
    for number, group in enumerate(groups, 1):
        name = SINGLE if len(groups) == 1 else SHARD.format(number, len(groups))
        files = {_file(output.source) for output in group}
        source = next(iter(files))
        same = len(files) == 1 and source and not any(output.action for output in group) and held[source] == len(group)
        shards.append(Shard(name, tuple(group), source if same else None))
    size_in = checkpoint.size + sum(kept.size for kept in companions)
    return Plan(tuple(shards), tuple(companions), size_in, link, size_in if remote else 0)


def as_they_are(checkpoint: Checkpoint) -> list[Output]:
    """The tensors of a checkpoint, to be copied."""
    return [Output(name, stored.dtype, stored.shape, stored) for name, stored in checkpoint.tensors.items()]


def fold_outputs(base: Base, latent: list[Output], basis: Tensor | None) -> list[Output]:
    """What becomes of each tensor of the latent model; ``basis`` may be absent while only a plan is wanted."""
    wide = class_shapes(base.network_class(), pixel_config(base, latent_config(base)))
    names, outputs = folded_names(base.projections), []
    for tensor in latent:
        new = base.pixel_name(tensor.name)
        if tensor.name in names:
            rows = None if basis is None else partial(_fold, tensor, basis, base)
            product = "A W" if tensor.name.startswith(f"{base.projections.output}.") else "W A^T"
            action = ", ".join(filter(None, (tensor.action, f"{product} in float64")))
            outputs.append(replace(tensor, name=new, shape=wide[new], rows=rows, action=action, whole=True))
        else:
            outputs.append(tensor if new == tensor.name else replace(tensor, name=new, action="renamed"))
    return outputs


def latent_config(base: Base) -> dict[str, Any]:
    """The constructor's arguments of the base's transformer, as its class reads the folder's ``config.json``."""
    return init_config(base.network_class(), base.config, f"{base.folder}/transformer/config.json")


def pixel_config(base: Base, config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments of the pixel model, given those of the latent one."""
    return init_config(base.network_class(), base.pixel_config(dict(config)), f"{base.folder}, in pixels")


def class_shapes(network: Any, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a stock class's tensors under ``config``; built on the meta device, nothing is allocated."""
    with torch.device("meta"):
        model = network(**init_config(network, config, network.__name__))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def index_of(plan: Plan) -> dict[str, Any] | None:
    """The shard index that diffusers reads, or None for a single file."""
    if len(plan.shards) == 1:
        return None
    places = {output.name: shard.name for shard in plan.shards for output in shard.outputs}
    return {"metadata": {"total_size": sum(shard.size for shard in plan.shards)}, "weight_map": places}


def find_companions(base: Base, remote: Mapping[str, int] | None = None) -> list[Companion]:
    """The files of the base's other parts; ``remote`` are those of its repository with their sizes.

    Raises UsageError if a part is absent.
    """
    found = []
    for part in companion_parts(base.folder):
        if remote is not None:
            kept = [Companion(name, Path(name), size) for name, size in remote.items() if name.startswith(f"{part}/")]
        else:
            paths = sorted(path for path in (base.folder / part).rglob("*") if path.is_file())
            kept = [Companion(str(path.relative_to(base.folder)), path, path.stat().st_size) for path in paths]
        if not kept:
            raise UsageError(f"{base.folder}/{part}: missing; the base is not a complete diffusers model, get it again")
        found += kept
    return found


def _fold(tensor: Output, basis: Tensor, base: Base, first: int, last: int) -> Tensor:
    exact = tensor.block(0, tensor.length).double()  # so that the one rounding is to the dtype that is written
    return fold_tensor(tensor.name, exact, basis, base.projections)[first:last]


def _cast(output: Output, dtype: str) -> Output:
    if output.dtype == dtype or not DTYPES[output.dtype].is_floating_point:
        return output

    return replace(output, dtype=dtype, rows=output.block, action=output.action or f"cast to {dtype.lower()}")


def _file(stored: Stored) -> Path | None:
    """The file a tensor is in, or None if its bytes come from several."""
    files = {span.path for span in stored.spans}
    return files.pop() if len(files) == 1 else None


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that ``folder`` is or will be on."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def _cache_room() -> int:
    from huggingface_hub import constants

    return free_bytes(Path(constants.HF_HUB_CACHE))


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
