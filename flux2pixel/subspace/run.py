"""The fit-subspace stage: images -> sums -> basis, scale and figures -> ``subspace.safetensors`` and its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from flux2pixel.data import Tally
from flux2pixel.models import base as bases
from flux2pixel.models.base import Base
from flux2pixel.models.digest import vae_digest
from flux2pixel.recipe import Recipe, dumps
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.launch import set_threads
from flux2pixel.runtime.processes import Team, join
from flux2pixel.runtime.progress import bar, log
from flux2pixel.subspace import diagnostics, jacobian, report, solvers
from flux2pixel.subspace.gather import Saved, gather, image_batches
from flux2pixel.subspace.moments import Moments
from flux2pixel.subspace.prior import decode_pixels, prior_latents, prior_pairs, prior_side
from flux2pixel.subspace.settings import check
from flux2pixel.subspace.strata import Strata, read_strata, write_strata
from flux2pixel.weights.subspace import write_subspace


def fit_subspace(recipe: Recipe, run: Path, out: Path | None = None, merge: Sequence[Path] = ()) -> Path:
    """Fit the basis that the recipe names and write it, its sums and its report; returns the subspace's path.

    ``merge`` names files of sums to add up instead of reading images. Under torchrun every process calls this and
    reads its part of the images; the first one fits and writes.
    """
    set_threads(recipe.threads)
    torch.set_flush_denormal(True)
    base = bases.open_base(recipe.base, parts=("vae",))
    check(recipe, base)
    path = out or run / "subspace.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with join(device=recipe.device, float64=True) as team:
        base.vae.to(team.device)
        if merge:
            strata, tally = merged(merge, base), Tally()
        else:
            if team.leads:
                log(f"fit-subspace: base {base.folder}, images {recipe.fit_subspace.source}")
            strata, tally = gather(base, recipe, team, path)
        if team.leads:
            _finish(recipe, base, strata, tally, path, team)
            Saved(path, "", team).remove()
        team.barrier()
    return path


def merged(paths: Sequence[Path], base: Base) -> Strata:
    """The sums of several files. Raises UsageError if one is of another VAE or token width."""
    total, digest = Strata(base.token_width, base.latent_width), vae_digest(base)
    for path in paths:
        strata, metadata, _ = read_strata(path)
        if metadata.get("vae_sha256") != digest:
            raise UsageError(f"{path}: sums of another VAE than {base.folder}'s; they cannot be merged")
        total = total + strata
    return total


def _finish(recipe: Recipe, base: Base, strata: Strata, tally: Tally, path: Path, team: Team) -> None:
    moments = strata.subset(0)
    if not moments.tokens:
        raise UsageError(f"fit_subspace.source: {recipe.fit_subspace.source}: not one usable image")
    basis, scale, about = estimate(recipe, base, moments, team)
    metadata = {"method": recipe.fit_subspace.method, "base": recipe.base, "patch_size": base.patch_size}
    metadata |= {"patch_order": "c,ph,pw", "color_space": base.color_space, "recipe": dumps(recipe)}
    metadata |= {"images": moments.images, "tokens": moments.tokens, "vae_sha256": vae_digest(base)}
    stem = path.name.removesuffix(".safetensors")
    write_strata(path.with_name(f"{stem}.moments.safetensors"), strata, metadata)
    write_subspace(path, basis, scale, metadata)
    figures = describe(recipe, basis, scale, strata) | about
    if tally.seen:
        figures["source"] = tally.as_dict()
        for line in tally.lines():
            log(line)
    report.write(path, basis, figures)
    log(figures["verdict"])
    log(f"wrote {path} and {path.with_suffix('.html').name}")


def estimate(recipe: Recipe, base: Base, moments: Moments, team: Team) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The basis (D, r), its scale, and what to report about how they were found."""
    settings = recipe.fit_subspace
    if settings.method == "procrustes":
        return *solvers.procrustes(moments), {}
    if settings.method == "pca":
        return *solvers.pca(moments, settings.rank or base.latent_width, center=settings.center), {}
    if settings.method == "random":
        basis = solvers.haar(moments.width, moments.rank, Generator().manual_seed(recipe.seed))
        return basis, solvers.scale_of(basis, moments), {}
    if settings.jacobian == "smoothed":
        imagined = prior_moments(recipe, base, team.device)
        basis, scale = solvers.procrustes(imagined)
        about = {"imagined_tokens": imagined.tokens, "scale_of_prior": float(scale)}
        return basis, solvers.scale_of(basis, moments), about
    mean, about = mean_jacobian(recipe, base, team)
    basis = solvers.polar(mean)
    about["scale_of_prior"] = float(mean.norm()) / mean.shape[1] ** 0.5
    return basis, solvers.scale_of(basis, moments), about


