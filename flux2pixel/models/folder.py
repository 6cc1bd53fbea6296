"""The folder of a pixel model beside its transformer: what it needs to be used, and the record of how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flux2pixel import __version__
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.families.base import Base, read_config
from flux2pixel.models.hub import INDEXES
from flux2pixel.recipe import Recipe, Sample, as_dict, base_defaults, dumps
from flux2pixel.runtime import files

CHANGED_PARTS = ("transformer", "vae")  # the one is written anew, the other has no use in pixel space
SERVED = ("Flux2KleinPipeline",)  # bases whose pixel model the travelling pipeline can run
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 1.0, "use_dynamic_shifting": False}),
    "unipc": (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2, "flow_shift": 1.0},
    ),
}


def drawn_with(sample: Sample, folder: Path) -> Any:
    """``sample`` with what it leaves open as the model in ``folder`` says of itself, or its base."""
    described = folder / "asymflow.json"
    own = json.loads(described.read_text())["sampler"] if described.is_file() else {}
    own = own or base_defaults(str(folder)).get("sample", {})
    told = {name: value for name, value in asdict(sample).items() if value is not None}
    plain = Sample(steps=16, guidance=3.0, shift=1.0, solver="euler", orthogonal=False, gamut_clamp=True)
    return replace(plain, **{name: value for name, value in own.items() if value is not None} | told)


def companion_parts(folder: Path) -> tuple[str, ...]:
    """Sub-folders of a base that its pixel model keeps: text encoders, tokenizers, scheduler, as its index says."""
    found = [folder / name for name in INDEXES if (folder / name).is_file()]
    index = read_config(found[0] if found else folder / INDEXES[0])
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    return tuple(part for part in parts if part not in CHANGED_PARTS and not part.startswith("_"))


def write_asymflow(folder: Path, flow: AsymFlow, base: Base, recipe: Recipe) -> None:
    """Write ``asymflow.safetensors`` (basis, scale) and ``asymflow.json`` (how to use them)."""
    from safetensors.torch import save_file

    tensors = {"basis": flow.basis.float().contiguous(), "scale": flow.scale.float()}
    save_file(tensors, folder / "asymflow.safetensors", {"format": "flux2pixel.asymflow", "recipe": dumps(recipe)})
    use = {"patch_size": base.patch_size, "patch_order": "c,ph,pw", "color_space": base.color_space}
    use |= {"base": recipe.base, "family": base.family}
    sampler = asdict(drawn_with(recipe.sample, base.folder))
    use |= {"sigma_min": flow.sigma_min, "sampler": sampler, "version": __version__}
    files.write_json(folder / "asymflow.json", use)


def write_pipeline(folder: Path, base: Base, flow: AsymFlow, recipe: Recipe) -> bool:
    """Make the folder one that ``DiffusionPipeline.from_pretrained`` loads; returns False for a base it cannot serve.

    The noise levels are the base's own, and guidance is plain, so that the pipeline draws what the base would.
    """
    described_by = base.folder / "model_index.json"
    index = read_config(described_by) if described_by.is_file() else {}
    if index.get("_class_name") not in SERVED:
        return False
    from flux2pixel.pipelines.flux2_klein import copy_code, pack_basis

    scheduler = read_config(base.folder / "scheduler" / "scheduler_config.json")
    sample = drawn_with(recipe.sample, base.folder)
    shift = recipe.sample.shift or 1.0
    if shift == 1:
        shift = 0.0 if scheduler.get("use_dynamic_shifting") else float(scheduler.get("shift", 1.0))
    described: dict[str, Any] = {"_class_name": ["asymflow_pipeline", "AsymFlowPipeline"]}
    described |= {part: index[part] for part in ("scheduler", "text_encoder", "tokenizer", "transformer")}
    described |= {"is_distilled": base.distilled, "patch_size": base.patch_size, "sigma_min": flow.sigma_min}
    described |= {"steps": sample.steps, "guidance": sample.guidance}
    # A shift of the latent time followed by the map to pixel noise levels is one shift, by the product.
    described |= {"shift": shift * float(flow.scale), "shift_side": 0, "orthogonal": False, "gamut_clamp": False}
    described |= {"scale": float(flow.scale), "basis": pack_basis(flow.basis)}
    copy_code(folder)
    _write_scheduler(folder, described, "euler")
    files.write_json(folder / "model_index.json", described)
    return True


def tune_pipeline(folder: Path, sample: Sample, shift: float | None = None, shift_side: int = 0) -> None:
    """Give the pipeline of a finetuned folder the sampler of ``sample``, if it has a pipeline.

    ``shift`` of the pixel noise levels, for images of ``shift_side`` pixels a side, replaces the base's if given.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return
    described = read_config(index)
    sample = drawn_with(sample, folder)
    described |= {"steps": sample.steps, "guidance": sample.guidance}
    described |= {"orthogonal": sample.orthogonal, "gamut_clamp": sample.gamut_clamp}
    if shift is not None:
        described |= {"shift": shift, "shift_side": shift_side}
    _write_scheduler(folder, described, str(sample.solver))
    files.write_json(index, described)


def _write_scheduler(folder: Path, index: dict[str, Any], solver: str) -> None:
    """Write a scheduler that takes noise levels as they are; diffusers' Heun does not, so Euler stands in for it."""
    name, config = SCHEDULERS.get(solver, SCHEDULERS["euler"])
    index["scheduler"] = ["diffusers", name]
    files.write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": name} | config)


def finish(
    folder: Path, base: Base, flow: AsymFlow, recipe: Recipe, digests: Mapping[str, Any], record: Mapping[str, Any]
) -> None:
    """Write the card and, last, the record: a folder without ``conversion.json`` is not a finished one."""
    write_pipeline(folder, base, flow, recipe)
    exact = (record.get("exactness") or {}).get("max_abs_error")
    method = record.get("subspace", {}).get("method")
    (folder / "README.md").write_text(_card(recipe.base, flow, method, exact))
    made = {"version": __version__, "base": recipe.base, "transformer_sha256": dict(digests)} | dict(record)
    files.write_json(folder / "conversion.json", made | {"recipe": as_dict(recipe)})


def digest_in_name(path: Path) -> str | None:
    """The SHA-256 that the Hub's cache gives a blob as its name, or None."""
    return path.name if re.fullmatch(r"[0-9a-f]{64}", path.name) else None


def _card(base: str, flow: AsymFlow, method: str | None, error: float | None) -> str:
    proof = "was not tested" if error is None else f"agrees with the latent base to {error:.1e}"
    return f"""---
library_name: diffusers
tags: [flux2pixel, asymflow]
---
# {base}, pixel space

The transformer of `{base}` with its in- and out-projection folded through a pixel-latent patch basis
(method {method}, {flow.basis.shape[0]} x {flow.basis.shape[1]}, scale {float(flow.scale):.4f}).
Coupled sampling in float64 {proof}. `transformer/` is the stock diffusers class;
`asymflow.safetensors` and `asymflow.json` hold what turns its output into pixels. Made by flux2pixel {__version__}.
"""


def equals_its_base(folder: Path) -> bool:
    """Whether a pixel model was converted and nothing more: neither finetuned nor given an adapter."""
    record = folder / "conversion.json"
    trained = (folder / "finetune.json").is_file()
    return not trained and record.is_file() and "adapter_sha256" not in json.loads(record.read_text())
