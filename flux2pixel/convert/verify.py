"""Proving a folder again: converted, finetuned or made from an adapter, whenever and by whatever version.

What a conversion did is taken from the folder's own record and done again as a plan, of which nothing is written; what
lies on the disk is compared with it. A finetuned model's trunk, all that training left alone, must be the base's bit
for bit; the base's own projections, folded through the folder's basis, prove basis, scale and recovery.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flux2pixel import recipe as recipes
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.convert.compare import check_tensors, open_written
from flux2pixel.convert.prepare import Extras, Job, prepare
from flux2pixel.convert.proof import Proof, flow_digest, prove
from flux2pixel.convert.run import read_flow
from flux2pixel.families.configs import read_config
from flux2pixel.models.base import Base
from flux2pixel.recipe import Convert
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.progress import log


def verify(
    folder: Path,
    base: str | None = None,
    made_with: Sequence[Path] = (),
    settings: Convert | None = None,
    device: torch.device | None = None,
) -> Proof:
    """Prove the pixel model in ``folder``; returns what was found.

    Args:
        base: the latent base, where it is not what and where the folder's record says.
        made_with: LoRA, adapter or weight files of the conversion that are no longer where they were; they are known
            by their SHA-256.
        settings: ``verify_steps``, ``tolerance`` and ``proof``.
        device: a GPU to sample on; the CPU if not given.

    Raises UsageError if it is no such folder or something it was made from is gone; Flux2PixelError, of one line, if
    anything in it is not what its record says.
    """
    settings = settings or Convert()
    record = _record(folder)
    recipe = recipes.load(None, _recipe_of(record, base))
    extras = _extras(record, made_with)
    flow = read_flow(folder)
    job = prepare(recipe, None if extras.adapter else flow, extras)
    _check_flow(folder, job, flow, record)
    written = open_written(folder / "transformer", job)
    trained = trained_names(folder, job)
    if trained is not None and not any(output.name not in trained for output in job.outputs):
        log("verify: every tensor was trained, so none is compared; names, shapes and the recovery are")
    counts, worst = check_tensors(job, written, trained=trained or ())
    proof = prove(job, written, flow, settings, recipe.seed, device, trained or ())
    proof = replace(proof, tensors=counts, fold_error=worst)
    for line in proof.lines():
        log(line)
    log(f"verify: {folder} is what its record says")
    return proof


def trained_names(folder: Path, job: Job) -> set[str] | None:
    """Names of the tensors that a finetune may have changed: all, or projections, modulation and LoRA's; else None."""
    described = folder / "finetune.json"
    if not described.is_file():
        return None
    settings = read_config(described).get("recipe", {}).get("finetune", {})
    names = [output.name for output in job.outputs]
    if settings.get("trainable", "full") == "full":
        return set(names)
    base = job.base
    tied = (*base.projections.inputs, base.projections.output, base.projections.modulation)
    full = {base.pixel_name(module) for module in tied}
    patterns = [p for t in settings.get("lora_targets", ["base"]) for p in _patterns(t, base)]
    return {
        name
        for name in names
        if (module := name.rpartition(".")[0]) in full or any(re.fullmatch(pattern, module) for pattern in patterns)
    }


def _patterns(target: str, base: Base) -> tuple[str, ...]:
    return base.lora_targets if target == "base" else (target,)


def _record(folder: Path) -> dict[str, Any]:
    if not (folder / "asymflow.json").is_file() or not (folder / "conversion.json").is_file():
        raise UsageError(f"{folder}: no asymflow.json and conversion.json in it; name a converted or finetuned folder")
    try:
        record: dict[str, Any] = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise Flux2PixelError(f"{folder}/conversion.json: not valid JSON ({error}); convert again") from error
    return record


def _recipe_of(record: dict[str, Any], base: str | None) -> list[str]:
    """What of the conversion's recipe decides what its tensors are, as assignments."""
    made = record.get("recipe", {})
    changed = [recipes.setting("base", base or str(record["base"]))]
    changed.append(recipes.setting("convert.dtype", made.get("convert", {}).get("dtype", "keep")))
    return [*changed, f"seed={made.get('seed', 0)}"]


def _extras(record: dict[str, Any], made_with: Collection[Path]) -> Extras:
    """The files that took part in the conversion, found where they were or among ``made_with``."""
    given = {files.digest(path): path for path in made_with}

    def found(what: str, path: str | None, digest: str) -> Path:
        if digest in given:
            return given[digest]
        if path and Path(path).is_file() and files.digest(Path(path)) == digest:
            return Path(path)
        raise UsageError(
            f"conversion.json: made with the {what} {path or 'file'} of SHA-256 {digest[:16]}..., which is not there "
            "any more, or changed; name it: --with FILE"
        )

    loras = tuple(
        (found("LoRA", one.get("path"), one["sha256"]), float(one["strength"])) for one in record.get("loras", ())
    )
    single = {
        key: found(key, record.get(key), record[f"{key}_sha256"]) if f"{key}_sha256" in record else None
        for key in ("weights", "adapter")
    }
    return Extras(weights=single["weights"], loras=loras, adapter=single["adapter"])


def _check_flow(folder: Path, job: Job, flow: AsymFlow, record: dict[str, Any]) -> None:
    """The folder's basis and scale are those it was made with.

    Sampling cannot tell: a scale that fits no image is as exact as any other.
    """
    path = folder / "asymflow.safetensors"
    if record.get("flow_sha256", digest := flow_digest(flow)) != digest:
        raise Flux2PixelError(f"{path}: not the basis and scale that the conversion wrote; convert again")
    width = (job.base.token_width, job.base.latent_width)
    if tuple(flow.basis.shape) != width:
        raise Flux2PixelError(f"{folder}/asymflow.safetensors: basis {tuple(flow.basis.shape)}, the base needs {width}")
    if (
        job.adapter
        and job.flow
        and not (torch.allclose(job.flow.basis, flow.basis, atol=1e-6) and torch.equal(job.flow.scale, flow.scale))
    ):
        raise Flux2PixelError(f"{folder}/asymflow.safetensors: not the basis and scale of the adapter it was made from")
