"""The folder of a pixel model beside its transformer: what it needs to be used, and the record of how it was made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux2pixel import __version__, files
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.bases.base import Base, read_config
from flux2pixel.bases.hub import INDEXES
from flux2pixel.recipe import Recipe, as_dict, dumps

CHANGED_PARTS = ("transformer", "vae")  # the one is written anew, the other has no use in pixel space
WEIGHTS = ".safetensors"


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
    use |= {"sigma_min": flow.sigma_min, "sampler": as_dict(recipe)["sample"], "version": __version__}
    files.write_json(folder / "asymflow.json", use)


def finish(
    folder: Path, base: Base, flow: AsymFlow, recipe: Recipe, digests: Mapping[str, Any], record: Mapping[str, Any]
) -> None:
    """Write the card and, last, the record: a folder without ``conversion.json`` is not a finished one."""
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
