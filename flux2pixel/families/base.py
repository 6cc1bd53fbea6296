"""What every family of bases offers: the interface that the four stages are written against.

    B  images    h, w  token grid (H / p, W / p)    N = h w    r  latent token width    D  pixel token width (3 p p)

Tokens run row by row and are channel-first, (c, ph, pw), latent and pixel alike, in every family; what order a
transformer's own projections want is the family's business, here and in the fold.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.progress import log, quiet_libraries

Conditioning = dict[str, Tensor]  # what a transformer is told beside tokens and time; the batch leads every value
Reference = tuple[Tensor, tuple[int, int]]  # tokens (B, M, C) of a picture to edit, and their (h, w) grid
Order = Literal["c,ph,pw", "ph,pw,c"]
Guidance = Literal["cfg", "embedded", "none"]
TEXT_BATCH = 64
DEPTHS = ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers")


def take(cond: Conditioning, index: Tensor | slice) -> Conditioning:
    """Rows of a conditioning: every value indexed along its batch."""
    return {name: value[index] for name, value in cond.items()}


def stack(*conds: Conditioning) -> Conditioning:
    """Join conditionings along the batch. Texts of unequal length are zero-padded if a ``mask`` marks what is real.

    Raises ValueError if the keys differ, or lengths do and there is no mask.
    """
    if any(cond.keys() != conds[0].keys() for cond in conds):
        raise ValueError(f"conditionings with different keys: {[sorted(cond) for cond in conds]}")
    joined = {}
    for name in conds[0]:
        values = [cond[name] for cond in conds]
        lengths = {value.shape[1] for value in values if name in ("text", "mask")}
        if len(lengths) > 1:
            if "mask" not in conds[0]:
                raise ValueError(f"conditionings of unequal text lengths {sorted(lengths)} and without a mask")
            values = [F.pad(v, (0, 0) * (v.ndim - 2) + (0, max(lengths) - v.shape[1])) for v in values]
        joined[name] = torch.cat(values)
    return joined


@dataclass(frozen=True)
class Projections:
    """Modules of the latent checkpoint that tie tokens to the network; weights, and biases where the family has them.

    ``inputs`` and ``output`` are folded, ``modulation`` is the final norm's (trained in full by a finetune).
    ``input_order`` and ``output_order`` are how the class flattens a token for each; a convolution flattens c,ph,pw.
    """

    inputs: tuple[str, ...]
    output: str
    modulation: str
    input_order: Order = "c,ph,pw"
    output_order: Order = "c,ph,pw"


class Base(ABC):
    """A latent flow model in a diffusers folder, its parts loaded when first used, frozen and in eval mode.

    Args:
        folder: holds ``transformer/``, and what of ``vae/``, ``text_encoder*/``, ``tokenizer*/`` is asked for.
        dtype: of transformer and text encoders; the VAE is float32 always.
    """

    device = torch.device("cpu")
    """Where its parts go when they are loaded; to be set before the first is used."""

    family: ClassVar[str]
    color_space: ClassVar[str] = "oklab-normalised"
    projections: ClassVar[Projections]
    lora_targets: ClassVar[tuple[str, ...]]
    """Regular expressions; a Linear whose full name matches one is finetuned by LoRA (all others are left alone)."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        self.folder, self.dtype = folder, dtype

    # What a family must say -------------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def network_class() -> Any:
        """The stock diffusers class of the transformer, latent and pixel."""

    @staticmethod
    @abstractmethod
    def vae_class() -> Any:
        """The stock diffusers class of the VAE."""

    @abstractmethod
    def _to_latent(self, image: Tensor) -> Tensor:
        """RGB in [-1, 1] (B, 3, H, W) -> normalised latent tokens (B, N, r)."""

    @abstractmethod
    def _from_latent(self, z: Tensor, grid: tuple[int, int]) -> Tensor:
        """Normalised latent tokens (B, N, r) -> RGB in [-1, 1], (B, 3, H, W), unclamped."""

    @abstractmethod
    def _embed(self, prompts: list[str]) -> Conditioning:
        """Conditioning of at most TEXT_BATCH distinct prompts, as the family's own pipeline makes it."""

    @staticmethod
    @abstractmethod
    def call(
        network: Any,
        tokens: Tensor,
        time: Tensor,
        cond: Conditioning,
        grid: tuple[int, int],
        references: Sequence[Reference] = (),
    ) -> Tensor:
        """One forward of the latent or the pixel transformer.

        Args:
            tokens: (B, N, C), C = r or D.
            time: (B,), the noise level in [0, 1] whatever the class itself wants.
            cond: of :meth:`text`; ``guidance`` (B,) in it goes to networks with embedded guidance.
            grid: (h, w) with h w = N.
            references: pictures to edit, as tokens of the same width. Raises UsageError if the family takes none.

        Returns v (B, N, C), an estimate of eps - x0.
        """

    @staticmethod
    @abstractmethod
    def random_conditioning(config: dict[str, Any], count: int, generator: Generator) -> Conditioning:
        """A conditioning of ``count`` rows of noise, float64, that fits a transformer of ``config``: for the proofs."""

    @abstractmethod
    def pixel_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Configuration of the stock class for pixel tokens of this base, given the latent transformer's."""

    @property
    @abstractmethod
    def patch_size(self) -> int:
        """p: pixels along the side of the patch that one latent token stands for."""

    @property
    @abstractmethod
    def latent_width(self) -> int:
        """r: numbers per latent token."""

    @property
    @abstractmethod
    def guidance(self) -> Guidance:
        """How the base is guided: by two forwards, by a number given to the network, or not at all."""

    # What families share ----------------------------------------------------------------------------------------

    @property
    def token_width(self) -> int:
        """D: numbers per pixel token."""
        return 3 * self.patch_size**2

    @cached_property
    def config(self) -> dict[str, Any]:
        """The transformer's configuration, as written in the folder."""
        return read_config(self.folder / "transformer" / "config.json")

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The VAE's configuration, as written in the folder."""
        return read_config(self.folder / "vae" / "config.json")

    @property
    def distilled(self) -> bool:
        """Whether the checkpoint was distilled to few steps, which switches guidance off."""
        index = self.folder / "model_index.json"
        return bool(index.is_file() and read_config(index).get("is_distilled"))

    def cautions(self) -> list[str]:
        """What a user of this checkpoint should know before building on it, a line each."""
        lines = []
        if self.distilled:
            lines.append(
                f"{self.folder.name} is distilled to few steps: it takes no guidance, and finetuning undoes the "
                "distillation; its undistilled base is the better start (flux2pixel bases)"
            )
        elif self.guidance == "embedded":
            lines.append(
                f"{self.folder.name} takes its guidance as a number: there is no unguided branch to push away from"
            )
        return lines

    def branches(
        self,
        network: Any,
        tokens: Tensor,
        time: Tensor,
        text: Conditioning,
        empty: Conditioning,
        scale: float,
        grid: tuple[int, int],
        references: Sequence[Reference] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """Conditional and, if guidance asks for it, unconditional v (B, N, C); both in one forward.

        Arguments as :meth:`call`, with the conditionings of the prompts and of the empty prompt. The second is None
        at scale 1, for distilled networks, and for those that take ``scale`` as a number.
        """
        if self.guidance == "embedded":
            text = text | {"guidance": torch.full_like(time, scale)}
        if self.guidance != "cfg" or scale == 1:
            return self.call(network, tokens, time, text, grid, references), None
        pictures = [(torch.cat([picture, picture]), shape) for picture, shape in references]
        both = self.call(
            network, torch.cat([tokens, tokens]), torch.cat([time, time]), stack(text, empty), grid, pictures
        )
        conditional, unconditional = both.chunk(2)
        return conditional, unconditional

    @staticmethod
    def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance on network outputs v (B, N, C), as the family's own pipeline does it."""
        return unconditional + scale * (conditional - unconditional)

    def pixel_name(self, name: str) -> str:
        """The name, in the pixel model, of a parameter or module of the latent one."""
        return name

    @staticmethod
    def shallow(config: dict[str, Any]) -> dict[str, Any]:
        """A transformer configuration with one block of each kind, to prove what does not fit in memory whole."""
        return {key: min(int(value), 1) if key in DEPTHS else value for key, value in config.items()}

    @staticmethod
    def deep_name(name: str, config: dict[str, Any]) -> str:
        """The name, in the model of ``config``, of a tensor that the model of its :meth:`shallow` calls ``name``."""
        return name

    @cached_property
    def vae(self) -> Any:
        """The stock VAE, float32."""
        return self.load("vae", self.vae_class(), torch_dtype=torch.float32).eval().requires_grad_(False)

    @cached_property
    def transformer(self) -> Any:
        """The stock latent transformer."""
        loaded = self.load("transformer", self.network_class(), torch_dtype=self.dtype)
        return loaded.eval().requires_grad_(False)

    def load(self, part: str, loader: Any, **options: Any) -> Any:
        """``loader.from_pretrained`` of a sub-folder; UsageError naming the folder if that fails."""
        quiet_libraries()
        try:
            loaded = loader.from_pretrained(self.folder / part, **options)
            return loaded.to(self.device) if isinstance(loaded, nn.Module) else loaded
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.folder}/{part}: cannot be loaded ({str(error).splitlines()[0]})") from error

    def load_encoder(self, part: str, loader: Any) -> Any:
        """A text encoder of transformers, in ``dtype``, frozen."""
        return self.load(part, loader, dtype=self.dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, rgb: Tensor) -> Tensor:
        """sRGB in [0, 1], (B, 3, H, W) -> normalised, packed latent tokens (B, N, r)."""
        return self._to_latent(rgb * 2 - 1)

    def decode(self, z: Tensor, height: int, width: int) -> Tensor:
        """Latent tokens (B, N, r) -> sRGB (B, 3, height, width), unclamped and differentiable."""
        return self._from_latent(z, (height // self.patch_size, width // self.patch_size)) / 2 + 0.5

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Conditioning:
        """Embed prompts, each distinct one once; the batch is in the order of ``prompts``, in ``dtype``."""
        distinct = list(dict.fromkeys(prompts))
        chunks = (distinct[first : first + TEXT_BATCH] for first in range(0, len(distinct), TEXT_BATCH))
        row = {prompt: index for index, prompt in enumerate(distinct)}
        return take(stack(*map(self._embed, chunks)), torch.tensor([row[prompt] for prompt in prompts]))


def refuse_references(family: str, references: Sequence[Reference]) -> None:
    """Raise UsageError if there are pictures to edit, for families that take none."""
    if references:
        raise UsageError(f"{family} takes no reference images; leave them out, or use a FLUX.2 base")


def read_config(path: Path) -> dict[str, Any]:
    """Read a ``config.json`` or ``model_index.json``. Raises UsageError naming the file if it is not JSON."""
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: missing; the folder is not a complete diffusers model") from error
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON ({error}); download it again") from error
    return config


def init_config(network: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments out of a written configuration, as the stock class ``network`` itself reads it.

    Keys that the file lacks have the class's defaults, so that a family may ask for any of them; those that the class
    does not know are dropped, with one logged line, as diffusers does.
    """
    from diffusers.utils import logging as diffusers_logging

    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # our line says it, once
    try:
        given, unknown, _ = network.extract_init_dict(dict(config))
    finally:
        diffusers_logging.set_verbosity(verbosity)
    _log_unknown(network.__name__, tuple(sorted(unknown)))
    parameters = inspect.signature(network.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return defaults | given


@cache
def _log_unknown(network: str, unknown: tuple[str, ...]) -> None:
    if unknown:
        log(f"config: {network} does not know {', '.join(unknown)}: left out, as diffusers does")


def stock_config(config: dict[str, Any]) -> dict[str, Any]:
    """The constructor's arguments out of a written configuration: without diffusers' own ``_`` entries."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
