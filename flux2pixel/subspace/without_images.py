"""A subspace for a conversion that was given none: from the VAE alone, without an image."""

from __future__ import annotations

from pathlib import Path

from flux2pixel.models.base import open_base
from flux2pixel.models.digest import vae_digest
from flux2pixel.recipe import Recipe, dumps
from flux2pixel.runtime import device
from flux2pixel.runtime.progress import log
from flux2pixel.subspace.run import prior_moments
from flux2pixel.subspace.solvers import procrustes
from flux2pixel.weights.subspace import write_subspace


def fit_without_images(recipe: Recipe, path: Path) -> Path:
    """Fit by vae-jacobian over ``fit_subspace.points`` images that the VAE imagines; writes ``path`` and returns it.

    Basis and scale both come from those images, so nothing here knows how real ones are distributed; it says so.
    """
    log("convert: no subspace given; fitting one from the VAE alone (vae-jacobian, data-free)")
    log(f"note: one fitted on images fits images better: flux2pixel fit-subspace --base {recipe.base} --images FOLDER")
    base = open_base(recipe.base, parts=("vae",))
    place = device.choose(recipe.device, float64=True)
    base.vae.to(place)
    moments = prior_moments(recipe, base, place)
    basis, scale = procrustes(moments)
    metadata = {"method": "vae-jacobian", "data_free": True, "base": recipe.base, "patch_size": base.patch_size}
    metadata |= {"patch_order": "c,ph,pw", "color_space": base.color_space, "recipe": dumps(recipe)}
    metadata |= {"images": 0, "tokens": moments.tokens, "vae_sha256": vae_digest(base)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_subspace(path, basis, scale, metadata)
    log(f"wrote {path}")
    return path
