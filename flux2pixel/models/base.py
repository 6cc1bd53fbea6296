"""A base checkpoint on disk: its configurations read at once, its parts when first used, freed when done with."""

from __future__ import annotations

import difflib
import gc
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux2pixel.families import family_of, registry
from flux2pixel.families.base import Conditioning, Family, Guidance, Projections, stack, take
from flux2pixel.families.configs import read_config
from flux2pixel.families.known import KNOWN, Known, base_names
from flux2pixel.models import text
from flux2pixel.models.hub import INDEXES, PARTS, download
from flux2pixel.models.offload import Offload, Quantize, offloaded, quantised, rest
from flux2pixel.runtime.device import default_dtype
from flux2pixel.runtime.errors import UsageError, first_line
from flux2pixel.runtime.progress import quiet_libraries
from flux2pixel.weights.checkpoint import DTYPES
from flux2pixel.weights.header import read_header

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
TEXT_PROMPTS = 64  # at most in one forward of the text encoders, however short they are
TEXT_TOKENS = 16 * 512  # at most in one forward: what 16 full prompts of most families have


def resolve(base: str, parts: Sequence[str] = PARTS, *, offline: bool = False) -> Path:
    """Turn an alias, a folder or a Hub id, ``name@revision`` too, into a folder, downloading what lacks of ``parts``.

    ``offline`` takes what is in the Hub's cache and asks nobody.
    Raises UsageError if there is no such base, or it cannot be had, or cannot be converted.
    """
    plugin = registry.plugin(base)
    folder = plugin.folder if plugin else Path(base)
    if (folder / "transformer" / "config.json").is_file():
        return folder
    alias, _, revision = base.partition("@")
    known = KNOWN.get(alias)
    if known and known.refused:
        raise UsageError(f"base: {base!r} cannot be converted: {known.refused}; use {known.undistilled}")
    if known or (_HUB_ID.fullmatch(base) and not folder.exists()):
        return download(known.hub if known else alias, parts, revision or None, offline=offline)
    if folder.is_dir():
        raise UsageError(f"base: {base!r} has no transformer/config.json: it is not a diffusers folder")
    near = difflib.get_close_matches(base, base_names(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(base_names())}"
    raise UsageError(f"base: {base!r} is neither an alias nor a folder; {hint}")


def open_base(
    name: str | Path,
    dtype: torch.dtype | None = None,
    parts: Sequence[str] = PARTS,
    *,
    device: torch.device | str = "cpu",
    vae_dtype: torch.dtype = torch.float32,
    offload: Offload | None = None,
    quantize: Quantize | None = None,
    offline: bool = False,
) -> Base:
    """Open a base, or a model converted from one, by alias, folder or Hub id; nothing heavy is loaded yet.

    The family is told from the class name in ``transformer/config.json``. ``parts`` are those whose weights will be
    asked for; ``offline`` asks no Hub for them. The other arguments are :class:`Base`'s. Raises UsageError if there is
    no such base, its family is unknown, or a configuration cannot be read.
    """
    folder = Path(name)
    if not (folder / "asymflow.json").is_file():
        folder = resolve(str(name), parts, offline=offline)
    facts = read_family(folder)
    return Base(folder, facts, dtype, device=device, vae_dtype=vae_dtype, offload=offload, quantize=quantize)


def published(
    known: Known, dtype: torch.dtype | None = None, *, offload: Offload | None = None, quantize: Quantize | None = None
) -> Base:
    """A base of which nothing is on disk, from its published configurations: for plans."""
    family = family_of(known.transformer_class)
    assert family is not None, known.transformer_class
    return Base(Path(known.hub), family(known.configs, known.hub), dtype, offload=offload, quantize=quantize)


def read_family(folder: Path) -> Family:
    """The facts of a folder's checkpoint, from the configuration files that are there."""
    config = folder / "transformer" / "config.json"
    configs: dict[str, Mapping[str, Any]] = {"transformer": read_config(config)}
    for index in INDEXES:
        if (folder / index).is_file():
            configs["model_index"] = read_config(folder / index)
            break
    for path in (*folder.glob("*/config.json"), *folder.glob("*/scheduler_config.json")):
        configs.setdefault(path.parent.name, read_config(path))
    name = configs["transformer"].get("_class_name")
    family = family_of(name)
    if family is None:
        raise UsageError(f"{config}: _class_name {name!r} is of no family that can be converted")
    return family(configs, str(folder))


def _fact(name: str) -> Any:
    return property(lambda self: getattr(self.facts, name), doc=f"The family's :attr:`Family.{name}`.")


class Base:
    """A latent flow model in a diffusers folder: the facts of its family, and its parts, frozen and in eval mode.

    Args:
        folder: holds ``transformer/``, and what of ``vae/``, ``text_encoder*/``, ``tokenizer*/`` is asked for.
        facts: of its family.
        dtype: of transformer and text encoders. By default that of the stored file; on the CPU, which is slow at
            halves, float32. A caller that needs float32 everywhere, as a proof does, says so.
        device: where the parts go when they are loaded.
        vae_dtype: of the VAE, float32 or bfloat16.
        offload: how transformer and text encoders wait on the CPU for their turn on ``device``.
        quantize: the transformer's weights in 8 bits, all but the layers that a conversion folds.
    """

    patch_size: int = _fact("patch_size")
    latent_width: int = _fact("latent_width")
    token_width: int = _fact("token_width")
    family: str = _fact("name")
    color_space: str = _fact("color_space")
    projections: Projections = _fact("projections")
    lora_targets: tuple[str, ...] = _fact("lora_targets")
    guidance: Guidance = _fact("guidance")
    distilled: bool = _fact("distilled")
    config: dict[str, Any] = _fact("config")
    vae_config: dict[str, Any] = _fact("vae_config")

    def __init__(
        self,
        folder: Path,
        facts: Family,
        dtype: torch.dtype | None = None,
        *,
        device: torch.device | str = "cpu",
        vae_dtype: torch.dtype = torch.float32,
        offload: Offload | None = None,
        quantize: Quantize | None = None,
    ):
        self.folder, self.facts, self.device = folder, facts, torch.device(device)
        self.vae_dtype, self.offload, self.quantize = vae_dtype, offload, quantize
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else None)
        self.network_class, self.vae_class = facts.network_class, facts.vae_class
        self.call, self.branches, self.guide = facts.call, facts.branches, facts.guide
        self.pixel_config, self.pixel_name = facts.pixel_config, facts.pixel_name
        self.shallow, self.deep_name = facts.shallow, facts.deep_name
        self.random_conditioning, self.cautions = facts.random_conditioning, facts.cautions

    @cached_property
    def vae(self) -> Any:
        """The stock VAE."""
        return self.load("vae", self.vae_class(), torch_dtype=self.vae_dtype).eval().requires_grad_(False)

    @cached_property
    def transformer(self) -> Any:
        """The stock latent transformer."""
        dtype = self.dtype_of("transformer")
        loaded = self.load("transformer", self.network_class(), place=False, torch_dtype=dtype)
        loaded = loaded.eval().requires_grad_(False)
        if self.quantize:
            where = self.device if self.offload is None else None
            loaded = quantised(loaded, self.quantize, self.unquantised, where)
        return offloaded(loaded, self.offload, self.device)

    def dtype_of(self, part: str) -> torch.dtype:
        """The dtype that a part's weights are loaded in: the one given, or what the device makes of the stored one."""
        return self.dtype or default_dtype(self.device, stored_dtype(self.folder / part))

    @property
    def unquantised(self) -> set[str]:
        """Layers, latent and pixel, whose weights are never quantised: a fold is exact in them, and they are small."""
        names = (*self.projections.inputs, self.projections.output, self.projections.modulation)
        return {*names, *map(self.pixel_name, names)}

    @cached_property
    def text_parts(self) -> dict[str, Any]:
        """Text encoders, without vocabulary heads and unread layers, and tokenizers, by sub-folder."""
        quiet_libraries()
        parts: dict[str, Any] = {}
        for part, kind in self.facts.tokenizers.items():
            parts[part] = text.load_tokenizer(self.folder / part, kind)
        for part, encoder in self.facts.encoders.items():
            loaded = text.load_encoder(self.folder / part, encoder, self.dtype_of(part))
            parts[part] = offloaded(loaded, self.offload, self.device)
        return parts

    def free(self, part: str) -> None:
        """Give back the memory of ``vae``, ``transformer`` or ``text``; it is loaded again if used again."""
        self.__dict__.pop("text_parts" if part == "text" else part, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def load(self, part: str, loader: Any, *, place: bool = True, **options: Any) -> Any:
        """``loader.from_pretrained`` of a diffusers sub-folder, on the device if ``place``.

        Raises UsageError naming the folder if that fails, or tensors are missing, which would be random.
        """
        quiet_libraries()
        try:
            loaded, report = loader.from_pretrained(self.folder / part, output_loading_info=True, **options)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise UsageError(f"{self.folder}/{part}: cannot be loaded ({first_line(error)})") from error
        text.refuse_missing(self.folder / part, report["missing_keys"])
        return loaded.to(self.device) if place and isinstance(loaded, nn.Module) else loaded

    @torch.no_grad()
    def encode(self, rgb: Tensor) -> Tensor:
        """sRGB in [0, 1], (B, 3, H, W) -> normalised, packed latent tokens (B, N, r)."""
        return self.facts.to_latent(self.vae, (rgb * 2 - 1).to(self.vae.dtype))

    def decode(self, z: Tensor, height: int, width: int) -> Tensor:
        """Latent tokens (B, N, r) -> sRGB (B, 3, height, width), unclamped and differentiable."""
        grid = (height // self.patch_size, width // self.patch_size)
        return self.facts.from_latent(self.vae, z.to(self.vae.dtype), grid) / 2 + 0.5

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Conditioning:
        """Embed prompts, each distinct one once, few enough at a time for a budget of tokens; in their order."""
        parts, distinct = self.text_parts, list(dict.fromkeys(prompts))
        count = max(1, min(TEXT_PROMPTS, TEXT_TOKENS // self.facts.text_length(parts)))
        chunks = (distinct[first : first + count] for first in range(0, len(distinct), count))
        row = {prompt: index for index, prompt in enumerate(distinct)}
        rows = stack(*(self.facts.embed(parts, chunk) for chunk in chunks))
        rest(parts.values())
        return take(rows, torch.tensor([row[prompt] for prompt in prompts]))

    def time_grid(self, steps: int, height: int, width: int) -> Tensor:
        """The base's own noise levels for an image of this size, (steps + 1,), by its own scheduler."""
        tokens = (height // self.patch_size) * (width // self.patch_size)
        return self.facts.time_grid(self.scheduler, steps, tokens)

    @cached_property
    def scheduler(self) -> Any:
        """The stock scheduler of ``scheduler/``."""
        import diffusers

        config = dict(self.facts["scheduler"])
        kind = getattr(diffusers, str(config.get("_class_name", "FlowMatchEulerDiscreteScheduler")), None)
        if kind is None:
            raise UsageError(f"{self.folder}/scheduler: _class_name {config['_class_name']!r} is no scheduler")
        return kind.from_config(config)


def stored_dtype(folder: Path) -> torch.dtype:
    """The floating-point dtype that most bytes of a part's weights are stored in; float32 where there is none."""
    held: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header = read_header(path)
        for name, (dtype, _) in header.tensors.items():
            first, last = header.spans[name]
            held[dtype] = held.get(dtype, 0) + last - first
    stored = DTYPES.get(max(held, key=lambda name: held[name]), torch.float32) if held else torch.float32
    return stored if stored.is_floating_point else torch.float32
