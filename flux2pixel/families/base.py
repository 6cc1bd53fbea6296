"""What every family of bases offers: the facts that the verbs are written against, and nothing on disk.

    B  images    h, w  token grid (H / p, W / p)    N = h w    r  latent token width    D  pixel token width (3 p p)

Tokens run row by row and are channel-first, (c, ph, pw), latent and pixel alike, in every family; what order a
transformer's own projections want is the family's business, here and in the fold.

A :class:`Family` is made from the configurations of a checkpoint's parts, as published; a checkpoint on disk, with its
weights, is :class:`flux2pixel.models.base.Base`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from flux2pixel.asymflow.denoiser import plain
from flux2pixel.families.configs import init_config
from flux2pixel.runtime.errors import UsageError

Conditioning = dict[str, Tensor]  # what a transformer is told beside tokens and time; the batch leads every value
Reference = tuple[Tensor, tuple[int, int]]  # tokens (B, M, C) of a picture to edit, and their (h, w) grid
Order = Literal["c,ph,pw", "ph,pw,c"]
Guidance = Literal["cfg", "embedded", "none"]
DEPTHS = ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers")
TEXT_LENGTH = 512  # tokens that most families pad a prompt to


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


@dataclass(frozen=True)
class Encoder:
    """A text encoder as a family reads it: a class of transformers without a vocabulary head, and what is read of it.

    ``states`` are the hidden states that the conditioning is made of, numbered as transformers does (0 is the
    embedding, -1 the last, normed one); layers behind the deepest are not loaded. Empty: the model is used whole.
    """

    model: str
    states: tuple[int, ...] = ()


class Family(ABC):
    """The facts of one checkpoint of a family, from its configurations.

    Args:
        configs: of the parts by name, as in their ``config.json``: ``transformer``, ``vae``, ``model_index``,
            ``scheduler``, ``text_encoder``, ...; absent ones are asked for only when needed.
        where: the folder or Hub id they are from, for messages.
    """

    name: ClassVar[str]
    color_space: ClassVar[str] = "oklab-normalised"
    projections: ClassVar[Projections]
    lora_targets: ClassVar[tuple[str, ...]]
    """Regular expressions; a Linear whose full name matches one is finetuned by LoRA (all others are left alone)."""

    def __init__(self, configs: Mapping[str, Mapping[str, Any]], where: str = ""):
        self.configs, self.where = configs, where or type(self).name

    # What a family must say -------------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def network_class() -> Any:
        """The stock diffusers class of the transformer, latent and pixel."""

    @staticmethod
    @abstractmethod
    def vae_class() -> Any:
        """The stock diffusers class of the VAE."""

    @staticmethod
    @abstractmethod
    def to_latent(vae: Any, image: Tensor) -> Tensor:
        """RGB in [-1, 1] (B, 3, H, W) -> normalised latent tokens (B, N, r), by the stock ``vae``."""

    @staticmethod
    @abstractmethod
    def from_latent(vae: Any, z: Tensor, grid: tuple[int, int]) -> Tensor:
        """Normalised latent tokens (B, N, r) -> RGB in [-1, 1], (B, 3, H, W), unclamped, by the stock ``vae``."""

    @property
    @abstractmethod
    def encoders(self) -> dict[str, Encoder]:
        """The text encoders by sub-folder."""

    @property
    @abstractmethod
    def tokenizers(self) -> dict[str, str]:
        """Sub-folders of the tokenizers and the class of transformers that reads each."""

    @abstractmethod
    def embed(self, parts: Mapping[str, Any], prompts: list[str]) -> Conditioning:
        """Conditioning of distinct prompts, as the family's own pipeline makes it.

        ``parts`` are the loaded :attr:`encoders` and :attr:`tokenizers` by name.
        """

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
            cond: of :meth:`embed`; ``guidance`` (B,) in it goes to networks with embedded guidance.
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

    @staticmethod
    def mu(scheduler: Any, steps: int, tokens: int) -> float | None:
        """The shift exponent that the family's pipeline gives its scheduler for this many steps and tokens."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config = scheduler.config
        return float(
            calculate_shift(
                tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
            )
        )

    # What families share ----------------------------------------------------------------------------------------

    def __getitem__(self, part: str) -> Mapping[str, Any]:
        """The configuration of a part as written. Raises UsageError naming the file if the checkpoint has none."""
        if part not in self.configs:
            name = "scheduler_config.json" if part == "scheduler" else "config.json"
            raise UsageError(f"{self.where}/{part}/{name}: missing; the folder is not a complete diffusers model")
        return self.configs[part]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The transformer's constructor arguments: as written, defaults filled in, unknown keys left out.

        Raises UsageError naming the key if a value cannot be.
        """
        return init_config(self.network_class(), self["transformer"], f"{self.where}/transformer/config.json")

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The VAE's constructor arguments, likewise."""
        return init_config(self.vae_class(), self["vae"], f"{self.where}/vae/config.json")

    @property
    def token_width(self) -> int:
        """D: numbers per pixel token."""
        return 3 * self.patch_size**2

    @property
    def distilled(self) -> bool:
        """Whether the checkpoint was distilled to few steps, which switches guidance off."""
        return bool(self.configs.get("model_index", {}).get("is_distilled"))

    def cautions(self) -> list[str]:
        """What a user of this checkpoint should know before building on it, a line each."""
        name, lines = self.where.rsplit("/", 1)[-1], []
        if self.distilled:
            lines.append(
                f"{name} is distilled to few steps: it takes no guidance, and finetuning undoes the "
                "distillation; its undistilled base is the better start (flux2pixel bases)"
            )
        elif self.guidance == "embedded":
            lines.append(f"{name} takes its guidance as a number: there is no unguided branch to push away from")
        return lines

    def text_length(self, parts: Mapping[str, Any]) -> int:
        """Tokens that a prompt is at most padded to."""
        return TEXT_LENGTH

    def time_grid(self, scheduler: Any, steps: int, tokens: int) -> Tensor:
        """The latent base's own noise levels, as its own pipeline makes them: (steps + 1,), from 1 or so down to 0.

        Args:
            scheduler: the base's diffusers scheduler; it is not changed.
            steps: of sampling.
            tokens: N of the image, on which a dynamic shift depends.
        """
        own = type(scheduler).from_config(scheduler.config)
        given: dict[str, Any] = {"mu": self.mu(own, steps, tokens)} if own.config.get("use_dynamic_shifting") else {}
        sigmas = self.start_levels(steps)
        own.set_timesteps(**({"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}), **given)
        levels: Tensor = own.sigmas
        return levels

    @staticmethod
    def start_levels(steps: int) -> list[float] | None:
        """The levels that the family's pipeline hands its scheduler before any shift; None: the scheduler's own."""
        return np.linspace(1.0, 1 / steps, steps).tolist()

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

    # Guidance on network outputs v (B, N, C), as the family's pipeline does it.
    guide = staticmethod(plain)

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


def refuse_references(family: str, references: Sequence[Reference]) -> None:
    """Raise UsageError if there are pictures to edit, for families that take none."""
    if references:
        raise UsageError(f"{family} takes no reference images; leave them out, or use a FLUX.2 base")


def device_of(module: Any) -> torch.device:
    """Where the inputs of a model belong: its own device, or that of its turn if it waits elsewhere."""
    from diffusers.utils.torch_utils import get_module_execution_device

    device: torch.device = get_module_execution_device(module)
    return device
