"""Adapter files: full tensors, LoRA pairs and a basis, merged into a model's tensors as they are written.

Read: the released AsymFLUX.2-klein adapter (``proj_buffer``, ``scale_buffer``, whole projections and final modulation,
LoRA of alpha = rank under the stock class's names), what a LoRA finetune leaves, and LoRA files in any naming that
diffusers reads for the family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flux2pixel.asymflow.linalg import polar
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.weights.checkpoint import Checkpoint, Stored, open_checkpoint
from flux2pixel.weights.write import Output

BASIS, SCALE = "proj_buffer", "scale_buffer"
ROUNDED = 0.02  # off-orthonormality that storing a basis in bf16 may leave, generously
PREFIXES = ("transformer.", "base_model.model.")
OTHER_NAMING = re.compile(r"diffusion_model\.|lora_(unet|transformer)_|.*\.lora_down\.|(double|single)_blocks\.")
HALF = re.compile(r".+[._]lora[._]?(A|B|down|up)(\.default)?(\.weight)?|.+\.alpha")
LOADERS = {
    "flux1": "FluxLoraLoaderMixin",
    "flux2": "Flux2LoraLoaderMixin",
    "flux3": "Flux3LoraLoaderMixin",
    "sd3": "SD3LoraLoaderMixin",
    "qwen-image": "QwenImageLoraLoaderMixin",
    "z-image": "ZImageLoraLoaderMixin",
}
"""The class of diffusers that knows the namings of LoRA files of each family."""
PAIR = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight")


@dataclass(frozen=True)
class LowRank:
    """A change ``scale B A`` of a weight: A is (rank, columns), B is (rows, rank)."""

    a: Callable[[], Tensor]
    b: Callable[[], Tensor]
    shape: tuple[int, int]
    scale: float


@dataclass(frozen=True)
class Adapter:
    """``full`` tensors by name, ``pairs`` by the name of the weight they change, and A and s if the file has them."""

    path: Path
    full: Mapping[str, Stored]
    pairs: Mapping[str, LowRank]
    flow: AsymFlow | None


def read_adapter(path: Path, family: str = "flux2") -> Adapter:
    """Read an adapter file's headers; ``family`` says whose namings a LoRA file may have.

    Raises UsageError or Flux2PixelError naming what is wrong with it.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: adapters are read from .safetensors files only")
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    checkpoint = open_checkpoint(path)
    tensors = {_plain(name): stored for name, stored in checkpoint.tensors.items()}
    if any(OTHER_NAMING.match(name) for name in tensors):
        return Adapter(path, {}, _through_diffusers(path, list(checkpoint.tensors), family), None)
    scale = _scale(checkpoint)
    halves: dict[str, dict[str, Stored]] = {}
    full = {}
    for name, stored in tensors.items():
        if match := PAIR.fullmatch(name):
            halves.setdefault(f"{match[1]}.weight", {})[match[2]] = stored
        elif not name.endswith(".alpha"):
            full[name] = stored
    alone = [name for name, pair in halves.items() if len(pair) != 2]
    if alone:
        raise Flux2PixelError(f"{path}: only one half of the LoRA of {', '.join(alone[:5])}; get the file again")
    pairs = {}
    for name, pair in halves.items():
        a, b = pair["A"], pair["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise Flux2PixelError(f"{path}: LoRA of {name}: A {a.shape} and B {b.shape} do not fit; get the file again")
        alpha = tensors.get(f"{name.removesuffix('.weight')}.alpha")
        factor = scale if alpha is None else float(alpha.read()) / a.shape[0]
        pairs[name] = LowRank(a.read, b.read, (b.shape[0], a.shape[1]), factor)
    if not full and not pairs:
        raise Flux2PixelError(f"{path}: empty; get the file again")
    basis, s = full.pop(BASIS, None), full.pop(SCALE, None)
    if (basis is None) != (s is None):
        raise Flux2PixelError(f"{path}: {BASIS} and {SCALE} come together; one is missing")
    return Adapter(path, full, pairs, _flow(path, basis, s) if basis and s else None)


def merge(outputs: Sequence[Output], adapter: Adapter, strength: float = 1.0) -> list[Output]:
    """``outputs`` with the adapter in them: W + strength scale B A in float32, or the full tensor; dtypes stay.

    Raises Flux2PixelError that lists every tensor of the adapter that matches nothing or does not fit: an adapter that
    is applied in part is applied wrongly.
    """
    by_name = {output.name: output for output in outputs}
    shapes = {name: stored.shape for name, stored in adapter.full.items()}
    shapes |= {name: pair.shape for name, pair in adapter.pairs.items()}
    problems = [f"{name} matches nothing" for name in shapes if name not in by_name]
    problems += [
        f"{name} is for a weight of shape {shape}, the model's is {by_name[name].shape}"
        for name, shape in shapes.items()
        if name in by_name and by_name[name].shape != shape
    ]
    if problems:
        rest = f"; and {len(problems) - 8} more" if problems[8:] else ""
        raise Flux2PixelError(f"{adapter.path}: not an adapter of this model: {'; '.join(problems[:8])}{rest}")
    for name, stored in adapter.full.items():
        rows = partial(_rows, stored)
        action = f"from {adapter.path.name}"
        by_name[name] = replace(by_name[name], rows=rows, action=action, whole=False)
    for name, pair in adapter.pairs.items():
        output = by_name[name]
        action = ", ".join(filter(None, (output.action, f"+ LoRA of rank {_rank(pair)} from {adapter.path.name}")))
        rows = partial(_merged, output, pair, strength)
        by_name[name] = replace(output, rows=rows, action=action, whole=False)
    return [by_name[output.name] for output in outputs]


def _rows(stored: Stored, first: int, last: int) -> Tensor:
    return stored.slice(first, last).read()


def _merged(output: Output, pair: LowRank, strength: float, first: int, last: int) -> Tensor:
    change = pair.b()[first:last].float() @ pair.a().float()
    return output.block(first, last).float().add_(change, alpha=strength * pair.scale)


def _rank(pair: LowRank) -> int:
    return pair.a().shape[0]


def _plain(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _scale(checkpoint: Checkpoint) -> float:
    """alpha / rank from the metadata that a finetune writes; 1 where there is none, as in the released adapter."""
    notes = next(iter(checkpoint.metadata.values()), {})
    if "lora_alpha" in notes and "lora_rank" in notes:
        return float(notes["lora_alpha"]) / float(notes["lora_rank"])
    return 1.0


def _flow(path: Path, basis: Stored, scale: Stored) -> AsymFlow:
    """The subspace of an adapter; bf16 storage left A^T A off I by about 1e-3, so the nearest orthonormal A is used."""
    stored = basis.read().double()
    if len(stored.shape) != 2 or stored.shape[0] < stored.shape[1]:
        raise Flux2PixelError(f"{path}: {BASIS} has shape {basis.shape}, not (D, r) with D >= r; get the file again")
    off = (stored.mT @ stored - torch.eye(stored.shape[1], dtype=stored.dtype)).abs().max().item()
    if not off < ROUNDED:
        raise Flux2PixelError(
            f"{path}: {BASIS} is not orthonormal, A^T A differs from I by {off:.1e}; get the file again"
        )
    try:
        return AsymFlow(polar(stored).float(), scale.read().float())
    except ValueError as error:
        raise Flux2PixelError(f"{path}: {SCALE}: {error}") from error


def _through_diffusers(path: Path, names: Sequence[str], family: str) -> dict[str, LowRank]:
    """LoRA pairs of a file in another naming (Kohya's, the original names), as diffusers translates it for the family.

    diffusers drops what it has no place for; here a tensor that is no half of a pair, and a pair that its translation
    lost, is refused.
    """
    import diffusers.loaders

    odd = [name for name in names if not HALF.fullmatch(name)]
    if odd:
        raise Flux2PixelError(
            f"{path}: {', '.join(odd[:5])}{', ...' if odd[5:] else ''}: not a half of a LoRA pair (DoRA, LoKr, biases "
            "and differences cannot be merged); export it as plain LoRA"
        )
    loader = getattr(diffusers.loaders, LOADERS[family])
    try:
        # FLUX.1 alone gives alphas apart, where its translation has not multiplied them in.
        options = {"return_alphas": True} if family == "flux1" else {}
        state = loader.lora_state_dict(str(path), use_safetensors=True, **options)
    except (ValueError, KeyError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise Flux2PixelError(f"{path}: not a LoRA of {family} that diffusers can read ({reason})") from error
    if isinstance(state, tuple):
        state = state[0] | (state[1] or {})
    state = {_plain(name): tensor for name, tensor in state.items()}
    pairs = {}
    for name, tensor in state.items():
        match = PAIR.fullmatch(name)
        if match and match[2] == "A" and f"{match[1]}.lora_B.weight" in state:
            b = state[f"{match[1]}.lora_B.weight"]
            alpha = state.get(f"{match[1]}.alpha", torch.tensor(float(tensor.shape[0])))
            read_a, read_b = partial(_same, tensor), partial(_same, b)
            scale = float(alpha) / tensor.shape[0]
            pairs[f"{match[1]}.weight"] = LowRank(read_a, read_b, (b.shape[0], tensor.shape[1]), scale)
        elif not match and not name.endswith(".alpha"):
            raise Flux2PixelError(f"{path}: {name}: not a half of a LoRA pair, so it cannot be merged")
    given = sum(1 for name in names if re.search(r"[._]lora[._]?(A|down)\b", name))
    if len(pairs) < given:
        raise Flux2PixelError(
            f"{path}: diffusers understands {len(pairs)} of its {given} LoRA pairs as {family}'s; "
            "is it for another model? an adapter that is applied in part is applied wrongly"
        )
    return pairs


def _same(tensor: Tensor) -> Tensor:
    return tensor
