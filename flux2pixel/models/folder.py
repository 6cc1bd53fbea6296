"""The folder of a pixel model: what it needs to be used, the settings it carries, and the record of how it was made.

transformer/             the stock class with D channels in and out
asymflow.json            how to use it: patch, colour space, base, sampler
asymflow.safetensors     basis (D, r), scale (), and what a readout adds
conversion.json          how it was made; written last, a folder without it is not a finished one
finetune.json            how it was trained, if it was
model_index.json, *.py   the diffusers pipeline that travels with it, for bases that have one
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from flux2pixel.asymflow.codec import Codec
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.asymflow.readout import PREFIX as READOUT
from flux2pixel.families.configs import read_config
from flux2pixel.models.base import Base
from flux2pixel.models.hub import INDEXES
from flux2pixel.models.sampler import Sampler
from flux2pixel.recipe import Recipe, as_dict, dumps
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.version import __version__

FORMAT = 2  # of asymflow.json; 1 had no number, and its sampler's shift was of the latent time at the size drawn
CHANGED_PARTS = ("transformer", "vae")  # the one is written anew, the other has no use in pixel space
SERVED = ("Flux2KleinPipeline",)  # bases whose pixel model the travelling pipeline can run
OLD_SIDE = 1024  # pixels along the side of the images of a folder of format 1 whose record does not tell
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 1.0, "use_dynamic_shifting": False}),
    "unipc": (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2, "flow_shift": 1.0},
    ),
}


@dataclass(frozen=True)
class PixelFolder:
    """What ``asymflow.json`` and ``asymflow.safetensors`` say: all of a pixel model but its networks."""

    base: str
    family: str
    color_space: str
    flow: AsymFlow
    codec: Codec
    sampler: Sampler
    tensors: Mapping[str, Tensor]


def is_pixel_folder(folder: Path) -> bool:
    """Whether ``folder`` is a converted, read-out or finetuned model."""
    return (folder / "asymflow.json").is_file()


def read_folder(folder: Path) -> PixelFolder:
    """Read a pixel model's folder without its networks.

    Raises UsageError if it is none, Flux2PixelError naming the file and what is wrong with it.
    """
    path = folder / "asymflow.json"
    if not is_pixel_folder(folder):
        what = "no asymflow.json in it" if folder.is_dir() else "no such folder"
        raise UsageError(f"--model {folder}: {what}; run convert, or name a converted folder")
    use = read_config(path)
    tensors, _ = files.read_tensors(folder / "asymflow.safetensors")
    try:
        flow = AsymFlow(tensors["basis"].float(), tensors["scale"].float(), sigma_min=float(use["sigma_min"]))
        patch = int(use["patch_size"])
        if use.get("format", 1) == 1:
            sampler = _sampler_of_format_1(use["sampler"], folder, float(flow.scale))
        elif use["format"] == FORMAT:
            sampler = Sampler(**use["sampler"])
        else:
            raise Flux2PixelError(
                f"{path}: format {use['format']!r} is of a newer flux2pixel than this ({__version__}); update it"
            )
        if len(flow.basis) != 3 * patch**2:
            raise ValueError(f"patch_size {patch} does not fit a basis of {len(flow.basis)} rows")
        return PixelFolder(
            str(use["base"]),
            str(use["family"]),
            str(use["color_space"]),
            flow,
            Codec(patch, tensors.get("offset")),
            sampler,
            tensors,
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise Flux2PixelError(f"{path}: {reason}; convert the model again") from error


def _sampler_of_format_1(stored: Mapping[str, Any], folder: Path, scale: float) -> Sampler:
    """The sampler of a folder that 0.1 wrote, its shift restated for 1024 x 1024.

    A folder that was only converted was drawn without orthogonal guidance and gamut clamp, whatever it said.
    """
    side = OLD_SIDE
    record = folder / "conversion.json"
    if record.is_file():
        side = int(json.loads(record.read_text()).get("recipe", {}).get("data", {}).get("resolution", OLD_SIDE))
    sampler = Sampler(**{**stored, "height": side, "width": side})
    sampler = replace(sampler, shift=(sampler.shift or 1.0) * scale * OLD_SIDE / side)
    return replace(sampler, orthogonal=False, gamut_clamp=False) if equals_its_base(folder) else sampler


def companion_parts(folder: Path) -> tuple[str, ...]:
    """Sub-folders of a base that its pixel model keeps: text encoders, tokenizers, scheduler, as its index says."""
    found = [folder / name for name in INDEXES if (folder / name).is_file()]
    index = read_config(found[0] if found else folder / INDEXES[0])
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    return tuple(part for part in parts if part not in CHANGED_PARTS and not part.startswith("_"))


def write_folder(folder: Path, model: PixelFolder, recipe: Recipe) -> None:
    """Write ``asymflow.safetensors`` and ``asymflow.json``, and bring the travelling pipeline to the sampler."""
    from safetensors.torch import save_file

    tensors = {name: value.float().contiguous() for name, value in model.tensors.items()}
    tensors |= {"basis": model.flow.basis.float().contiguous(), "scale": model.flow.scale.float()}
    notes = {"format": "flux2pixel.asymflow", "recipe": dumps(recipe)}
    files.write(folder / "asymflow.safetensors", lambda temporary: save_file(tensors, temporary, notes))
    use = {"format": FORMAT, "version": __version__, "base": model.base, "family": model.family}
    use |= {"patch_size": model.codec.patch, "patch_order": "c,ph,pw", "color_space": model.color_space}
    use |= {"sigma_min": model.flow.sigma_min, "sampler": model.sampler.as_dict()}
    files.write_json(folder / "asymflow.json", use)
    if (folder / "model_index.json").is_file():
        _describe_pipeline(folder, model)


def write_pipeline(folder: Path, base: Base, model: PixelFolder) -> bool:
    """Make the folder one that ``DiffusionPipeline.from_pretrained`` loads; False for a base it cannot serve."""
    described_by = base.folder / "model_index.json"
    index = read_config(described_by) if described_by.is_file() else {}
    if index.get("_class_name") not in SERVED:
        return False
    from flux2pixel.pipelines import flux2_klein
    from flux2pixel.pipelines.bundle import PIPELINE_CLASS, copy_code

    described: dict[str, Any] = {"_class_name": PIPELINE_CLASS}
    described |= {part: index[part] for part in ("scheduler", "text_encoder", "tokenizer", "transformer")}
    files.write_json(folder / "model_index.json", described | {"is_distilled": base.distilled})
    copy_code(folder, Path(flux2_klein.__file__))
    _describe_pipeline(folder, model)
    return True


def _describe_pipeline(folder: Path, model: PixelFolder) -> None:
    """Bring ``model_index.json`` and the scheduler to the model's constants and sampler.

    The scheduler takes noise levels as they are; diffusers' Heun does not, so Euler stands in for it.
    """
    from flux2pixel.pipelines.flux2_klein import pack_basis

    described, sampler = read_config(folder / "model_index.json"), model.sampler
    name, config = SCHEDULERS.get(sampler.solver, SCHEDULERS["euler"])
    described |= {"scheduler": ["diffusers", name], "patch_size": model.codec.patch}
    described |= {"sigma_min": model.flow.sigma_min, "scale": float(model.flow.scale)}
    described |= {"basis": pack_basis(model.flow.basis)}
    described |= {"offset": "" if model.codec.offset is None else pack_basis(model.codec.offset)}
    described |= {"readout": any(name.startswith(READOUT) for name in model.tensors)}
    described |= {key: value for key, value in asdict(sampler).items() if key != "solver"}
    files.write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": name} | config)
    files.write_json(folder / "model_index.json", described)


def finish(folder: Path, base: Base, model: PixelFolder, recipe: Recipe, record: Mapping[str, Any]) -> None:
    """Write the pipeline, the card and, last, the record that makes the folder a finished one."""
    write_pipeline(folder, base, model)
    exact = (record.get("exactness") or {}).get("max_abs_error")
    method = record.get("subspace", {}).get("method")
    (folder / "README.md").write_text(_card(recipe.base, model.flow, method, exact))
    made = {"version": __version__, "base": recipe.base} | dict(record)
    files.write_json(folder / "conversion.json", made | {"recipe": as_dict(recipe)})


def digest_in_name(path: Path) -> str | None:
    """The SHA-256 that the Hub's cache gives a blob as its name, or None."""
    return path.name if re.fullmatch(r"[0-9a-f]{64}", path.name) else None


def equals_its_base(folder: Path) -> bool:
    """Whether a pixel model was converted and nothing more: neither finetuned, nor read out, nor given an adapter."""
    record = folder / "conversion.json"
    changed = any((folder / name).is_file() for name in ("finetune.json", "readout.json"))
    return not changed and record.is_file() and "adapter_sha256" not in json.loads(record.read_text())


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
