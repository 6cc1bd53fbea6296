"""A pixel model in other programs' formats: the released adapter, a LoRA, or one file under the original names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux2pixel.families.configs import read_config
from flux2pixel.models import base as bases
from flux2pixel.models.base import Base
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.progress import bar, log
from flux2pixel.runtime.version import __version__
from flux2pixel.weights import bfl
from flux2pixel.weights.adapter import BASIS, SCALE, Adapter, read_adapter
from flux2pixel.weights.checkpoint import DTYPES, Checkpoint, Stored, check_names, open_checkpoint
from flux2pixel.weights.write import Output, write_file

FORMATS = ("adapter", "lora", "bfl")
RELEASED_CLASS = "AsymFlux2Transformer2DModel"
SPARE = 8  # columns that the randomised decomposition takes beside those that are kept


def export(model: Path, out: Path, kind: str, against: Path | None = None, rank: int = 256) -> Path:
    """Write ``model`` to the file ``out`` in one of FORMATS.

    ``adapter``: what a finetune changed in its converted model, in the released format; its LoRA as trained where the
    folder has it, else of ``rank``, extracted. ``lora``: every changed matrix, of ``rank``, for ``load_lora_weights``.
    Both compare with ``against``, the converted model; the one it was trained from if not given. ``bfl``: all of it
    under the original names. Raises UsageError or Flux2PixelError naming what does not fit the format.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: must end in .safetensors")
    if not (model / "asymflow.json").is_file():
        raise UsageError(f"--model {model}: no asymflow.json in it; name a converted or finetuned folder")
    base = bases.open_base(model)
    if base.family != "flux2":
        raise UsageError(f"--model {model}: a {base.family} model; these formats are FLUX.2's")
    checkpoint = open_checkpoint(model / "transformer")
    notes = {"format": "pt", "made_by": f"flux2pixel {__version__}"} | _recipe(checkpoint)
    if kind == "bfl":
        outputs = [Output(n, s.dtype, s.shape, s) for n, s in bfl.to_bfl(checkpoint.tensors).items()]
        outputs += [of_tensor(name, tensor) for name, tensor in _buffers(model, torch.float32).items()]
        _write(out, outputs, notes | bfl.MARKER)
        log("note: ComfyUI's stock FLUX.2 loader will not take this file: a pixel model needs AsymFlow's recovery")
        return out
    reference = open_checkpoint(_reference(model, against) / "transformer")
    changed = _changed(checkpoint, reference)
    if not changed:
        raise Flux2PixelError(f"{model}: equals {_reference(model, against)}; there is nothing to export")
    if kind == "lora":
        tensors = _lora(checkpoint, reference, changed, rank)
        _write(out, [of_tensor(f"transformer.{name}", tensor) for name, tensor in tensors.items()], notes)
        return out
    _write(out, list(_released(model, base, checkpoint, reference, changed, rank)), notes)
    files.write_json(out.parent / "config.json", released_config(base, model))
    return out


def of_tensor(name: str, tensor: Tensor) -> Output:
    """A tensor in memory as something to write."""
    dtype = next(key for key, value in DTYPES.items() if value == tensor.dtype)
    flat = tensor.reshape(1) if tensor.ndim == 0 else tensor
    shape = tuple(tensor.shape)
    return Output(name, dtype, shape, Stored(dtype, shape, ()), lambda first, last: flat[first:last])


def released_config(base: Base, model: Path) -> dict[str, Any]:
    """The ``config.json`` beside a released adapter."""
    use, config = read_config(model / "asymflow.json"), base.config
    kept: tuple[str, ...] = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim")
    kept += ("joint_attention_dim",)
    kept += ("guidance_embeds", "axes_dims_rope", "rope_theta", "mlp_ratio", "timestep_guidance_channels", "eps")
    described = {"_class_name": RELEASED_CLASS, "in_channels": 3, "patch_size": use["patch_size"]}
    described |= {"base_rank": _buffers(model, torch.float32)[BASIS].shape[1], "num_timesteps": 1}
    return described | {key: config[key] for key in kept if key in config} | {"sigma_min": use["sigma_min"]}


def lora_layer(name: str, base: Base) -> bool:
    """Whether the released format stores the weight ``name`` as LoRA."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and any(re.fullmatch(pattern, module) for pattern in base.lora_targets)


def extract(change: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A and B of the best ``B A`` of ``rank``, float32, and the share of the change's norm that it misses."""
    rank = min(rank, *change.shape)
    u, s, v = torch.svd_lowrank(change, q=min(rank + SPARE, *change.shape), niter=4)
    root = s[:rank].sqrt()
    a, b = (v[:, :rank] * root).mT.contiguous(), (u[:, :rank] * root).contiguous()
    return a, b, float((change - b @ a).norm() / change.norm().clamp(min=1e-30))


