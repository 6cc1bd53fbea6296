"""The convert stage: a latent checkpoint and a subspace -> a pixel model in a diffusers-style folder."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch

from flux2pixel import __version__, bases, files
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.bases.base import Base
from flux2pixel.convert.fold import exactness, fold
from flux2pixel.errors import Flux2PixelError, UsageError
from flux2pixel.progress import say
from flux2pixel.recipe import Recipe, as_dict, dumps
from flux2pixel.subspace.file import read_subspace

COMPANIONS = ("text_encoder", "tokenizer", "scheduler")


def convert(recipe: Recipe, run: Path, subspace: Path | None = None, out: Path | None = None) -> Path:
    """Fold the subspace into the base, prove the result exact, and write it; returns the model's folder.

    Raises Flux2PixelError if the exact test's error is above ``convert.tolerance``: nothing is written then.
    """
    torch.set_num_threads(recipe.threads)
    base = bases.open_base(recipe.base)
    subspace = subspace or run / "subspace.safetensors"
    flow, metadata = read_subspace(subspace)
    _check_fit(base, recipe.base, flow, metadata, subspace)
    say(f"convert: base {base.folder}, subspace {subspace}")
    pixel = widen(base, flow)
    error = _verify(base, pixel, flow, recipe)
    say(f"exactness: {error:.1e} over {recipe.convert.verify_steps} Euler steps in float64")
    if not error <= recipe.convert.tolerance:
        raise Flux2PixelError(
            f"exactness error {error:.1e} is above convert.tolerance {recipe.convert.tolerance:g}: nothing was written"
        )
    destination = out or run / "converted"
    with files.new_folder(destination) as folder:
        pixel.save_pretrained(folder / "transformer")
        for part in COMPANIONS:
            shutil.copytree(base.folder / part, folder / part)
        write_asymflow(folder, flow, base, recipe)
        record = {
            "version": __version__,
            "base": recipe.base,
            "subspace": metadata,
            "subspace_sha256": files.digest(subspace),
            "transformer_sha256": _digests(base.folder / "transformer"),
            "exactness": {"max_abs_error": error, "steps": recipe.convert.verify_steps, "dtype": "float64"},
            "recipe": as_dict(recipe),
        }
        files.write_json(folder / "conversion.json", record)
        (folder / "README.md").write_text(_card(recipe.base, flow, metadata, error))
    say(f"wrote {destination}")
    return destination


def _check_fit(base: Base, name: str, flow: AsymFlow, metadata: dict[str, str], path: Path) -> None:
    """Refuse a subspace of another base, VAE, patch size or rank."""
    width = (3 * base.patch_size**2, base.latent_width)
    if tuple(flow.basis.shape) != width:
        found = tuple(flow.basis.shape)
        raise UsageError(f"{path}: basis {found} is not of patch size {base.patch_size} and rank {width[1]}: {width}")
    weights = base.folder / "vae" / "diffusion_pytorch_model.safetensors"
    if metadata.get("vae_sha256") and metadata["vae_sha256"] != files.digest(weights):
        raise UsageError(f"{path}: fitted for base {metadata.get('base')!r}, not for {name!r}; fit one for this base")


def widen(base: Base, flow: AsymFlow):
    """The stock transformer class with D channels in and out, holding the folded weights (float32)."""
    pixel = base.network_class()(**base.pixel_config(dict(base.transformer.config)))
    pixel.load_state_dict(fold(base.transformer.state_dict(), flow.basis, base.projections, base.pixel_name))
    return pixel.eval()


def _verify(base: Base, pixel, flow: AsymFlow, recipe: Recipe) -> float:
    """The acceptance test on an odd aspect ratio with random text, everything in float64, the fold redone exactly."""
    exact = flow.to(torch.float64)
    u, _, vh = torch.linalg.svd(exact.basis, full_matrices=False)
    exact.basis = u @ vh  # float32 storage leaves 1e-8 of non-orthonormality; the identity is about orthonormal A
    latent, wide = copy.deepcopy(base.transformer).double(), copy.deepcopy(pixel).double()
    state = fold(latent.state_dict(), exact.basis, base.projections, base.pixel_name)
    drift = max(float((state[k] - v).abs().max()) for k, v in wide.state_dict().items())
    if drift > 1e-5:
        raise Flux2PixelError(f"convert: folded weights differ from the float64 fold by {drift:.1e}; not written")
    wide.load_state_dict(state)
    generator = torch.Generator().manual_seed(recipe.seed)
    grid = (2, 3)
    cond = base.random_conditioning(base.config, 2, generator)
    noise = torch.randn(2, 6, flow.basis.shape[0], generator=generator, dtype=torch.float64)
    return exactness(
        lambda z, t: base.call(latent, z, t, cond, grid),
        lambda x, t: base.call(wide, x, t, cond, grid),
        exact,
        noise,
        recipe.convert.verify_steps,
    )


def write_asymflow(folder: Path, flow: AsymFlow, base: Base, recipe: Recipe) -> None:
    """Write ``asymflow.safetensors`` (basis, scale) and ``asymflow.json`` (how to use them)."""
    from safetensors.torch import save_file

    tensors = {"basis": flow.basis.float().contiguous(), "scale": flow.scale.float()}
    save_file(tensors, folder / "asymflow.safetensors", {"format": "flux2pixel.asymflow", "recipe": dumps(recipe)})
    use = {"patch_size": base.patch_size, "patch_order": "c,ph,pw", "color_space": base.color_space}
    use |= {"base": recipe.base, "family": base.family}
    use |= {"sigma_min": flow.sigma_min, "sampler": as_dict(recipe)["sample"], "version": __version__}
    files.write_json(folder / "asymflow.json", use)


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: files.digest(path) for path in sorted(folder.glob("*.safetensors"))}


def _card(base: str, flow: AsymFlow, metadata: dict[str, str], error: float) -> str:
    return f"""---
library_name: diffusers
tags: [flux2pixel, asymflow]
---
# {base}, pixel space

The transformer of `{base}` with its in- and out-projection folded through a pixel-latent patch basis
(method {metadata.get("method")}, {flow.basis.shape[0]} x {flow.basis.shape[1]}, scale {float(flow.scale):.4f}).
Coupled sampling in float64 agrees with the latent base to {error:.1e}. `transformer/` is the stock diffusers class;
`asymflow.safetensors` and `asymflow.json` hold what turns its output into pixels. Made by flux2pixel {__version__}.
"""
