"""What a training leaves: the averaged model, the raw weights beside it, and a card that says how it was made."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux2pixel.finetune.network.checkpoint import State
from flux2pixel.finetune.network.parallel import whole
from flux2pixel.finetune.network.trainable import merged, split
from flux2pixel.finetune.watch.log import Log
from flux2pixel.models.base import Base, stored_dtype
from flux2pixel.models.folder import read_folder, write_folder
from flux2pixel.recipe import Recipe, as_dict, dumps
from flux2pixel.runtime import files
from flux2pixel.runtime.version import __version__

NOT_COPIED = frozenset(
    ("transformer", "transformer_raw", "adapter.safetensors", "adapter_raw.safetensors", "README.md", "readout.json")
)

PATTERN = "diffusion_pytorch_model{suffix}.safetensors"


def gather(state: State, leads: bool) -> dict[str, dict[str, Tensor]]:
    """``ema`` and ``raw``: the trained tensors whole and in host memory, in the leading process; every process asks."""
    trained = {name: p.detach() for name, p in state.network.named_parameters() if p.requires_grad}
    found: dict[str, dict[str, Tensor]] = {"ema": {}, "raw": {}}
    for kind, tensors in (("ema", state.ema.values), ("raw", trained)):
        for name, tensor in tensors.items():
            full = whole(tensor).cpu()  # one at a time: sharded weights need not fit one device together
            if leads:
                found[kind][name] = full
    return found


def write_model(folder: Path, source: Path, base: Base, trained: dict[str, dict[str, Tensor]], recipe: Recipe) -> None:
    """Fill ``folder``: the converted model's files, ``transformer`` (averaged) and ``transformer_raw``.

    The metadata of every file of weights names the base, which weights they are and the resolved recipe.

    A LoRA training's weights are merged into them, and also written apart: ``adapter.safetensors`` and
    ``adapter_raw.safetensors`` hold the full projections and LoRA's A and B under the stock class's names.
    """
    from safetensors.torch import save_file

    for item in sorted(source.iterdir()):
        if item.name not in NOT_COPIED:
            (shutil.copytree if item.is_dir() else shutil.copy2)(item, folder / item.name)
    settings = recipe.finetune
    network = base.load("transformer", base.network_class(), torch_dtype=stored_dtype(source / "transformer"))
    state = network.state_dict()
    for kind, suffix in (("ema", ""), ("raw", "_raw")):
        full, lora = split(trained[kind])
        notes = {"format": "pt", "made_by": f"flux2pixel {__version__}", "base": recipe.base}
        notes |= {"weights": "averaged" if kind == "ema" else "raw", "recipe": dumps(recipe)}
        target = folder / f"transformer{suffix}"
        network.save_config(target)
        write_weights(target, merged(state, full, lora, settings.lora_alpha / settings.lora_rank), notes)
        if lora:
            tensors = {name: tensor.contiguous() for name, tensor in (full | lora).items()}
            scale = {"lora_alpha": str(settings.lora_alpha), "lora_rank": str(settings.lora_rank)}
            save_file(tensors, folder / f"adapter{suffix}.safetensors", notes | scale)
    model = read_folder(folder)
    # What a finetune teaches has no latent counterpart, so nothing is lost by keeping its colours on the screen.
    sampler = model.sampler.changed({"gamut_clamp": True}).changed(recipe.sample)
    # Of a readout the offset is the pixel space itself; the prior and the last step were fitted to another network.
    kept = {name: tensor for name, tensor in model.tensors.items() if name == "offset"}
    write_folder(folder, replace(model, sampler=sampler, tensors=kept), recipe)


def write_weights(folder: Path, state: Mapping[str, Tensor], notes: dict[str, str], shard: str = "5GB") -> None:
    """Write a state dict as diffusers does, ``notes`` in every shard, as their writers can not."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    parts = split_torch_state_dict_into_shards(dict(state), filename_pattern=PATTERN, max_shard_size=shard)
    for name, members in parts.filename_to_tensors.items():
        save_file({member: state[member].contiguous() for member in members}, folder / name, notes)
    if parts.is_sharded:
        index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
        files.write_json(folder / f"{PATTERN.format(suffix='')}.index.json", index)


def write_card(folder: Path, recipe: Recipe, log: Log, record: dict[str, Any], samples: Path) -> None:
    """``README.md`` with the resolved recipe, what was trained on, the curves and the samples; ``finetune.json``."""
    curve = log.curve("loss", "lam")
    files.write_json(folder / "finetune.json", record | {"recipe": as_dict(recipe), "curve": curve})
    lines = ["---", "library_name: diffusers", "tags: [flux2pixel, asymflow]", "---", f"# {recipe.base}, finetuned", ""]
    lines += [
        f"The pixel-space model of `{recipe.base}`, trained for {record['steps']} steps on {record['images_seen']} "
        f"images ({record['images']} distinct, cache `{record['data'][:16]}`) in {record['processes']} process(es) by "
        f"flux2pixel. `transformer/` holds the averaged weights, `transformer_raw/` the last ones.",
        "",
    ]
    before, after = log.first("validation"), log.last("validation")
    if before and after:
        lines += [
            f"Validation loss (flow matching, fixed noise): {before['mean']:.4f} at the start, {after['mean']:.4f} "
            f"at the end. By noise level, from low to high:",
            "",
            "| | " + " | ".join(f"{level:.2f}" for level in after["edges"][1:]) + " |",
            "|---" * (len(after["bins"]) + 1) + "|",
            *(
                f"| {name} | " + " | ".join(f"{v:.4f}" for v in row["bins"]) + " |"
                for name, row in (("start", before), ("end", after))
            ),
            "",
        ]
    if _plot(log, folder / "curves.png"):
        lines += ["![Loss and validation](curves.png)", ""]
    if (samples / "contact.png").is_file():
        shutil.copy2(samples / "contact.png", folder / "samples.png")
        lines += [f"Samples during training ({', '.join(recipe.finetune.prompts)}):", "", "![](samples.png)", ""]
    lines += ["```toml", dumps(recipe).rstrip(), "```", ""]
    (folder / "README.md").write_text("\n".join(lines))


def _plot(log: Log, path: Path) -> bool:
    """Draw the curves if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name, rows in (
        (axes[0], "loss", log.curve("loss")),
        (axes[1], "validation", [[step, value["mean"]] for step, value in log.rows("validation")]),
    ):
        if rows:
            steps, values = zip(*rows, strict=True)
            axis.plot(steps, values, marker="." if len(steps) < 50 else "")
        axis.set(xlabel="step", title=name)
    figure.savefig(path, dpi=120)
    return True


@torch.no_grad()
def digest_of(tensors: list[Tensor]) -> str:
    """SHA-256 of the tensors' bytes."""
    import hashlib

    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
