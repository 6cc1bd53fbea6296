"""What is compared: models of any kind behind one call, and folders of images made elsewhere.

<folder with asymflow.json>     converted or finetuned pixel model
<base folder or alias>          latent base of a known family, started from the pixel models' own noise
<other diffusers folder>        its stock pipeline
<one of these>+<adapter>        with a LoRA on its transformer
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux2pixel.evaluate.drawing import Drawer, Key
from flux2pixel.evaluate.store import Digests, Encode, Texts
from flux2pixel.evaluate.suite import Size
from flux2pixel.families.base import Conditioning
from flux2pixel.families.configs import read_config
from flux2pixel.models import base as bases
from flux2pixel.models.folder import equals_its_base, is_pixel_folder, read_folder
from flux2pixel.models.model import Model, open_model, to_bytes
from flux2pixel.models.offload import Offload, Quantize, check
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.errors import Flux2PixelError, UsageError


@dataclass(frozen=True)
class Candidate:
    """A column of the report: a model that draws, or images made elsewhere (``open`` is then None).

    ``settings`` are all that decides its images beside weights, prompts, seed and size; they are part of the digest.
    ``encoder`` is the digest of its text encoder and ``encode`` opens that alone; a stock pipeline encodes for itself.
    """

    name: str
    path: Path
    kind: str
    digest: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    open: Callable[[], Drawer] | None = None
    encoder: str = ""
    encode: Callable[[], Encode] | None = None


@dataclass(frozen=True)
class Weights:
    """How weights are held while they draw; nothing said is bf16, float32 on the CPU, all on the device."""

    dtype: torch.dtype | None = None
    offload: Offload | None = None
    quantize: Quantize | None = None

    @property
    def settings(self) -> dict[str, str]:
        """What decides pixels, where it was asked for."""
        dtype = {"dtype": str(self.dtype).removeprefix("torch.")} if self.dtype else {}
        return dtype | ({"quantize": self.quantize} if self.quantize else {})

    def dtype_on(self, place: torch.device) -> torch.dtype:
        """Of text encoders and stock pipelines: bf16, as they were trained, and float32 where that is slow."""
        return self.dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)


def named(text: str) -> tuple[str | None, str]:
    """Split ``name=path``; a plain path has no name of its own."""
    name, equals, path = text.partition("=")
    if not equals:
        return None, text
    if not name or "/" in name or name in (".", ".."):
        raise UsageError(f"{text}: {name!r} cannot name a column; write name=path with a plain name")
    return name, path


def candidate(
    text: str,
    recipe: Recipe,
    run: Path,
    digests: Digests,
    texts: Texts,
    place: torch.device,
    matched: bool = False,
    weights: Weights = Weights(),
) -> Candidate:
    """Resolve ``[name=]model[+adapter]`` without loading weights. Raises UsageError if it is not a model.

    ``matched`` draws a latent base on the noise levels of the converted model, not as its own pipeline does.
    """
    name, path = named(text)
    word, _, adapter = path.partition("+")
    folder = Path(word) if Path(word).is_dir() else bases.resolve(word)
    lora = Path(adapter) if adapter else None
    if lora is not None and not lora.exists():
        raise UsageError(f"--model {text}: no such adapter {lora}; give a LoRA file (.safetensors) or folder")
    kind = _kind(folder, run)
    if name is None:
        name = (folder.name if kind == "pixel" else "base" if kind == "latent" else folder.name) or "model"
        name += f"+{lora.stem}" if lora else ""
    digest = digests.of_model(folder)
    if kind == "latent":  # its noise is the projection of the pixel models' by this basis
        digest = _join(digest, digests.of_file(run / "subspace.safetensors"))
    if lora is not None:
        digest = _join(digest, digests.of_model(lora) if lora.is_dir() else digests.of_file(lora))
    if weights.quantize and (kind == "stock" or lora is not None):
        raise UsageError(f"--quantize {weights.quantize}: {text} is a stock pipeline or has an adapter; leave it out")
    check(weights.offload, weights.quantize, place)
    if kind == "stock":
        stock = StockDrawer(folder, recipe, place, lora, weights)
        return Candidate(name, folder, kind, digest, stock.settings, stock.open)
    encoder = _join(_encoder(folder, digests), str(weights.dtype_on(place)))
    flow = FlowDrawer(folder, recipe, run, place, texts, encoder, lora, matched and kind == "latent", weights)
    return Candidate(name, folder, kind, digest, flow.settings, flow.open, encoder, flow.encoder)


def _kind(folder: Path, run: Path) -> str:
    if (folder / "asymflow.json").is_file():
        return "pixel"
    index = folder / "model_index.json"
    if not index.is_file():
        raise UsageError(
            f"--model {folder}: neither asymflow.json nor model_index.json in it; name a converted folder or a pipeline"
        )
    if (run / "subspace.safetensors").is_file():
        try:
            bases.open_base(folder)
        except UsageError:
            return "stock"  # a family that cannot be converted is still one that can be scored
        return "latent"
    return "stock"


def _join(*digests: str) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _encoder(folder: Path, digests: Digests) -> str:
    """Digest of the parts that turn prompts into conditionings: base, converted and finetuned model share them."""
    parts = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name.startswith(("text_encoder", "tokenizer")))
    return digests.of_model(folder, parts or ["."])


def _names(prompts: Sequence[str], keys: Sequence[Key]) -> list[str]:
    """What an error calls the images of a batch."""
    return [f"{prompt!r}, seed {seed}, sample {index}" for prompt, (seed, index) in zip(prompts, keys, strict=True)]


class FlowDrawer:
    """A pixel model, or the latent base, from seeded pixel noise; the only place in eval that opens either.

    The text encoder and the network are never in memory together: conditionings come from ``texts``.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        run: Path,
        place: torch.device,
        texts: Texts,
        encoder: str,
        lora: Path | None = None,
        matched: bool = False,
        weights: Weights = Weights(),
    ):
        self._folder, self._recipe, self._run, self._place = folder, recipe, run, place
        self._texts, self._encoder, self._lora, self._matched = texts, encoder, lora, matched
        self._weights = weights
        self._model: Any = None

    def _open(self) -> Model:
        """The model, no weights loaded yet.

        The latent base is drawn as its own pipeline draws it, whatever the recipe says of pixel models; ``matched``, on
        the grid of the run's converted model, so that what differs is the conversion alone.
        """
        pixel = is_pixel_folder(self._folder)
        subspace = self._run / "subspace.safetensors"
        model = open_model(
            self._folder,
            self._recipe.sample if pixel else None,
            subspace=subspace if not pixel and subspace.is_file() else None,
            device=self._place,
            dtype=self._weights.dtype,
            offload=self._weights.offload,
            quantize=self._weights.quantize,
        )
        if not self._matched:
            return model
        grid = read_folder(self._run / "converted").sampler
        return replace(model, sampler=replace(grid, orthogonal=False, gamut_clamp=False))

    @property
    def settings(self) -> dict[str, Any]:
        """The sampler, and where the noise is from."""
        pixel = is_pixel_folder(self._folder)
        kind = {"kind": "pixel", "equals_base": equals_its_base(self._folder)} if pixel else {"kind": "latent"}
        kind |= {"matched": self._matched, "noise": "numpy"} | self._weights.settings
        return kind | self._open().sampler.as_dict()

    def encoder(self) -> Encode:
        """Open the text encoder alone."""
        dtype = self._weights.dtype_on(self._place)
        base = bases.open_base(self._folder, dtype, device=self._place, offload=self._weights.offload)

        def encode(prompts: list[str]) -> Conditioning:
            return base.text(prompts)

        return encode

    def open(self) -> FlowDrawer:
        """Load the weights."""
        self._model = self._open()
        if self._lora is not None:
            _load_lora(self._model.transformer, self._lora)
        return self

    def close(self) -> None:
        """Let the weights go."""
        self._model = None

    def draw(self, prompts: Sequence[str], keys: Sequence[Key], size: Size) -> np.ndarray:
        text = self._texts.of(self._encoder, prompts)
        empty = self._texts.of(self._encoder, [""] * len(prompts))
        return to_bytes(self._model(text, empty, self._model.noise(keys, size), size), _names(prompts, keys))