def _released(
    model: Path, base: Base, checkpoint: Checkpoint, reference: Checkpoint, changed: list[str], rank: int
) -> Iterable[Output]:
    """The tensors of the released format, fp16 with bf16 buffers; LoRA's own scale is multiplied into B."""
    projections = (*base.projections.inputs, base.projections.output, base.projections.modulation)
    full = [f"{name}.weight" for name in projections]
    layers = [name for name in checkpoint.tensors if lora_layer(name, base)]
    if foreign := [name for name in changed if name not in full and name not in layers]:
        raise Flux2PixelError(
            f"{model}: the adapter format has no place for {', '.join(foreign[:5])}{', ...' if foreign[5:] else ''}, "
            "which changed too; export as lora or bfl"
        )
    for name in full:
        yield of_tensor(name, checkpoint.tensors[name].read().to(torch.float16))
    for name, tensor in _buffers(model, torch.bfloat16).items():
        yield of_tensor(name, tensor)
    own = model / "adapter.safetensors"
    trained = read_adapter(own) if own.is_file() else None
    for name, tensor in _pairs(trained, checkpoint, reference, layers, rank).items():
        yield of_tensor(name, tensor.to(torch.float16))


def _pairs(
    trained: Adapter | None, checkpoint: Checkpoint, reference: Checkpoint, names: list[str], rank: int
) -> dict[str, Tensor]:
    """LoRA tensors of ``names``: as they were trained, or extracted from the difference of the weights."""
    if trained is None:
        return _lora(checkpoint, reference, names, rank)
    found: dict[str, Tensor] = {}
    for name in names:
        if name in trained.pairs:
            pair, module = trained.pairs[name], name.removesuffix(".weight")
            found |= {f"{module}.lora_A.weight": pair.a(), f"{module}.lora_B.weight": pair.b() * pair.scale}
    return found


def _lora(checkpoint: Checkpoint, reference: Checkpoint, names: list[str], rank: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    worst = 0.0
    with bar("extract", len(names), unit="layers") as progress:
        for name in names:
            new, old = checkpoint.tensors[name], reference.tensors[name]
            if len(new.shape) != 2:
                raise Flux2PixelError(f"{name}: changed, and no matrix, so no LoRA can hold it; export as bfl")
            a, b, missed = extract(new.read().float() - old.read().float(), rank)
            found |= {f"{name.removesuffix('.weight')}.lora_A.weight": a}
            found |= {f"{name.removesuffix('.weight')}.lora_B.weight": b}
            worst = max(worst, missed)
            progress.advance(1, note=name)
    log(f"extract: rank {rank} misses at most {worst:.1%} of a layer's change")
    return found


def _changed(checkpoint: Checkpoint, reference: Checkpoint) -> list[str]:
    """Names of the tensors that differ. Raises Flux2PixelError if the two are not of one architecture."""
    check_names(checkpoint.files[0].parent, checkpoint, {n: stored.shape for n, stored in reference.tensors.items()})
    changed = []
    with bar("compare", len(checkpoint.tensors), unit="tensors") as progress:
        for name, stored in checkpoint.tensors.items():
            if not torch.equal(stored.read(), reference.tensors[name].read().to(DTYPES[stored.dtype])):
                changed.append(name)
            progress.advance(1, note=name)
    return changed


def _reference(model: Path, against: Path | None) -> Path:
    if against is not None:
        return against
    described = model / "finetune.json"
    origin = Path(json.loads(described.read_text()).get("from", "")) if described.is_file() else None
    if origin is None or not (origin / "asymflow.json").is_file():
        raise UsageError(f"--model {model}: the converted model it came from is not known or gone; name it: --against")
    return origin


def _buffers(model: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    stored, _ = files.read_tensors(model / "asymflow.safetensors")
    return {BASIS: stored["basis"].to(dtype), SCALE: stored["scale"].to(dtype)}


def _recipe(checkpoint: Checkpoint) -> dict[str, str]:
    # Files that a conversion only copied are as the base has them, and say nothing of it.
    notes: Mapping[str, str] = next((n for n in checkpoint.metadata.values() if "recipe" in n), {})
    return {key: notes[key] for key in ("base", "recipe") if key in notes}


def _write(out: Path, outputs: list[Output], notes: Mapping[str, str]) -> None:
    broken: list[str] = []

    def save(temporary: Path) -> None:
        with bar("export", sum(output.size for output in outputs)) as progress:
            broken.extend(write_file(temporary, tuple(outputs), notes, progress).broken)
        if broken:
            raise Flux2PixelError(f"{out}: {', '.join(broken[:5])}: not finite in fp16; nothing was written")

    files.write(out, save)
    log(f"wrote {out}: {len(outputs)} tensors")