def prior_moments(recipe: Recipe, base: Base, device: torch.device) -> Moments:
    """The sums over images that the VAE imagines: the smoothed Jacobian, without an image."""
    settings, generator = recipe.fit_subspace, Generator().manual_seed(recipe.seed)
    moments = Moments.zeros(base.token_width, base.latent_width, device)
    with bar("prior", settings.points, unit="images") as progress:
        for x, z in prior_pairs(base, settings.points, min(settings.batch, 64), generator, device):
            moments.add(x, z)
            progress.advance(len(x))
    return moments.to("cpu")


def mean_jacobian(recipe: Recipe, base: Base, team: Team) -> tuple[Tensor, dict[str, Any]]:
    """The decoder's mean self-block Jacobian (D, r) at the prior or at encoded images, and its figures."""
    settings, generator = recipe.fit_subspace, Generator().manual_seed(recipe.seed)
    side = prior_side(base)
    batches: Any
    if settings.linearise_at == "prior":
        sizes = [min(8, settings.points - first) for first in range(0, settings.points, 8)]
        batches = ((prior_latents(base, size, side, generator), (side, side)) for size in sizes)
    else:
        found = image_batches(base, recipe, Tally(settings.max_broken), Team(device=team.device))
        batches = ((base.encode(b.unit.to(team.device)), b.rgb.shape[-2:]) for b in found)
    total: Tensor | float = 0.0
    variance: Tensor | float = 0.0
    count = 0
    with bar("jacobian", settings.points, unit="points") as progress:
        for z, (height, width) in batches:
            z = z[: settings.points - count].to(team.device)
            grid = (height // base.patch_size, width // base.patch_size)

            def decode(latent: Tensor, height: int = height, width: int = width) -> Tensor:
                return decode_pixels(base, latent, height, width)

            for part in z.split(8):
                if settings.jacobian == "exact":
                    mean = jacobian.exact(decode, part, grid, stride=settings.colour_stride).cpu()
                else:
                    estimated = jacobian.stochastic(decode, part, settings.probes, generator)
                    mean = estimated.mean.cpu()
                    variance = variance + (len(part) * estimated.standard_error.cpu()) ** 2
                total, count = total + len(part) * mean, count + len(part)
                progress.advance(len(part))
            if count >= settings.points:
                break
    assert isinstance(total, Tensor)
    about: dict[str, Any] = {"jacobian_points": count}
    if isinstance(variance, Tensor):
        about["jacobian_relative_standard_error"] = float(variance.sum().sqrt() / total.norm())
    return total / count, about


def describe(recipe: Recipe, basis: Tensor, scale: Tensor, strata: Strata) -> dict[str, Any]:
    """Every figure of the report, from the sums alone."""
    settings, moments = recipe.fit_subspace, strata.subset(0)
    figures: dict[str, Any] = {"method": settings.method, "rank": basis.shape[1], "patch_dim": basis.shape[0]}
    figures |= {"images": moments.images, "tokens": moments.tokens}
    figures |= diagnostics.describe(basis, scale, moments)
    figures["recovery_identity_error"] = diagnostics.recovery_error(basis, scale)
    if settings.method == "pca":
        rank = basis.shape[1]
        figures |= diagnostics.stability(strata, lambda m: solvers.pca(m, rank, center=settings.center))
    elif settings.method == "procrustes":
        figures |= diagnostics.stability(strata, solvers.procrustes)
    else:
        figures["half_split_angle_deg"] = None
    figures["spectrum"] = diagnostics.spectrum(moments)
    figures["basis_energy"] = diagnostics.latent_energy(basis, moments)
    figures["verdict"] = report.verdict(figures)
    return figures
