"""What a training will need, before a weight is loaded: parameters, memory of a GPU, disk, time.

Memory of a process is what stays between steps, sharded over the processes that share one copy; the units that a
sharded training gathers; and the most that a step adds, run on fake tensors. Not in it: the CUDA context and NCCL's
buffers (about 1 GiB), and what the allocator cannot reuse.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux2pixel.data import Buckets, open_source
from flux2pixel.data.cache import MANIFEST, Size, read_manifest
from flux2pixel.data.encode import FIRST_SCENE, cache_folder, text_length
from flux2pixel.data.sources import own_source
from flux2pixel.families.known import KNOWN
from flux2pixel.finetune.network import parallel
from flux2pixel.finetune.plan import footprint
from flux2pixel.models import base as bases
from flux2pixel.models.base import Base
from flux2pixel.models.plan import conditioning_like
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.errors import UsageError

GIB = 2**30
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Parameters:
    """Of the pixel network: the trained ones by group of one learning rate, and all that stay as they are."""

    trained: dict[str, tuple[int, float]]
    frozen: int
    total: int  # of the stock class, without LoRA and without the originals of what is trained beside them


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. ``kept``: by kind, between steps; ``gathered``: full copies of sharded units.

    ``added``: by bucket (height, width), the most a forward and backward adds (without, with checkpointing). The
    optimizer's step adds nothing: both kinds work in place.
    """

    kept: dict[str, int]
    gathered: int
    added: dict[Size, tuple[int, int]]
    accumulates: bool

    def peak(self, checkpointing: bool) -> int:
        """The most at any time, over all buckets."""
        # Unless they are summed over several forwards, gradients are made while activations go; ``added`` has both.
        made = 0 if self.accumulates else self.kept["gradients"]
        step = max(pair[checkpointing] for pair in self.added.values()) + self.gathered - made
        return sum(self.kept.values()) + max(step, 0)


@dataclass(frozen=True)
class Plan:
    """All of it; ``lines`` is what a person reads."""

    recipe: Recipe
    world: int
    unit: int
    parameters: Parameters
    memory: Memory
    host: dict[str, int]
    disk: dict[str, int]
    images: int | None
    images_per_second: float | None
    source: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float | None:
        """Of all steps."""
        if self.images_per_second is None:
            return None
        return self.recipe.finetune.steps * self.recipe.finetune.batch / self.images_per_second

    def lines(self) -> list[str]:
        """The plan in words."""
        parts = (self._head(), self._parameters(), self._memory(), self._host(), self._disk(), self._training())
        return [line for part in parts for line in part] + self.notes

    def _head(self) -> list[str]:
        settings = self.recipe.finetune
        each = settings.batch // (self.unit * self.world)
        copies = f"{settings.replicas} sharded copies" if settings.replicas > 1 else "one sharded copy"
        return [
            f"plan: {self.recipe.base}, {settings.trainable}, {settings.precision}, "
            f"{self.world} process{'es' * (self.world > 1)}{f' ({copies})' if self.world > 1 else ''}, "
            f"batch {settings.batch} = {self.unit} images x {each} forwards x {self.world}"
        ]

    def _parameters(self) -> list[str]:
        rows = [(name, count, f"lr {lr:g}") for name, (count, lr) in self.parameters.trained.items()]
        rows += [("trained", sum(count for count, _ in self.parameters.trained.values()), "")]
        rows += [("frozen", self.parameters.frozen, ""), ("pixel model", self.parameters.total, "")]
        return ["parameters", *(f"  {name:<24}{count:>16,}  {note}".rstrip() for name, count, note in rows)]

    def _memory(self) -> list[str]:
        memory, wanted = self.memory, self.recipe.finetune.checkpointing
        lines = [
            "memory of a process (GiB)",
            *(f"  {name:<24}{size / GIB:>9.3f}" for name, size in memory.kept.items()),
        ]
        lines += [f"  {'gathered units':<24}{memory.gathered / GIB:>9.3f}"] * bool(memory.gathered)
        lines += [f"  {'activations, by bucket':<24}{'stored':>9} {'recomputed (checkpointing)':>28}"]
        for (height, width), (plain, less) in memory.added.items():
            lines.append(f"    {f'{self.unit} x {width} x {height}':<22}{plain / GIB:>9.3f} {less / GIB:>28.3f}")
        peaks = [memory.peak(flag) / GIB for flag in (False, True)]
        lines.append(f"  {'peak':<24}{peaks[0]:>9.3f} {peaks[1]:>28.3f}")
        lines.append(f"  the recipe: checkpointing {'on' if wanted else 'off'}, peak {peaks[wanted]:.3f} GiB")
        return lines

    def _host(self) -> list[str]:
        here = self.world // self.recipe.finetune.replicas
        title = f"host memory of a machine with {here} process{'es' * (here > 1)} (GiB, the largest counts)"
        return [title, *(f"  {name:<40}{size / GIB:>9.3f}" for name, size in self.host.items())]

    def _disk(self) -> list[str]:
        return ["disk (GiB)", *(f"  {name:<40}{size / GIB:>9.3f}" for name, size in self.disk.items())]

    def _training(self) -> list[str]:
        settings = self.recipe.finetune
        seen = settings.steps * settings.batch
        lines = ["training", f"  {settings.steps:,} steps of {settings.batch} images: {seen:,} images seen"]
        if self.images:
            lines[-1] += f", {seen / self.images:.1f} epochs of {self.images:,}"
        if self.seconds is None:
            return [*lines, "  time unknown: give --images-per-second, or run a few steps, whose log is then read"]
        hours = self.seconds / 3600
        cost = f", {hours * self.world:,.1f} process-hours" if self.world > 1 else ""
        return [*lines, f"  {hours:,.2f} hours at {self.images_per_second:.2f} images/s ({self.source}){cost}"]


