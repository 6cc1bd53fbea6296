"""The model card of a converted folder: what it is, what it was made from, and under which licence."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.families.known import KNOWN
from flux2pixel.models.base import Base
from flux2pixel.runtime.version import __version__

LICENCES = {"Apache-2.0": "apache-2.0"}  # those that the Hub has a word for; any other is "other", with its name
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def card(name: str, base: Base, flow: AsymFlow, record: Mapping[str, Any]) -> str:
    """``README.md`` for a model made from the base that the recipe calls ``name``; ``record`` is its provenance."""
    hub = record.get("base_repo") or next((k.hub for alias, k in KNOWN.items() if name in (alias, k.hub)), None)
    known = next((known for known in KNOWN.values() if known.hub == hub), None)
    head = ["library_name: diffusers", "pipeline_tag: text-to-image", "tags: [flux2pixel, asymflow]"]
    if hub:
        head += [f"base_model: {hub}", "base_model_relation: finetune"]
    if known and known.licence in LICENCES:
        head.append(f"license: {LICENCES[known.licence]}")
    elif known:
        head += ["license: other", f"license_name: {re.sub(r'[^a-z0-9.]+', '-', known.licence.lower())}"]
        head.append(f"license_link: https://huggingface.co/{hub}")
    width, rank = flow.basis.shape
    shape = f"{width} x {rank}, scale {float(flow.scale):.4f}"
    if "adapter_sha256" in record:
        made = (
            f"The transformer of `{name}` with a trained pixel-space adapter in it (SHA-256 "
            f"`{record['adapter_sha256'][:16]}`), which brings its own basis, {shape}."
        )
        error = (record.get("trunk") or {}).get("max_abs_error")
        proof = "its trunk was not tested" if error is None else f"its trunk agrees with the latent base to {error:.1e}"
    else:
        method = record.get("subspace", {}).get("method", "unknown")
        made = (
            f"The transformer of `{name}` with its in- and out-projection folded through a pixel-latent patch basis\n"
            f"(method {method}, {shape})."
        )
        error = (record.get("exactness") or {}).get("max_abs_error")
        proof = "it was not tested" if error is None else f"it agrees with the latent base to {error:.1e}"
    commit = f" The base was commit `{record['base_commit']}`." if "base_commit" in record else ""
    licence = f" Its base's licence is {known.licence}; it holds for these weights too." if known else ""
    return "\n".join(
        [
            "---",
            *head,
            "---",
            f"# {name}, pixel space",
            "",
            made,
            f"In coupled sampling in float64 {proof}.{commit}{licence}",
            "`transformer/` is the stock diffusers class; `asymflow.safetensors` and `asymflow.json` hold what turns",
            f"its output into pixels. Made by flux2pixel {__version__}.",
            "",
        ]
    )


def copy_licence(base: Base, folder: Path) -> None:
    """Copy the base's licence and policy files beside the weights that they are about."""
    for path in sorted({path for pattern in LICENCE_FILES for path in base.folder.glob(pattern)}):
        if path.is_file():
            shutil.copyfile(path.resolve(), folder / path.name)