class StockDrawer:
    """Any text-to-image pipeline of diffusers, called as its own documentation does, one prompt at a time.

    The prompt's samples are drawn together, so that its text is encoded once for all of them.
    """

    def __init__(self, folder: Path, recipe: Recipe, place: torch.device, lora: Path | None, weights: Weights):
        self._folder, self._place, self._lora, self._weights = folder, place, lora, weights
        said = {"num_inference_steps": recipe.sample.steps, "guidance_scale": recipe.sample.guidance}
        self._said = {name: value for name, value in said.items() if value is not None}
        self._own = _call_defaults(folder)
        self._pipeline: Any = None
        self._options: dict[str, Any] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What the pipeline is told; the rest is its own."""
        told = self._own | self._said
        steps, guidance = told.get("num_inference_steps"), told.get("guidance_scale")
        own = {"kind": "stock", "noise": "torch", "steps": steps, "guidance": guidance}
        return own | self._weights.settings

    def open(self) -> StockDrawer:
        """Load the pipeline."""
        from diffusers import DiffusionPipeline

        from flux2pixel.runtime.progress import quiet_libraries

        quiet_libraries()
        try:
            pipeline = DiffusionPipeline.from_pretrained(self._folder, dtype=self._weights.dtype_on(self._place))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise Flux2PixelError(f"{self._folder}: cannot be loaded as a pipeline ({reason})") from error
        pipeline.set_progress_bar_config(disable=True)
        if self._lora is not None:
            pipeline.load_lora_weights(self._lora)
        match self._weights.offload:
            case "model":
                pipeline.enable_model_cpu_offload(device=self._place)
            case "group":
                pipeline.enable_group_offload(self._place, offload_type="leaf_level")
            case "sequential":
                pipeline.enable_sequential_cpu_offload(device=self._place)
            case None:
                pipeline.to(self._place)
        self._pipeline = pipeline
        # A text encoder may take fewer tokens than the 512 that pipelines ask for unless told.
        limit = getattr(getattr(pipeline, "tokenizer", None), "model_max_length", 512)
        if limit < 512 and "Flux2" in type(pipeline).__name__:
            self._options = {"max_sequence_length": int(limit)}
        return self

    def close(self) -> None:
        """Let the pipeline go."""
        self._pipeline = None

    def draw(self, prompts: Sequence[str], keys: Sequence[Key], size: Size) -> np.ndarray:
        drawn: list[np.ndarray] = []
        first = 0
        while first < len(prompts):
            last = first
            while last < len(prompts) and prompts[last] == prompts[first]:
                last += 1
            made = self._pipeline(
                prompt=prompts[first],
                height=size[0],
                width=size[1],
                num_images_per_prompt=last - first,
                generator=[torch.Generator().manual_seed(_seed(key)) for key in keys[first:last]],
                output_type="np",
                **self._said,
                **self._options,
            ).images
            pixels = torch.from_numpy(made).permute(0, 3, 1, 2)
            drawn.append(to_bytes(pixels, _names(prompts[first:last], keys[first:last])))
            first = last
        return np.concatenate(drawn)


def _call_defaults(folder: Path) -> dict[str, Any]:
    """What a stock pipeline takes where it is told nothing; empty for one that is not of diffusers itself."""
    import diffusers

    name = read_config(folder / "model_index.json").get("_class_name")
    pipeline = getattr(diffusers, name, None) if isinstance(name, str) else None
    parameters = inspect.signature(pipeline.__call__).parameters if pipeline else {}
    wanted = ("num_inference_steps", "guidance_scale")
    return {key: parameters[key].default for key in wanted if key in parameters}


def _seed(key: Key) -> int:
    """A 63-bit seed for torch that no other key shares in practice."""
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8], "big") >> 1


def _load_lora(transformer: Any, lora: Path) -> None:
    """Put a LoRA of diffusers or peft names on a transformer; a LoRA that matches nothing is refused."""
    from flux2pixel.runtime import files

    weights = lora
    if lora.is_dir():
        found = sorted(lora.glob("*.safetensors"))
        if len(found) != 1:
            raise UsageError(f"{lora}: holds {len(found)} .safetensors files, a LoRA is one; name it")
        weights = found[0]
    state, _ = files.read_tensors(weights)
    prefix = next((p for p in ("transformer", "base_model.model") if all(k.startswith(f"{p}.") for k in state)), None)
    modules = {name for name, _ in transformer.named_modules()}
    stems = {k.removeprefix(f"{prefix}." if prefix else "").split(".lora_")[0] for k in state if ".lora_" in k}
    if not stems or not stems <= modules:
        strange = sorted(stems - modules)[:1] or ["no lora_A or lora_B tensors"]
        raise UsageError(f"{weights}: is not a LoRA of this transformer ({strange[0]})")
    transformer.load_lora_adapter(state, prefix=prefix)
