"""What can be wrong with the settings of a fit before any work is done."""

from __future__ import annotations

from flux2pixel.models.base import Base
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.errors import UsageError
from flux2pixel.subspace.cached import is_cache


def check(recipe: Recipe, base: Base) -> None:
    """Raise UsageError where the settings of ``[fit_subspace]`` contradict each other or the base."""
    settings = recipe.fit_subspace
    if settings.rank and settings.method != "pca" and settings.rank != base.latent_width:
        raise UsageError(
            f"fit_subspace.rank: {settings.rank} is not the latent token width {base.latent_width}; only pca may differ"
        )
    if settings.rank > base.token_width:
        raise UsageError(f"fit_subspace.rank: {settings.rank} is more than a pixel token has ({base.token_width})")
    if settings.method == "vae-jacobian" and settings.jacobian == "smoothed" and settings.linearise_at == "images":
        raise UsageError(
            "fit_subspace.linearise_at: smoothed over images is what procrustes computes; "
            'set method = "procrustes", or jacobian = "exact"'
        )
    if settings.linearise_at == "images" and settings.method == "vae-jacobian" and is_cache(settings.source):
        raise UsageError("fit_subspace.source: a cache has no pictures to linearise at; give the images themselves")
