"""Every tensor of a written folder against what it was made from, by other ways than it was written.

A folded one is compared element by element with a fold written another way (one sum over named axes, in float64)
within the rounding of its dtype; one that LoRA or an adapter changed likewise, with the product in float64; any other
bit for bit.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from flux2pixel.convert.fold import LATENT_PATCH, RGB, folded_names
from flux2pixel.convert.plan import class_shapes, latent_config, pixel_config
from flux2pixel.convert.prepare import Job
from flux2pixel.families.base import Projections
from flux2pixel.families.configs import init_config, read_config
from flux2pixel.runtime.progress import bar
from flux2pixel.weights.adapter import LowRank
from flux2pixel.weights.checkpoint import DTYPES, Checkpoint, Stored, check_names, open_checkpoint, refuse
from flux2pixel.weights.write import BLOCK, CHUNK, same_bytes

SINGLE = 2.0**-24  # unit roundoff of float32, in which LoRA is merged and through which torch casts to 16 bits


def refold(name: str, weight: Tensor, basis: Tensor, projections: Projections) -> Tensor:
    """The fold of a projection's weight or bias, in the dtype of ``weight``: one sum over named axes.

    a b d  colour, row and column of a pixel patch      c i j  channel, row and column of a latent token's patch
    The axes are written in the order in which the layer has them, so no permutation is made.
    """
    output = name.rpartition(".")[0] == projections.output
    last = (projections.output_order if output else projections.input_order) == "ph,pw,c"
    width, rank = basis.shape
    side, pack = math.isqrt(width // RGB), LATENT_PATCH if last else 1
    tied = basis.to(weight).reshape(RGB, side, side, rank // pack**2, pack, pack)
    sizes = (pack, pack, rank // pack**2) if last else (rank // pack**2, pack, pack)
    latent, pixel = ("ijc", "bda") if last else ("cij", "abd")
    if output:
        wide = torch.einsum(f"abdcij,{latent}...->{pixel}...", tied, weight.reshape(*sizes, *weight.shape[1:]))
        return wide.reshape(width, *weight.shape[1:])
    wide = torch.einsum(f"n{latent},abdcij->n{pixel}", weight.reshape(len(weight), *sizes), tied)
    return wide.reshape(len(weight), RGB, side, side) if weight.ndim == 4 else wide.reshape(len(weight), width)


def open_written(folder: Path, job: Job) -> Checkpoint:
    """Reopen a transformer folder: its configuration is the base's pixel model's, names and shapes are the class's.

    Raises Flux2PixelError that lists what is not.
    """
    network, base = job.base.network_class(), job.base
    meant = pixel_config(base, latent_config(base))
    found = init_config(network, read_config(folder / "config.json"), str(folder / "config.json"))
    written = open_checkpoint(folder)
    odd = [key for key, value in json.loads(json.dumps(meant)).items() if json.loads(json.dumps(found))[key] != value]
    refuse(folder, [f"config.json: {key} is {found[key]!r}, the base's pixel model has {meant[key]!r}" for key in odd])
    check_names(folder, written, class_shapes(network, meant))
    return written


def check_tensors(
    job: Job, written: Checkpoint, *, copied: Collection[str] = (), trained: Collection[str] = ()
) -> tuple[dict[str, int], float]:
    """Compare every tensor with what it must be; returns counts by kind, and the worst share of a fold's rounding.

    ``copied`` were compared while they were written, or share their file with the base; ``trained`` are left out.
    Raises one Flux2PixelError that lists what differs.
    """
    counts: Counter[str] = Counter()
    problems: list[str] = []
    worst = 0.0
    sizes = [output.size for output in job.outputs if output.name not in copied]
    with bar("proof: tensors", sum(sizes)) as progress:
        for latent, output in zip(job.latent, job.outputs, strict=True):
            stored, kind = written.tensors[output.name], _kind(job, latent.name, output.name)
            if output.name in trained:
                kind = "trained"
            elif output.name in copied:
                kind = "equal"
            elif kind == "equal" and stored.dtype == job.checkpoint.tensors[latent.name].dtype:
                if not _equal(stored, job.checkpoint.tensors[latent.name]):
                    problems.append(f"{output.name} is not the base's, bit for bit")
            else:
                share, problem = _compare(job, latent.name, output.name, stored)
                worst = max(worst, share) if kind == "folded" else worst
                kind = "cast" if kind == "equal" else kind
                problems += problem
            counts[kind] += 1
            if output.name not in copied:
                progress.advance(output.size, note=output.name)
    refuse(written.files[0].parent, problems)
    return dict(counts), worst


def _kind(job: Job, latent: str, name: str) -> str:
    """How a tensor came to be: "equal", "folded", or "merged" with what a LoRA or an adapter brings."""
    if job.adapter and (name in job.adapter.full or name in job.adapter.pairs):
        return "merged"
    if latent in folded_names(job.base.projections):
        return "folded"
    return "merged" if any(latent in lora.full or latent in lora.pairs for lora, _ in job.loras) else "equal"


def merged(job: Job, latent: str, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Rows of a latent tensor with the LoRA in it, float64, and how far float32 arithmetic may be from them."""
    value = job.checkpoint.tensors[latent].slice(first, last).read().double()
    slack = torch.zeros_like(value)
    for lora, strength in job.loras:
        if latent in lora.full:
            value, slack = lora.full[latent].slice(first, last).read().double(), torch.zeros_like(value)
        elif latent in lora.pairs:
            value, slack = _with_pair(value, slack, lora.pairs[latent], strength, first, last)
    return value, slack


