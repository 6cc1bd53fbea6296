"""Proof of a folder as it lies on the disk, in two steps that lean on nothing the writing used.

1. Every tensor is compared with what it was made from, the folded ones with a fold written another way (compare.py).
2. That other fold is itself proven by the acceptance test: coupled Euler sampling of base and pixel model, both
identities at every step, to rounding in float64. The weights as they are stored are sampled too; their error must be
what rounding to their dtype costs, which is measured beside it with weights that are off at random by as much.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flux2pixel.asymflow.linalg import polar
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.convert.compare import SINGLE, merged, refold
from flux2pixel.convert.fold import exactness, folded_names
from flux2pixel.convert.plan import class_shapes, latent_config, pixel_config
from flux2pixel.convert.prepare import Job
from flux2pixel.families.configs import init_config
from flux2pixel.models.base import Base
from flux2pixel.recipe import Convert
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.memory import available_memory
from flux2pixel.runtime.progress import Bar, bar
from flux2pixel.weights.checkpoint import DTYPES, Checkpoint

STORED_STEPS = 8  # enough to see what rounding costs
GRID = (2, 3)  # tokens; an odd aspect ratio
# How many times the error of random rounding the stored weights' may be. Two draws of rounding differ by more than ten
# times in a small network, and a basis stored in float32 adds its own; a wrong fold is off by far more than a hundred,
# and what is off by less the comparison of elements finds.
BAR = 100.0
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


def flow_digest(flow: AsymFlow) -> str:
    """SHA-256 of basis and scale as a folder stores them, in float32, whatever else its file holds."""
    found = hashlib.sha256(flow.basis.float().contiguous().numpy().tobytes())
    found.update(flow.scale.float().numpy().tobytes())
    return found.hexdigest()


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
    for depth, candidate in ((WHOLE, config), (BLOCKS, init_config(network, base.shallow(config), str(base.folder)))):
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