def plan(recipe: Recipe, run: Path, gpus: int = 1, images_per_second: float | None = None) -> Plan:
    """Plan the recipe's training in ``finetune.processes`` processes, or ``gpus`` where the recipe leaves that open.

    Of a published base, by alias, no file is needed; of another, its folder's configurations are read. Raises
    UsageError for a recipe that cannot be trained as it is: LoRA patterns that match nothing, a batch that does not
    divide, an unknown base.
    """
    settings = recipe.finetune
    world = settings.processes or gpus
    parallel.check_world(settings, world)
    unit = settings.micro_batch or settings.batch // world
    base, config, notes = architecture(recipe.base)
    built = footprint.build(base, config, settings)
    parameters = count_parameters(built)
    text_tokens = text_length(base)
    accumulates = settings.batch > unit * world
    kept, gathered = _standing(built, world, accumulates)
    sizes = _sizes(recipe, run, base.patch_size)
    share = 0.0 if accumulates else settings.replicas / world
    added = _added(footprint.Step(built, gathered=world > 1), sizes, unit, share, text_tokens)
    images, disk = _disk(recipe, run, built, parameters, text_tokens)
    source = "given"
    if images_per_second is None:
        images_per_second, source = _measured(run), "measured, from the log of this run"
    memory = Memory(kept, gathered, added, accumulates)
    host = _host(built, parameters, world // settings.replicas)
    return Plan(recipe, world, unit, parameters, memory, host, disk, images, images_per_second, source, notes)


def _host(built: footprint.Network, parameters: Parameters, here: int) -> dict[str, int]:
    """Bytes of host memory of ``here`` processes: each reads the whole network before it is sharded or moved."""
    trained = sum(count for count, _ in parameters.trained.values())
    network = sum(p.nbytes for p in [*built.network.parameters(), *built.network.buffers()])
    reference = 0 if built.reference is None else sum(p.nbytes for p in built.reference.parameters())
    width = 2 if built.settings.trainable == "lora" else 4
    # The leading process writes: averages and last weights, the model they go into, and one merged copy of it.
    return {
        "while weights are read": here * max(network, reference),
        "while the model is written": 8 * trained + 2 * width * parameters.total,
    }


def architecture(name: str) -> tuple[Base, dict[str, Any], list[str]]:
    """A base, its latent transformer's configuration, and notes. Of a published one no file is needed."""
    known = KNOWN.get(name)
    if known is None:
        base = bases.open_base(name)
        return base, base.config, []
    base = bases.published(known)
    return base, base.config, [f"planned from what is published of {known.hub}"]


def count_parameters(built: footprint.Network) -> Parameters:
    """Count on the meta device."""
    parameters = dict(built.network.named_parameters())
    trained = {g.name: (sum(parameters[n].numel() for n in g.parameters), g.lr) for g in built.groups}
    return Parameters(trained, built.frozen, built.total)


def _standing(built: footprint.Network, world: int, accumulates: bool) -> tuple[dict[str, int], int]:
    """Bytes kept between steps by kind, and of gathered units, of one process."""
    settings, shards = built.settings, world // built.settings.replicas
    parameters = list(built.network.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    # 8-bit weights are buffers.
    frozen = sum(p.nbytes for p in [*parameters, *built.network.buffers()] if not p.requires_grad)
    reference = [] if built.reference is None else list(built.reference.parameters())
    kinds = {
        "weights, frozen": frozen,
        "weights, trained": 4 * trained,
        "reference": sum(p.nbytes for p in reference),
        "gradients": 4 * trained,
        "weight average": 4 * trained,
    }
    kept = {name: -(-size // shards) for name, size in kinds.items()}
    kept[f"optimizer ({settings.optimizer})"] = _moments(built, shards)
    if accumulates and shards > 1:
        kept["gradients, unsharded"] = 4 * trained  # summed over the forwards before they are reduced
    gathered = _gathered(built, 2 if settings.precision == "bf16" else 4) if world > 1 else 0
    return kept, gathered


def _moments(built: footprint.Network, shards: int) -> int:
    """Bytes of the optimizer's two moments on one process.

    torchao keeps one in a byte a number, a float32 scale for 256 of them and a table of 256 values; in float32 where
    this process's part is small or no multiple of 256.
    """
    parts = [-(-p.numel() // shards) for p in built.network.parameters() if p.requires_grad]
    if built.settings.optimizer == "adamw":
        return sum(8 * part for part in parts)
    return sum(2 * (part + part // 64 + 1024) if part >= 4096 and part % 256 == 0 else 8 * part for part in parts)


def _gathered(built: footprint.Network, width: int) -> int:
    """The root's own parameters and two neighbouring blocks in full; the gradients of one before they are reduced."""
    blocks = parallel.blocks(built.network)
    inside = [sum(p.numel() for p in block.parameters()) for block in blocks]
    root = sum(p.numel() for p in built.network.parameters()) - sum(inside)
    pair = max(a + b for a, b in zip(inside, [*inside[1:], 0], strict=True))
    gradients = max(sum(p.numel() for p in block.parameters() if p.requires_grad) for block in blocks)
    return width * (root + pair) + (width + 4) * gradients


def _sizes(recipe: Recipe, run: Path, patch: int) -> list[Size]:
    """The buckets that the cache fills, if it is made; else all the recipe allows."""
    folder = cache_folder(recipe, run)
    if (folder / MANIFEST).is_file():
        return [_size(text) for text in read_manifest(folder)["buckets"]]
    if own_source(recipe.data.source):
        return [(recipe.data.resolution, recipe.data.resolution)]
    return list(Buckets(recipe.data.resolution, patch).sizes)


def _size(text: str) -> Size:
    height, width = text.split("x")
    return int(height), int(width)


def _added(
    step: footprint.Step, sizes: Sequence[Size], unit: int, share: float, text_tokens: int
) -> dict[Size, tuple[int, int]]:
    """What a step adds, by bucket: run for the largest, and for the others in proportion to their pixels."""
    largest = max(sizes, key=lambda size: size[0] * size[1])
    plain, less = (
        step.peak(largest, unit, checkpointing=flag, gradient_share=share, text_tokens=text_tokens)
        for flag in (False, True)
    )
    shares = {size: size[0] * size[1] / (largest[0] * largest[1]) for size in sizes}
    return {size: (round(plain * part), round(less * part)) for size, part in shares.items()}


def _disk(
    recipe: Recipe, run: Path, built: footprint.Network, parameters: Parameters, text_tokens: int
) -> tuple[int | None, dict[str, int]]:
    """How many images, if known, and bytes on disk by kind."""
    base, config = built.base, built.config
    settings = recipe.finetune
    trained = sum(count for count, _ in parameters.trained.values())
    state = (4 + 4) * trained + _moments(built, 1)
    images, made = _images(recipe), {}
    folder = cache_folder(recipe, run)
    if (folder / MANIFEST).is_file():
        images = int(read_manifest(folder)["items"])
        made["cache (made)"] = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    else:
        count, per = (images, "") if images else (1000, ", per 1000 images")
        width = BYTES[recipe.data.dtype]
        tokens = max(h * w for h, w in _sizes(recipe, run, base.patch_size)) // base.patch_size**2
        conditioning = conditioning_like(base, config, 1, text_tokens)
        text = sum(v.numel() * (width if v.is_floating_point() else v.element_size()) for v in conditioning.values())
        made[f"cache, pixels{per}"] = count * tokens * base.token_width
        made[f"cache, latents{per}"] = count * tokens * base.latent_width * width
        made[f"cache, text (at most){per}"] = count * text
    made[f"checkpoints ({settings.keep} + 1)"] = (settings.keep + 1) * state
    made["model, averaged and raw"] = 2 * parameters.total * (2 if settings.trainable == "lora" else 4)
    return images, made


def _images(recipe: Recipe) -> int | None:
    """Training images, or None if only reading the source tells; of a source that is not here, what the recipe says."""
    limit = recipe.finetune.images
    try:
        count = open_source(recipe.data.source, FIRST_SCENE).count
    except UsageError:
        return limit or None
    return min(filter(None, (limit, count)), default=None)


def _measured(run: Path) -> float | None:
    """Images per second in the log of an earlier start of this run."""
    path = run / "finetune.jsonl"
    if not path.is_file():
        return None
    rates = [json.loads(line).get("images_per_second") for line in path.read_text().splitlines() if line.strip()]
    known = sorted(rate for rate in rates if rate)
    return known[len(known) // 2] if known else None
