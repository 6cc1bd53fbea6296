"""Models that turn prompts into images: the latent base and the pixel model, behind one call.

Both start from the same pixel noise: the latent model takes its projection A^T eps, and the grids are matched, so that
what differs between two columns of a report is the model alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flux2pixel import families as bases
from flux2pixel.asymflow import color, schedule, tokens
from flux2pixel.asymflow import solvers as sampler
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.families.base import Base, Conditioning
from flux2pixel.models.folder import drawn_with, equals_its_base
from flux2pixel.recipe import Sample
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.progress import log

if TYPE_CHECKING:
    from PIL.Image import Image

CPU = torch.device("cpu")


class Model(Protocol):
    """What generates: conditionings x 2 and pixel noise (B, N, D) -> sRGB images (B, 3, H, W) in [0, 1].

    The inputs may lie on any device; the images are on the model's.
    """

    folder: Path

    def text(self, prompts: list[str]) -> Conditioning: ...

    def __call__(self, text: Conditioning, empty: Conditioning, noise: Tensor, size: tuple[int, int]) -> Tensor: ...


def _branches(
    base: Base,
    network: Any,
    time: Tensor,
    inputs: Tensor,
    text: Conditioning,
    empty: Conditioning,
    scale: float,
    grid: tuple[int, int],
) -> tuple[Tensor, Tensor | None]:
    """The branches of guidance, autocast to bf16; float32 (conditional, unconditional or None)."""
    with torch.autocast(inputs.device.type, torch.bfloat16):
        times = time.expand(len(inputs))
        conditional, unconditional = base.branches(network, inputs, times, text, empty, scale, grid)
    return conditional.float(), None if unconditional is None else unconditional.float()


def _placed(
    place: torch.device, text: Conditioning, empty: Conditioning, noise: Tensor
) -> tuple[Conditioning, Conditioning, Tensor]:
    """What a model is called with, on its device."""
    text, empty = ({name: value.to(place) for name, value in cond.items()} for cond in (text, empty))
    return text, empty, noise.to(place)


@dataclass
class LatentModel:
    """The base, sampled with plain guidance by Euler, or any solver, on its own time grid."""

    base: Base
    flow: AsymFlow
    settings: Any

    def __post_init__(self) -> None:
        self.settings = drawn_with(self.settings, self.base.folder)

    def generate(self, prompts: str | Sequence[str], **settings: Any) -> list[Image]:
        """Images of the prompts."""
        return _generate(self, prompts, **settings)

    @property
    def folder(self) -> Path:
        return self.base.folder

    def text(self, prompts: list[str]) -> Conditioning:
        return self.base.text(prompts)

    @torch.no_grad()
    def __call__(self, text: Conditioning, empty: Conditioning, noise: Tensor, size: tuple[int, int]) -> Tensor:
        grid = (size[0] // self.base.patch_size, size[1] // self.base.patch_size)
        text, empty, noise = _placed(self.base.device, text, empty, noise)

        def predict(z: Tensor, tau: Tensor) -> Tensor:
            scale = self.settings.guidance
            v, away = _branches(self.base, self.base.transformer, tau, z, text, empty, scale, grid)
            return z - tau * (v if away is None else self.base.guide(v, away, scale))

        taus = schedule.grid(self.settings.steps, self.settings.shift).to(noise.device)
        z = sampler.sample(predict, noise @ self.flow.basis, taus, solver=self.settings.solver)
        return self.base.decode(z, *size).clamp(0, 1)


@dataclass
class PixelModel:
    """A converted or finetuned folder, sampled on the pixel grid matched to the base's.

    ``matched`` turns off what the latent base has no counterpart of (orthogonal guidance, gamut clamp), for the
    comparison in which the converted model must equal the base.
    """

    base: Base
    transformer: Any
    flow: AsymFlow
    patch: int
    settings: Any
    matched: bool = False

    def __post_init__(self) -> None:
        self.settings = drawn_with(self.settings, self.base.folder)

    def generate(self, prompts: str | Sequence[str], **settings: Any) -> list[Image]:
        """Images of the prompts."""
        return _generate(self, prompts, **settings)

    @property
    def folder(self) -> Path:
        return self.base.folder

    def text(self, prompts: list[str]) -> Conditioning:
        return self.base.text(prompts)

    @torch.no_grad()
    def __call__(self, text: Conditioning, empty: Conditioning, noise: Tensor, size: tuple[int, int]) -> Tensor:
        grid = (size[0] // self.patch, size[1] // self.patch)
        text, empty, noise = _placed(self.base.device, text, empty, noise)
        orthogonal = self.settings.orthogonal and not self.matched
        scale = self.settings.guidance

        def predict(x: Tensor, sigma: Tensor) -> Tensor:
            k, tau = self.flow.calibrate(sigma)
            v, away = _branches(self.base, self.transformer, tau, k * x, text, empty, scale, grid)
            if away is None or not orthogonal:
                return self.flow.predict_x0(v if away is None else self.base.guide(v, away, scale), x, sigma)
            x0, x0_away = (self.flow.predict_x0(branch, x, sigma) for branch in (v, away))
            return sampler.guide(x0, x0_away, scale, orthogonal=True)

        def clamp(x0: Tensor) -> Tensor:
            return tokens.patchify(color.clamp_to_gamut(tokens.unpatchify(x0, self.patch, *size)), self.patch)

        sigmas = self.flow.sigma_of(schedule.grid(self.settings.steps, self.settings.shift).to(noise.device))
        use_clamp = self.settings.gamut_clamp and not self.matched
        x = sampler.sample(predict, noise, sigmas, solver=self.settings.solver, clamp=clamp if use_clamp else None)
        return color.decode(tokens.unpatchify(x, self.patch, *size))


def load_pixel_model(folder: Path, settings: Sample, *, matched: bool = False, place: torch.device = CPU) -> PixelModel:
    """Load a converted or finetuned folder on a device; UsageError or Flux2PixelError naming what is wrong with it."""
    if not (folder / "asymflow.json").is_file():
        raise UsageError(f"--model {folder}: no asymflow.json in it; run convert, or name a converted folder")
    use = json.loads((folder / "asymflow.json").read_text())
    stored, _ = files.read_tensors(folder / "asymflow.safetensors")
    flow = AsymFlow(stored["basis"], stored["scale"], sigma_min=use["sigma_min"])
    base = bases.open_base(folder)
    base.device = place
    _note_guidance(base, settings)
    return PixelModel(base, base.transformer, flow.to(place), use["patch_size"], settings, matched)


def _note_guidance(base: Base, settings: Sample) -> None:
    if base.guidance == "none" and settings.guidance not in (None, 1):
        log(f"note: {base.folder} is distilled and takes no guidance; sample.guidance {settings.guidance:g} is ignored")


def seeded_noise(keys: list[tuple[int, int]], count: int, width: int) -> Tensor:
    """Noise (len(keys), count, width) that depends on each (prompt, sample) key alone, not on the batch."""
    drawn = [np.random.default_rng([911, *key]).standard_normal((count, width), dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(drawn))


def to_bytes(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def open_model(
    folder: str | Path,
    sample: Sample | None = None,
    *,
    subspace: Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LatentModel | PixelModel:
    """Open a converted or finetuned folder, or a latent base (whose noise is projected by the basis in ``subspace``).

    ``device`` is what its parts are loaded to, each when first used; what ``sample`` leaves open is the model's own.
    """
    sample, place = sample or Sample(), torch.device(device or CPU)
    if (Path(folder) / "asymflow.json").is_file():
        return load_pixel_model(Path(folder), sample, matched=equals_its_base(Path(folder)), place=place)
    from flux2pixel.weights.subspace import read_subspace

    base = bases.open_base(folder, dtype)
    base.device = place
    if subspace is None or not subspace.is_file():
        raise UsageError(f"{subspace}: missing; the base starts from noise projected by it, so run fit-subspace first")
    _note_guidance(base, sample)
    return LatentModel(base, read_subspace(subspace)[0].to(place), sample)


def _generate(
    model: LatentModel | PixelModel,
    prompts: str | Sequence[str],
    *,
    seed: int = 0,
    count: int = 1,
    size: tuple[int, int] | None = None,
    negative: str = "",
    batch: int = 4,
    on_image: Callable[[int], object] | None = None,
) -> list[Image]:
    """Draw ``count`` images of each prompt, one at a time; ``size`` (height, width) is the model's own if not given."""
    from PIL import Image

    patch = model.patch if isinstance(model, PixelModel) else model.base.patch_size
    height, width = size or (model.settings.height or 1024, model.settings.width or 1024)
    if height % patch or width % patch:
        raise UsageError(f"size {height}x{width} (height x width): must be multiples of {patch}, a token's side")
    drawn: list[Image.Image] = []
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        for _ in range(count):
            text, empty = model.text([prompt]), model.text([negative])
            noise = seeded_noise([(seed, len(drawn))], (height // patch) * (width // patch), 3 * patch * patch)
            drawn += [Image.fromarray(image) for image in to_bytes(model(text, empty, noise, (height, width)))]
            if on_image is not None:
                on_image(1)
    return drawn