def _with_pair(
    value: Tensor, slack: Tensor, pair: LowRank, strength: float, first: int, last: int
) -> tuple[Tensor, Tensor]:
    a, b, factor = pair.a().double(), pair.b()[first:last].double(), strength * pair.scale
    size = value.abs() + abs(factor) * (b.abs() @ a.abs())
    return value + factor * (b @ a), slack + (len(a) + 4) * SINGLE * size


def _compare(job: Job, latent: str, name: str, stored: Stored) -> tuple[float, list[str]]:
    """The worst share of the allowed difference, and a line on the first element that is further off."""
    kind, dtype = _kind(job, latent, name), DTYPES[stored.dtype]
    step = stored.length if kind == "folded" else max(1, BLOCK * stored.length // max(8 * math.prod(stored.shape), 1))
    worst = 0.0
    for first in range(0, stored.length, step):
        last = min(first + step, stored.length)
        value, slack = _truth(job, latent, name, kind, first, last)
        found = stored.slice(first, last).read().double().reshape(value.shape)
        if dtype.is_floating_point:
            limits = torch.finfo(dtype)
            unit = limits.eps / 2 + (SINGLE if dtype.itemsize < 4 else 0.0)
            allowed = unit * value.abs() + slack + limits.smallest_normal * limits.eps
        else:
            allowed = torch.full_like(value, 0.5)
        share = ((found - value).abs() / allowed).nan_to_num(nan=math.inf)
        worst = max(worst, share.max().item() if share.numel() else 0.0)
        if worst > 1:
            place = tuple(int(i) for i in torch.unravel_index(share.argmax(), share.shape))
            where = [place[0] + first, *place[1:]] if place else []
            return worst, [
                f"{name} differs from what was computed in float64 at {where}: stored {found[place]:.6g}, "
                f"meant {value[place]:.6g}"
            ]
    return worst, []


def _truth(job: Job, latent: str, name: str, kind: str, first: int, last: int) -> tuple[Tensor, Tensor]:
    """What rows ``first`` to ``last`` of the written tensor ``name`` must be, in float64, and the slack they have."""
    if job.adapter and name in job.adapter.full:
        value = job.adapter.full[name].slice(first, last).read().double()
        return value, torch.zeros_like(value)
    if kind == "folded":
        assert job.flow is not None
        value, slack = merged(job, latent, 0, job.checkpoint.tensors[latent].length)
        basis = job.flow.basis.double()
        size = refold(latent, value.abs(), basis.abs(), job.base.projections)
        slack = refold(latent, slack, basis.abs(), job.base.projections) + 4 * basis.shape[1] * 2.0**-53 * size
        return refold(latent, value, basis, job.base.projections), slack
    value, slack = merged(job, latent, first, last)
    if job.adapter and name in job.adapter.pairs:
        value, slack = _with_pair(value, slack, job.adapter.pairs[name], 1.0, first, last)
    return value, slack


def _equal(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors are the same bytes, read a chunk at a time; the same bytes of one file are."""
    places = [
        [((info := span.path.stat()).st_dev, info.st_ino, span.start, span.size) for span in tensor.spans]
        for tensor in (one, other)
    ]
    if places[0] == places[1]:
        return True
    row = max(one.size // max(one.length, 1), 1)
    step = max(1, CHUNK // row)
    for first in range(0, one.length, step):
        sides = [t.slice(first, min(first + step, one.length)).read().reshape(-1) for t in (one, other)]
        if len(sides[0]) and not same_bytes(*(side.view(torch.uint8).numpy().data for side in sides)):
            return False
    return True
