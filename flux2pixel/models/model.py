"""Models that turn prompts into images, the latent base and the pixel model, behind one call.

Both start from the same pixel noise: the latent model takes its projection A^T eps, so that what differs between two
columns of a report is the model alone, and its schedule.

    B  images    N  tokens    D  pixel token width    sizes are (height, width) in pixels
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux2pixel.asymflow.codec import Codec
from flux2pixel.asymflow.denoiser import Denoiser
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.asymflow.readout import Readout
from flux2pixel.asymflow.schedule import noise_levels
from flux2pixel.asymflow.solvers import SOLVERS, OnStep, sample
from flux2pixel.families.base import Conditioning, Reference
from flux2pixel.models.base import Base, open_base
from flux2pixel.models.features import Features
from flux2pixel.models.folder import is_pixel_folder, read_folder
from flux2pixel.models.offload import Offload, Quantize, check, rest
from flux2pixel.models.sampler import Sampler, base_sampler, check_guidance
from flux2pixel.recipe import Sample
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.weights.subspace import read_subspace

Size = tuple[int, int]
NOISE = 911  # stream of the seeded noise, apart from any other use of a seed


@dataclass(frozen=True)
class Model(ABC):
    """What draws: conditionings and pixel noise (B, N, D) in, sRGB images (B, 3, H, W) in [0, 1] out.

    The inputs may lie on any device; the images are on the network's.
    """

    base: Base
    sampler: Sampler
    codec: Codec
    network: Any = field(default=None, repr=False)

    def with_network(self, network: Any) -> Model:
        """The same model drawing with another network of its class, such as one in training, on that one's device."""
        return replace(self, network=network)

    @property
    def transformer(self) -> Any:
        """The network that draws; loaded when first asked for."""
        return self.base.transformer if self.network is None else self.network

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.base.device if self.network is None else next(self.network.parameters()).device

    @property
    def size(self) -> Size:
        """(height, width) of an image whose size nobody named."""
        return self.sampler.height, self.sampler.width

    def text(self, prompts: Sequence[str]) -> Conditioning:
        """Embed prompts as the base's own pipeline does."""
        return self.base.text(prompts)

    def check_size(self, size: Size) -> None:
        """Raise UsageError if an image of this size is not a whole number of tokens."""
        patch = self.codec.patch
        if size[0] % patch or size[1] % patch or min(size) < patch:
            raise UsageError(f"size {size[0]}x{size[1]} (height x width): must be multiples of {patch}, a token's side")

    def noise(self, keys: Sequence[tuple[int, int]], size: Size) -> Tensor:
        """Pixel noise (len(keys), N, D) that depends on each (seed, index) key alone."""
        self.check_size(size)
        patch = self.codec.patch
        return seeded_noise(keys, (size[0] // patch) * (size[1] // patch), 3 * patch**2)

    def __call__(
        self,
        text: Conditioning,
        empty: Conditioning,
        noise: Tensor,
        size: Size,
        references: Sequence[Tensor] = (),
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Draw: ``empty`` is what guidance leads away from; ``references`` are sRGB pictures (B, 3, H', W') to edit."""
        self.check_size(size)
        with torch.no_grad():
            return self._decode(self.tokens(text, empty, noise, size, self.levels(size), references, on_step), size)

    def tokens(
        self,
        text: Conditioning,
        empty: Conditioning,
        noise: Tensor,
        size: Size,
        levels: Tensor,
        references: Sequence[Tensor] = (),
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Clean tokens (B, N, C), drawn on ``levels``; the other arguments are those of a call."""
        device = self.device
        text, empty = ({name: value.to(device) for name, value in cond.items()} for cond in (text, empty))
        with torch.no_grad():
            known = [self._reference(picture.to(device)) for picture in references]
            denoiser = self._denoiser(text, empty, size, known)
            solver = SOLVERS[self.sampler.solver]
            return sample(denoiser, self._start(noise.to(device)), levels.to(device), solver, on_step)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        count: int = 1,
        size: Size | None = None,
        negative: str = "",
        references: Sequence[Image.Image] = (),
        batch: int = 4,
        on_image: Callable[[int], object] | None = None,
    ) -> list[Image.Image]:
        """Draw ``count`` images of each prompt; image i is that of ``seed`` and i, whatever the batch.

        The prompts are embedded first and the text encoder is let go before the network is loaded. ``on_image`` is told
        of every batch how many images it had.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        size = size or self.size
        self.check_size(size)
        rows = [prompt for prompt in prompts for _ in range(count)]
        table = self.text([*rows, negative])
        self.base.free("text")
        pictures = [_picture(image, self.codec.patch) for image in references]
        images: list[Image.Image] = []
        for first in range(0, len(rows), batch):
            chosen = range(first, min(first + batch, len(rows)))
            text = {name: value[list(chosen)] for name, value in table.items()}
            empty = {name: value[[-1] * len(chosen)] for name, value in table.items()}
            noise = self.noise([(seed, index) for index in chosen], size)
            shown = [picture.expand(len(chosen), -1, -1, -1) for picture in pictures]
            names = [f"{rows[index]!r}, seed {seed}, image {index}" for index in chosen]
            images += [Image.fromarray(array) for array in to_bytes(self(text, empty, noise, size, shown), names)]
            if on_image is not None:
                on_image(len(chosen))
        return images

    @abstractmethod
    def levels(self, size: Size) -> Tensor:
        """The noise levels of the network's own tokens that an image of ``size`` is drawn on, (steps + 1,)."""

    @abstractmethod
    def _denoiser(self, text: Conditioning, empty: Conditioning, size: Size, known: list[Reference]) -> Denoiser:
        """The denoiser of one drawing."""

    @abstractmethod
    def _start(self, noise: Tensor) -> Tensor:
        """Where sampling starts, from pixel noise."""

    @abstractmethod
    def _decode(self, tokens: Tensor, size: Size) -> Tensor:
        """Clean tokens to sRGB."""

    @abstractmethod
    def _reference(self, picture: Tensor) -> Reference:
        """A picture to edit, sRGB (B, 3, H', W'), as the network takes it."""

    def _branches(
        self,
        text: Conditioning,
        empty: Conditioning,
        size: Size,
        known: list[Reference],
        features: Features | None = None,
    ) -> Any:
        """The network with its conditionings, autocast to bf16; v in float32. ``features`` are kept of every call."""
        network, patch, scale = self.transformer, self.codec.patch, self.sampler.guidance
        grid = (size[0] // patch, size[1] // patch)

        def branches(inputs: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
            with torch.autocast(inputs.device.type, torch.bfloat16), features or nullcontext():
                v, away = self.base.branches(network, inputs, time, text, empty, scale, grid, known)
            if features is not None:
                features.align(v, away)
            return v.float(), None if away is None else away.float()

        return branches


@dataclass(frozen=True)
class PixelModel(Model):
    """A converted, read-out or finetuned folder."""

    flow: AsymFlow = field(kw_only=True)
    readout: Readout | None = field(default=None, kw_only=True)

    def levels(self, size: Size) -> Tensor:
        """Pixel noise levels, (steps + 1,)."""
        assert self.sampler.shift is not None
        return noise_levels(self.sampler.steps, self.sampler.shift, *size)

    def _denoiser(self, text: Conditioning, empty: Conditioning, size: Size, known: list[Reference]) -> Denoiser:
        features, refine = None, None
        if self.readout is not None:
            grid = (size[0] // self.codec.patch, size[1] // self.codec.patch)
            features = Features(self.base, self.transformer, grid[0] * grid[1])
            push = self.readout.push(self.sampler.guidance)
            refine = self.readout.to(self.device).bind(grid, partial(features.guided, scale=push))
        return Denoiser(
            self._branches(text, empty, size, known, features),
            self.flow.to(self.device),
            self.sampler.guidance,
            self.base.guide,
            self.sampler.orthogonal,
            (lambda x0: self.codec.clamp(x0, *size)) if self.sampler.gamut_clamp else None,
            refine,
        )

    def _start(self, noise: Tensor) -> Tensor:
        return noise

    def _decode(self, tokens: Tensor, size: Size) -> Tensor:
        return self.codec.decode(tokens, *size)

    def _reference(self, picture: Tensor) -> Reference:
        height, width = picture.shape[-2:]
        x = self.codec.encode(picture) / self.flow.scale.to(picture)
        return x, (height // self.codec.patch, width // self.codec.patch)


@dataclass(frozen=True)
class LatentModel(Model):
    """The latent base, drawn as its own pipeline draws it, or on the grid of a pixel model (``sampler.shift``).

    With ``flow`` it starts from the projection of the pixel noise by the basis; without, from noise of its own.
    """

    flow: AsymFlow | None = field(default=None, kw_only=True)

    def levels(self, size: Size) -> Tensor:
        """Latent noise levels tau, (steps + 1,)."""
        steps, shift = self.sampler.steps, self.sampler.shift
        if shift is None:
            return self.base.time_grid(steps, *size).float()
        if self.flow is None:
            raise UsageError("sample.shift: is of pixel noise levels, and a latent base has none without a subspace")
        return noise_levels(steps, shift / float(self.flow.scale), *size)

    def _denoiser(self, text: Conditioning, empty: Conditioning, size: Size, known: list[Reference]) -> Denoiser:
        return Denoiser(self._branches(text, empty, size, known), None, self.sampler.guidance, self.base.guide)

    def _start(self, noise: Tensor) -> Tensor:
        if self.flow is None:
            return noise[..., : self.base.latent_width]
        return noise @ self.flow.basis.to(noise)

    def _decode(self, tokens: Tensor, size: Size) -> Tensor:
        rest([self.transformer])
        return self.base.decode(tokens, *size).clamp(0, 1)

    def _reference(self, picture: Tensor) -> Reference:
        height, width = picture.shape[-2:]
        return self.base.encode(picture), (height // self.codec.patch, width // self.codec.patch)


def open_model(
    name: str | Path,
    sample: Sample | None = None,
    *,
    subspace: Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    offload: Offload | None = None,
    quantize: Quantize | None = None,
) -> PixelModel | LatentModel:
    """Open a converted, read-out or finetuned folder, or a latent base by alias, folder or Hub id, without its weights.

    Args:
        sample: what the user wrote of the sampling; it wins over the folder's settings and the base's.
        subspace: for a latent base, the file by whose basis it takes the pixel models' noise.
        device, dtype: of the parts, when they are loaded; the CPU, and the base's default there, if not given.
        offload: how weights wait on the CPU for their turn on another device: ``model``, ``group`` or ``sequential``.
        quantize: the transformer's weights in 8 bits, ``int8`` or ``fp8``; needs torchao.

    Raises UsageError or Flux2PixelError naming what is wrong with the folder, or a setting that it cannot honour.
    """
    place = torch.device(device or "cpu")
    check(offload, quantize, place)
    return model_of(open_base(name, dtype, device=place, offload=offload, quantize=quantize), sample, subspace)


def model_of(base: Base, sample: Sample | None = None, subspace: Path | None = None) -> PixelModel | LatentModel:
    """The model that a base, or a folder made from one, is; arguments and errors as of `open_model`."""
    written = sample or Sample()
    if is_pixel_folder(base.folder):
        stored = read_folder(base.folder)
        sampler = check_guidance(base, stored.sampler.changed(written), written)
        readout = Readout.from_tensors(stored.flow.basis, stored.tensors)
        return PixelModel(base, sampler, stored.codec, flow=stored.flow, readout=readout)
    for key in ("orthogonal", "gamut_clamp"):
        if sample is not None and getattr(sample, key):
            raise UsageError(f"sample.{key}: a latent base has no counterpart of it; leave it out")
    flow = read_subspace(subspace)[0] if subspace is not None else None
    sampler = check_guidance(base, base_sampler(base).changed(written), written)
    return LatentModel(base, sampler, Codec(base.patch_size), flow=flow)


def seeded_noise(keys: Sequence[tuple[int, int]], count: int, width: int) -> Tensor:
    """Noise (len(keys), count, width) that depends on each (seed, index) key alone, not on the batch."""
    drawn = [np.random.default_rng([NOISE, *key]).standard_normal((count, width), dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(drawn))


def to_bytes(images: Tensor, names: Sequence[str] = ()) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8. Raises Flux2PixelError, by ``names``, for a NaN or infinity."""
    finite = images.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        broken = names[finite.index(False)] if names else f"image {finite.index(False)} of the batch"
        raise Flux2PixelError(
            f"{broken}: the model drew values that are not finite; its weights or settings are broken"
        )
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _picture(image: Image.Image, patch: int) -> Tensor:
    """A picture to edit as sRGB (1, 3, H, W) in [0, 1], cut to whole tokens from its top left."""
    array = np.asarray(image.convert("RGB"))
    height, width = (length // patch * patch for length in array.shape[:2])
    if not height or not width:
        raise UsageError(f"reference of {array.shape[0]}x{array.shape[1]}: smaller than one token of {patch} pixels")
    return torch.from_numpy(array[:height, :width].copy()).permute(2, 0, 1)[None].float() / 255
