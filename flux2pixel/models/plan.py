"""What drawing will need, before a weight is loaded: memory of a GPU and of the host.

Models are built from their configurations without weights, and one batch runs through them on fake tensors. Of a
published base no file is needed. Not in it: the context of a GPU (about 0.5 GiB), what its allocator cannot reuse, and
the judges of an evaluation, which are loaded when every model is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BatchEncoding

from flux2pixel.asymflow.codec import Codec
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.families.base import TEXT_LENGTH, Conditioning
from flux2pixel.families.configs import stock_config
from flux2pixel.families.known import KNOWN
from flux2pixel.models.base import TEXT_PROMPTS, TEXT_TOKENS, Base, open_base, published
from flux2pixel.models.folder import is_pixel_folder
from flux2pixel.models.model import Model, PixelModel, Size, model_of
from flux2pixel.models.offload import Offload, Quantize, quantised
from flux2pixel.models.sampler import of_conversion
from flux2pixel.models.text import empty_encoder, load_tokenizer
from flux2pixel.recipe import Sample
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.meter import Meter, faked, nbytes
from flux2pixel.runtime.progress import quiet_libraries

GIB = 2**30
STEPS = 3  # of a planned drawing: every further one repeats the third, whatever the solver keeps


@dataclass(frozen=True)
class Pass:
    """One thing that is done: bytes of the weights then on the device, the most that a batch adds, and host memory."""

    name: str
    weights: int
    added: int
    host: int

    @property
    def peak(self) -> int:
        """The most at any time."""
        return self.weights + self.added


def planned_base(
    name: str,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | None = None,
    offload: Offload | None = None,
    quantize: Quantize | None = None,
) -> Base:
    """A base or a model to plan with; a published one from its published configurations, whether it is here or not."""
    quiet_libraries()
    if dtype == torch.float16:
        dtype = torch.bfloat16  # of the same size, and the CPU, for which fake tensors are taken, has no other autocast
    if name not in KNOWN:
        return open_base(name, dtype, device=device or "cpu", offload=offload, quantize=quantize)
    # What is published is stored in 16 bits.
    dtype = dtype or (torch.bfloat16 if device is not None and device.type != "cpu" else torch.float32)
    return published(KNOWN[name], dtype, offload=offload, quantize=quantize)


def plan_models(
    bases: Sequence[Base], sample: Sample, *, prompts: int = TEXT_PROMPTS, batch: int, size: Size | None = None
) -> list[Pass]:
    """Encoding ``prompts``, then drawing and decoding one batch, of each model; of a base also as a pixel model.

    ``size`` is that of the images, (height, width); the model's own if it is None.
    """
    passes: dict[str, Pass] = {}
    for base in bases:
        latent = not is_pixel_folder(base.folder)
        own = model_of(base, None if latent else sample)
        models: list[Model] = [own]
        if latent:  # the model that a conversion would make of it, whose basis and scale decide no shape
            flow, sampler = AsymFlow(torch.eye(base.token_width, base.latent_width), 1.0), of_conversion(base, 1.0)
            models = [PixelModel(base, sampler.changed(sample), Codec(base.patch_size), flow=flow), own]
        found = [plan_text(base, prompts)]
        for model in models:
            found += _drawing(model, batch, size or model.size, latent)
        for one in found:
            if one.name not in passes or passes[one.name].peak < one.peak:
                passes[one.name] = one
    return list(passes.values())


def plan_text(base: Base, prompts: int, tokens: int = TEXT_TOKENS) -> Pass:
    """One forward of the text encoders, of ``prompts`` or fewer: at most ``tokens`` in all."""
    mode, parts = FakeTensorMode(allow_non_fake_inputs=True), _tokenizers(base)
    for part, encoder in base.facts.encoders.items():
        dtype = base.dtype_of(part)
        parts[part] = faked(empty_encoder(base.folder / part, encoder, dtype, base.facts[part]), mode)
    length = base.facts.text_length(parts)
    count = max(1, min(prompts, tokens // length))
    captions = [f"a photo, number {number} of {count}" for number in range(count)]
    return measured(f"text, {count} of {length} tokens", base, mode, lambda: base.text(captions), {"text_parts": parts})


def _tokenizers(base: Base) -> dict[str, Any]:
    here, kinds = base.folder.is_dir(), base.facts.tokenizers
    return {part: load_tokenizer(base.folder / part, kind) if here else Words() for part, kind in kinds.items()}


def _drawing(model: Model, batch: int, size: Size, latent: bool) -> list[Pass]:
    """Drawing one batch, and with a VAE decoding it; a network that is not offloaded stays while the VAE works."""
    base, mode = model.base, FakeTensorMode(allow_non_fake_inputs=True)
    config = base.pixel_config(base.config) if latent and isinstance(model, PixelModel) else base.config
    dtype = base.dtype_of("transformer")
    network = faked(construct(base, config, dtype).eval().requires_grad_(False), mode)
    full = nbytes(network)
    if base.quantize:
        with mode:
            network = quantised(network, base.quantize, base.unquantised)
    model = replace(model, network=network, sampler=replace(model.sampler, steps=STEPS))
    tokens = (size[0] // base.patch_size) * (size[1] // base.patch_size)
    what, levels = f"{batch} of {size[0]} x {size[1]}", model.levels(size)
    length = base.facts.text_length(_tokenizers(base))

    def draw() -> object:
        like = conditioning_like(base, config, batch, length)
        text = {key: value.to(dtype) if value.is_floating_point() else value for key, value in like.items()}
        empty = {key: value.clone() for key, value in text.items()}
        return model.tokens(text, empty, torch.randn(batch, tokens, base.token_width), size, levels)

    if isinstance(model, PixelModel):
        return [replace(measured(f"pixel model, {what}", base, mode, draw, {"transformer": network}), host=full)]
    vae = empty_vae(base, mode)
    decoding = measured(
        f"VAE decoding, {what}",
        base,
        mode,
        lambda: model._decode(torch.randn(batch, tokens, base.latent_width), size),
        {"vae": vae},
    )
    drawing = measured(f"latent base, {what}", base, mode, draw, {"transformer": network})
    kept = nbytes(network) if base.offload is None else 0
    return [
        replace(drawing, weights=drawing.weights + nbytes(vae), host=full),
        replace(decoding, weights=nbytes(vae) + kept, host=full),
    ]


def measured(name: str, base: Base, mode: FakeTensorMode, work: Callable[[], object], parts: dict[str, Any]) -> Pass:
    """Count what ``work`` holds with ``parts``, which have no weights, in the place of the base's own.

    Of what is offloaded by layers the largest is on the device, beside what a batch adds; the VAE always is, whole.
    """
    made = [part for value in parts.values() for part in (value.values() if isinstance(value, dict) else (value,))]
    made = [part for part in made if isinstance(part, nn.Module)]
    before = dict(base.__dict__)
    try:
        base.__dict__.update(parts)
        with mode, torch.no_grad():
            work()  # what a first call makes once is no part of every batch
            meter = Meter()
            for model in made:
                meter.ignore(model.parameters())
                meter.ignore(model.buffers())
            with meter:
                work()
    except torch._subclasses.fake_tensor.DataDependentOutputException as error:
        raise UsageError(f"--plan: {base.family} computes by what is in its data; it cannot be planned") from error
    finally:
        base.__dict__.clear()
        base.__dict__.update(before)
    whole = sum(map(nbytes, made))
    if base.offload in ("group", "sequential") and "vae" not in parts:
        return Pass(name, max(nbytes(m, recurse=False) for model in made for m in model.modules()), meter.peak, whole)
    return Pass(name, whole, meter.peak, whole)


def construct(base: Base, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The stock class of the transformer on the meta device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return base.network_class()(**stock_config(config))
    finally:
        torch.set_default_dtype(before)


def empty_vae(base: Base, mode: FakeTensorMode) -> Any:
    """The stock VAE on fake tensors."""
    with torch.device("meta"):
        network = nn.Module.to(base.vae_class().from_config(base.vae_config), base.vae_dtype)
    return faked(network.eval(), mode)


def conditioning_like(base: Base, config: dict[str, Any], count: int, text_tokens: int) -> Conditioning:
    """A conditioning of ``count`` prompts of ``text_tokens`` tokens, its floating-point values in 16 bits."""
    some = base.random_conditioning(config, count, torch.Generator())
    made = {}
    for name, value in some.items():
        shape = list(value.shape)
        if name in ("text", "mask"):
            shape[1] = text_tokens
        made[name] = torch.ones(shape, dtype=torch.float16 if value.is_floating_point() else value.dtype)
    return made


class Words:
    """A tokenizer of no vocabulary, of a base that is not on disk: every prompt is as long as it may be."""

    model_max_length = TEXT_LENGTH

    def apply_chat_template(self, messages: object, **options: object) -> str:
        """Any text will do."""
        return "a photo"

    def __call__(self, text: str | list[str], max_length: int = TEXT_LENGTH, **options: object) -> BatchEncoding:
        """Ids and mask, (prompts, max_length)."""
        shape = (1 if isinstance(text, str) else len(text), max_length)
        return BatchEncoding(
            {"input_ids": torch.zeros(shape, dtype=torch.long), "attention_mask": torch.ones(shape, dtype=torch.long)}
        )


def lines(title: str, passes: Sequence[Pass], processes: int = 1) -> list[str]:
    """The plan for a person."""
    rows = [f"plan: {title}, {processes} process{'es' * (processes > 1)}, one pass after the other"]
    rows += [f"memory of a process (GiB){'':<23}{'weights':>9} {'batch':>9} {'peak':>9}"]
    rows += [f"  {p.name:<46}{p.weights / GIB:>9.3f} {p.added / GIB:>9.3f} {p.peak / GIB:>9.3f}" for p in passes]
    rows += [f"  {'peak':<66}{max(p.peak for p in passes) / GIB:>9.3f}"]
    host = processes * max(p.host for p in passes)
    return [*rows, f"host memory (GiB): {host / GIB:.3f} of weights, and about 1 a process for all else"]
