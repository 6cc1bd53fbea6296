"""Proof of a folder as it lies on the disk, in two steps that lean on nothing the writing used.

1. Every tensor is compared with what it was made from: a folded one, element by element, with a fold written another
   way (one sum over named axes, in float64) within the rounding of its dtype; a merged one likewise; any other bit for
   bit. 2. That other fold is itself proven by the acceptance test: coupled Euler sampling of base and pixel model, both
   identities at every step, to rounding in float64. The weights as they are stored are sampled too; their error must
   be what rounding to their dtype costs, which is measured beside it with weights that are rounded at random.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux2pixel.asymflow.linalg import polar
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.convert.fold import LATENT_PATCH, RGB, exactness, folded_names
from flux2pixel.convert.plan import class_shapes, latent_config, pixel_config
from flux2pixel.convert.prepare import Job
from flux2pixel.families.base import Base, Projections, init_config, read_config
from flux2pixel.recipe import Convert
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.memory import available_memory
from flux2pixel.runtime.progress import Bar, bar
from flux2pixel.weights.checkpoint import DTYPES, Checkpoint, Stored, check_names, open_checkpoint, refuse
from flux2pixel.weights.write import BLOCK, CHUNK, same_bytes

STORED_STEPS = 8  # enough to see what rounding costs
GRID = (2, 3)  # tokens; an odd aspect ratio
BAR = 10.0  # how many times the error of random rounding the stored weights' may be
SINGLE = 2.0**-24  # unit roundoff of float32, in which LoRA is merged and through which torch casts to 16 bits
WHOLE, BLOCKS = "whole", "one block of each kind"
_WORDS = {
    "equal": "tensors are the base's bit for bit",
    "cast": "are the base's, rounded",
    "folded": "are the fold, to the rounding of their dtype",
    "merged": "are what was merged, to rounding",
    "trained": "were trained",
}


@dataclass(frozen=True)
class Proof:
    """What was found of a folder.

    ``max_abs_error`` and ``stored_error``: largest absolute errors of the acceptance test with the fold in float64 and
    with the weights as stored (None where they are no fold, as after training); ``stored_bar`` is what the second may
    be. ``depth`` is "whole", "one block of each kind" or "none"; ``tensors`` counts them by how they were compared;
    ``fold_error`` is the largest share of the allowed rounding that an element of a folded tensor takes.
    """

    max_abs_error: float | None
    stored_error: float | None
    steps: int
    depth: str
    dtype: str = "float64"
    stored_bar: float | None = None
    fold_error: float = 0.0
    tensors: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """In words, for a log."""
        counted = ", ".join(f"{count} {_WORDS[kind]}" for kind, count in self.tensors.items())
        lines = [f"proof: {counted}"] if counted else []
        if self.max_abs_error is None:
            return [*lines, "exactness: not tested, not even one block of each kind fits in memory"]
        rounding = "" if self.stored_error is None else f"; {self.stored_error:.1e} with the weights as stored"
        what = "exactness" if self.stored_error is not None else "exactness of the trunk"
        return [
            *lines,
            f"{what}: {self.max_abs_error:.1e} over {self.steps} Euler steps in float64 ({self.depth}){rounding}",
        ]


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
    found = init_config(network, read_config(folder / "config.json"))
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


def prove(
    job: Job,
    written: Checkpoint,
    flow: AsymFlow,
    settings: Convert,
    seed: int,
    device: torch.device | None = None,
    trained: Collection[str] = (),
) -> Proof:
    """Run the acceptance test on the written weights; ``flow`` is the folder's own basis and scale.

    Where an adapter or a training changed the projections, they are left out and the trunk is proven: all that was
    left alone, with the base's projections folded. Raises Flux2PixelError if an error is above ``settings.tolerance``
    or above what storing costs.
    """
    device = device if device is not None and device.type == "cuda" else torch.device("cpu")  # it needs float64
    chosen = choose_depth(job.base, settings.proof, device)
    if chosen is None:
        return Proof(None, None, settings.verify_steps, "none")
    depth, config = chosen
    base, generator = job.base, torch.Generator().manual_seed(seed)
    trunk = _Trunk(job, written, flow.to(device, torch.float64), config, depth == WHOLE, device, trained)
    cond = {n: value.to(device) for n, value in base.random_conditioning(config, 2, generator).items()}
    noise = torch.randn(2, GRID[0] * GRID[1], len(flow.basis), generator=generator, dtype=torch.float64).to(device)
    network = _model(base, config, trunk.narrow, device)
    exact = flow.to(device, torch.float64)
    # float32 storage leaves 1e-8 of non-orthonormality; the identity is about orthonormal A.
    exact.basis = polar(exact.basis)
    few = min(settings.verify_steps, STORED_STEPS)

    def error(state: Mapping[str, Tensor], count: int, progress: Bar) -> float:
        wide = _model(base, pixel_config(base, config), state, device)
        return exactness(
            lambda z, t: base.call(network, z, t, cond, GRID),
            lambda x, t: base.call(wide, x, t, cond, GRID),
            exact,
            noise,
            count,
            progress.advance,
        )

    with bar("proof: steps", settings.verify_steps + (2 * few if trunk.stored else 0)) as progress:
        worst = error(trunk.refolded(exact.basis), settings.verify_steps, progress)
        if not worst <= settings.tolerance:
            raise Flux2PixelError(
                f"exactness error {worst:.1e} is above convert.tolerance {settings.tolerance:g}: nothing was written"
            )
        if not trunk.stored:
            return Proof(worst, None, settings.verify_steps, depth)
        allowed = BAR * error(trunk.refolded(exact.basis, generator), few, progress) + settings.tolerance
        stored = error(trunk.shared | trunk.stored, few, progress)
        if not stored <= allowed:
            raise Flux2PixelError(
                f"the weights as stored are off by {stored:.1e} in sampling, above {allowed:.1e}, {BAR:g} times what "
                "rounding to their dtype costs: nothing was written"
            )
    return Proof(worst, stored, settings.verify_steps, depth, stored_bar=allowed)


def choose_depth(base: Base, wanted: str, device: torch.device) -> tuple[str, dict[str, Any]] | None:
    """How much of the model is sampled, and its configuration; None if not even one block of each kind fits in memory.

    ``wanted`` is ``convert.proof``. Half of the memory is used at most, or all of it if the whole model is asked for.
    Raises UsageError if that does not fit.
    """
    network, config, room = base.network_class(), latent_config(base), available_memory(device)
    for depth, candidate in ((WHOLE, config), (BLOCKS, init_config(network, base.shallow(config)))):
        if wanted == "blocks" and depth == WHOLE:
            continue
        needed = 8 * sum(map(math.prod, class_shapes(network, candidate).values()))
        if needed <= room // 2 or (wanted == depth == WHOLE and needed <= room):
            return depth, candidate
        if wanted == depth == WHOLE:
            raise UsageError(
                f"convert.proof: the whole model in float64 needs {needed / 1e9:.1f} GB, {room / 1e9:.1f} GB are free; "
                "use auto or blocks"
            )
    return None


# Tensors against what they were made from ------------------------------------------------------------------------


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
    value: Tensor, slack: Tensor, pair: Any, strength: float, first: int, last: int
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
        if len(sides[0]) and not same_bytes(*(memoryview(side.view(torch.uint8).numpy()) for side in sides)):
            return False
    return True


# Sampling --------------------------------------------------------------------------------------------------------


class _Trunk:
    """The tensors that sampling needs, in float64 on the device; what base and pixel model share is there once.

    ``narrow`` is the latent model's state; ``shared`` what the pixel model has of it, by the pixel model's names;
    ``stored`` the folded tensors as they are stored, empty where they were replaced or trained.
    """

    def __init__(
        self,
        job: Job,
        written: Checkpoint,
        flow: AsymFlow,
        config: dict[str, Any],
        whole: bool,
        device: torch.device,
        trained: Collection[str],
    ):
        base, self.flow, self.base = job.base, flow, job.base
        deep: Callable[[str], str] = str if whole else partial(base.deep_name, config=latent_config(base))
        self.narrow: dict[str, Tensor] = {}
        self.shared: dict[str, Tensor] = {}
        self.stored: dict[str, Tensor] = {}
        self.folded: list[tuple[str, torch.dtype]] = []
        replaced = {*trained, *(job.adapter.full if job.adapter else ()), *(job.adapter.pairs if job.adapter else ())}
        for name in class_shapes(base.network_class(), config):
            latent = deep(name)
            wide = base.pixel_name(latent)
            stored = written.tensors[wide]
            if latent in folded_names(base.projections):
                self.narrow[name] = merged(job, latent, 0, job.checkpoint.tensors[latent].length)[0].to(device)
                self.folded.append((name, DTYPES[stored.dtype]))
                if wide not in replaced:
                    self.stored[base.pixel_name(name)] = stored.read().to(device).double()
                continue
            if wide in replaced:
                value = merged(job, latent, 0, job.checkpoint.tensors[latent].length)[0].to(device)
            else:
                value = stored.read().to(device).double()
            self.narrow[name] = self.shared[base.pixel_name(name)] = value.reshape(stored.shape)
        if len(self.stored) < len(self.folded):
            self.stored = {}

    def refolded(self, basis: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The pixel model's state, its folds in float64; with a ``generator``, off at random as rounding would be."""
        state = dict(self.shared)
        for name, dtype in self.folded:
            wide = refold(name, self.narrow[name], basis, self.base.projections)
            if generator is not None:
                unit = max(torch.finfo(dtype).eps / 2, SINGLE)  # the basis is stored in float32
                noise = torch.rand(wide.shape, generator=generator, dtype=torch.float64).to(wide.device)
                wide = wide * (1 + unit * (2 * noise - 1))
            state[self.base.pixel_name(name)] = wide
        return state


def _model(base: Base, config: Mapping[str, Any], state: Mapping[str, Tensor], device: torch.device) -> Any:
    """The stock class over these very tensors: nothing is copied, so that two models can share their blocks."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = base.network_class()(**config)
    model.load_state_dict(state, assign=True)
    return model.double().to(device).eval().requires_grad_(False)
