"""What can be scored: models of any kind behind one call, and folders of images made elsewhere.

<folder with asymflow.json>     converted or finetuned pixel model
<base folder or alias>          latent base of a known family, started from the pixel models' own noise
<other diffusers folder>        its stock pipeline
<one of these>+<adapter>        with a LoRA on its transformer
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flux2pixel.evaluate.digests import Digests
from flux2pixel.evaluate.drawing import Drawer, Key, Size
from flux2pixel.evaluate.texts import Texts
from flux2pixel.models import base as bases
from flux2pixel.models.folder import equals_its_base, is_pixel_folder
from flux2pixel.recipe import Recipe, as_dict
from flux2pixel.runtime import device
from flux2pixel.runtime.errors import Flux2PixelError, UsageError, first_line


@dataclass(frozen=True)
class Candidate:
    """A column of the report: a model that draws, or images made elsewhere (``open`` is then None).

    ``settings`` are all that decides its images beside weights, prompts, seed and size; they are part of the digest.
    """

    name: str
    path: Path
    kind: str
    digest: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    open: Callable[[], Drawer] | None = None


def named(text: str) -> tuple[str | None, str]:
    """Split ``name=path``; a plain path has no name of its own."""
    name, equals, path = text.partition("=")
    if not equals:
        return None, text
    if not name or "/" in name or name in (".", ".."):
        raise UsageError(f"{text}: {name!r} cannot name a column; write name=path with a plain name")
    return name, path


def candidate(text: str, recipe: Recipe, run: Path, digests: Digests, texts: Texts) -> Candidate:
    """Resolve ``[name=]model[+adapter]`` without loading weights. Raises UsageError if it is not a model."""
    name, path = named(text)
    place, _, adapter = path.partition("+")
    folder = Path(place) if Path(place).is_dir() else bases.resolve(place)
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
    settings = {"kind": kind, "sample": as_dict(recipe)["sample"], "noise": "numpy" if kind != "stock" else "torch"}
    if kind == "pixel":
        settings["matched"] = equals_its_base(folder)

    def load() -> Drawer:
        if kind == "stock":
            return StockDrawer(folder, recipe, lora)
        return FlowDrawer(folder, recipe, run, texts, _encoder(folder, digests), lora)

    return Candidate(name, folder, kind, digest, settings, load)


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


class FlowDrawer:
    """A pixel model, or the latent base of the run, from seeded pixel noise; every distinct prompt is encoded once."""

    def __init__(self, folder: Path, recipe: Recipe, run: Path, texts: Texts, encoder: str, lora: Path | None):
        from flux2pixel.models.model import open_model

        self._model = open_model(
            folder,
            recipe.sample if is_pixel_folder(folder) else None,
            subspace=run / "subspace.safetensors",
            device=device.choose(),
        )
        self._texts, self._encoder = texts, encoder
        self._patch = self._model.codec.patch
        if lora is not None:
            _load_lora(self._model.transformer, lora)

    def draw(self, prompts: Sequence[str], keys: Sequence[Key], size: Size) -> np.ndarray:
        from flux2pixel.models.model import seeded_noise, to_bytes

        width, height = size
        patch = self._patch
        if width % patch or height % patch:
            raise UsageError(
                f"{width}x{height} is not a multiple of the model's patch of {patch} pixels; set eval.size"
            )
        text = self._texts.of(self._encoder, self._model.text, prompts)
        empty = self._texts.of(self._encoder, self._model.text, [""] * len(prompts))
        noise = seeded_noise(list(keys), (height // patch) * (width // patch), 3 * patch * patch)
        return to_bytes(self._model(text, empty, noise, (height, width)))


class StockDrawer:
    """Any text-to-image pipeline of diffusers, called as its own documentation does, one prompt at a time.

    The prompt's samples are drawn together, so that its text is encoded once for all of them.
    """

    def __init__(self, folder: Path, recipe: Recipe, lora: Path | None):
        import torch
        from diffusers import DiffusionPipeline

        from flux2pixel.runtime.progress import quiet_libraries

        quiet_libraries()
        place = device.choose()
        kind = torch.float32 if place.type == "cpu" else torch.bfloat16
        try:
            self._pipeline = DiffusionPipeline.from_pretrained(folder, dtype=kind)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise Flux2PixelError(f"{folder}: cannot be loaded as a pipeline ({first_line(error)})") from error
        self._pipeline.set_progress_bar_config(disable=True)
        self._pipeline.to(place)
        if lora is not None:
            self._pipeline.load_lora_weights(lora)
        self._sample = recipe.sample
        # The miniature's text encoder takes 12 tokens; pipelines ask for 512 unless told.
        limit = getattr(getattr(self._pipeline, "tokenizer", None), "model_max_length", 512)
        self._options = (
            {"max_sequence_length": int(limit)} if limit < 512 and "Flux2" in type(self._pipeline).__name__ else {}
        )

    def draw(self, prompts: Sequence[str], keys: Sequence[Key], size: Size) -> np.ndarray:
        import torch

        drawn: list[np.ndarray] = []
        first = 0
        while first < len(prompts):
            last = first
            while last < len(prompts) and prompts[last] == prompts[first]:
                last += 1
            made = self._pipeline(
                prompt=prompts[first],
                width=size[0],
                height=size[1],
                num_inference_steps=self._sample.steps,
                guidance_scale=self._sample.guidance,
                num_images_per_prompt=last - first,
                generator=[torch.Generator().manual_seed(_seed(key)) for key in keys[first:last]],
                output_type="np",
                **self._options,
            ).images
            drawn.append((np.clip(made, 0, 1) * 255).round().astype(np.uint8))
            first = last
        return np.concatenate(drawn)


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
