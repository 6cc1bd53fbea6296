"""Proof after writing: the written model is reopened, compared with what was meant, and sampled against its base.

The acceptance test (coupled Euler sampling, both identities at every step) runs in float64 twice: with the fold redone
in float64, which must agree to rounding, and with the weights as they are stored, whose error is what their dtype
costs. It runs on the whole model where that fits in memory, else on the same weights with one block of each kind.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.convert.fold import exactness, fold
from flux2pixel.convert.plan import Plan, class_shapes
from flux2pixel.families.configs import stock_config
from flux2pixel.models.base import Base
from flux2pixel.weights.checkpoint import Checkpoint, Stored, check_names, open_checkpoint, refuse
from flux2pixel.weights.write import Output

STORED_STEPS = 8  # enough to see what rounding costs
GRID = (2, 3)  # tokens; an odd aspect ratio


@dataclass(frozen=True)
class Proof:
    """Largest absolute errors of the acceptance test. ``depth`` is "whole", "one block of each kind" or "none"."""

    max_abs_error: float
    stored_error: float
    steps: int
    depth: str
    dtype: str = "float64"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_written(folder: Path, plan: Plan, expected: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """Reopen a written transformer folder: index equals headers, names and shapes are the class's, changed tensors are
    bit for bit what the plan computes. Raises Flux2PixelError that lists what is not.
    """
    written = open_checkpoint(folder)
    check_names(folder, written, expected)
    problems = []
    for shard in plan.shards:
        for output in shard.outputs:
            stored = written.tensors[output.name]
            if (stored.dtype, stored.spans[0].path.name) != (output.dtype, shard.name):
                problems.append(f"{output.name} is not where or what the plan says")
            elif output.action and not _same(stored.read(), output.read()):
                problems.append(f"{output.name} differs from what was computed")
    refuse(folder, problems)
    return written


def prove(
    base: Base, latent: Sequence[Output], written: Checkpoint, flow: AsymFlow, steps: int, seed: int
) -> Proof | None:
    """Run the acceptance test on the written weights; None if not even one block of each kind fits in memory."""
    network, budget = base.network_class(), available_memory() // 2
    outputs = {tensor.name: tensor for tensor in latent}
    for depth, config in (("whole", base.config), ("one block of each kind", base.shallow(base.config))):
        shapes = class_shapes(network, stock_config(config))
        if 8 * sum(map(math.prod, shapes.values())) <= budget:
            deep = str if depth == "whole" else partial(base.deep_name, config=base.config)
            kept = {name: outputs[deep(name)] for name in shapes}
            wide = {n: written.tensors[deep(n)] for n in class_shapes(network, base.pixel_config(config))}
            return _prove(base, config, kept, wide, flow, steps, seed, depth)
    return None


def available_memory() -> int:
    """Bytes of memory that a program may take now."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _prove(
    base: Base,
    config: dict[str, Any],
    latent: dict[str, Output],
    written: Mapping[str, Stored],
    flow: AsymFlow,
    steps: int,
    seed: int,
    depth: str,
) -> Proof:
    wide_config = base.pixel_config(config)
    pixel = {name: tensor.read().double() for name, tensor in written.items()}
    shared = {name for name, output in latent.items() if written[base.pixel_name(name)].shape == output.shape}
    narrow = {n: pixel[base.pixel_name(n)] if n in shared else t.read().double() for n, t in latent.items()}
    exact = flow.to(torch.float64)
    u, _, vh = torch.linalg.svd(exact.basis, full_matrices=False)
    exact.basis = u @ vh  # float32 storage leaves 1e-8 of non-orthonormality; the identity is about orthonormal A
    refolded = fold(narrow, exact.basis, base.projections, base.pixel_name)
    generator = torch.Generator().manual_seed(seed)
    cond = base.random_conditioning(config, 2, generator)
    noise = torch.randn(2, GRID[0] * GRID[1], len(flow.basis), generator=generator, dtype=torch.float64)
    network = _model(base, stock_config(config), narrow)

    def error(state: Mapping[str, Tensor], count: int) -> float:
        wide = _model(base, wide_config, state)
        return exactness(
            lambda z, t: base.call(network, z, t, cond, GRID),
            lambda x, t: base.call(wide, x, t, cond, GRID),
            exact,
            noise,
            count,
        )

    return Proof(error(refolded, steps), error(pixel, min(steps, STORED_STEPS)), steps, depth)


def _model(base: Base, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """The stock class over these very tensors: nothing is copied, so that two models can share their blocks."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = base.network_class()(**config)
    model.load_state_dict(state, assign=True)
    return model.double().eval().requires_grad_(False)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
