"""The fit-subspace stage: images -> sums -> basis, scale and figures -> ``subspace.safetensors``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Generator, Tensor

from flux2pixel import bases, files
from flux2pixel.asymflow import color, tokens
from flux2pixel.bases.base import Base
from flux2pixel.errors import UsageError
from flux2pixel.progress import bar, say
from flux2pixel.recipe import Recipe, dumps
from flux2pixel.subspace import diagnostics, estimators, source
from flux2pixel.subspace.file import write_subspace
from flux2pixel.subspace.moments import Moments

# Scenes beyond the miniature's own training set (seeds below 100 000).
FIRST_SCENE = 1_000_000


def fit_subspace(recipe: Recipe, run: Path, out: Path | None = None) -> Path:
    """Fit the basis that the recipe names; writes the subspace and ``subspace.json`` beside it, returns its path."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    settings = recipe.fit_subspace
    base = bases.open_base(recipe.base)
    say(f"fit-subspace: base {base.folder}, images {settings.source}")
    halves = _gather(base, recipe)
    moments = halves[0] + halves[1]
    if settings.rank and settings.method != "pca" and settings.rank != base.latent_width:
        raise UsageError(
            f"fit_subspace.rank: {settings.rank} is not the latent token width {base.latent_width}; only pca may differ"
        )
    basis, scale = _estimate(settings.method, moments, base, settings.rank or base.latent_width, recipe.seed)
    report = {"method": settings.method, "rank": basis.shape[1], "patch_dim": basis.shape[0]}
    report |= {"images": moments.images, "tokens": moments.tokens}
    if basis.shape[1] == base.latent_width:
        report |= diagnostics.describe(basis, scale, moments)
    report["half_split_angle_deg"] = _stability(halves, settings.method, base, basis.shape[1], recipe.seed)
    report["spectrum"] = diagnostics.spectrum(moments)
    path = out or run / "subspace.safetensors"
    metadata = {"method": settings.method, "base": recipe.base, "patch_size": base.patch_size}
    metadata |= {"patch_order": "c,ph,pw", "color_space": base.color_space, "recipe": dumps(recipe)}
    metadata |= {"images": moments.images, "tokens": moments.tokens}
    metadata["vae_sha256"] = files.digest(base.folder / "vae" / "diffusion_pytorch_model.safetensors")
    write_subspace(path, basis, scale, metadata)
    files.write_json(path.with_suffix(".json"), report)
    say(_verdict(report))
    say(f"wrote {path}")
    return path


def _batches(base: Base, recipe: Recipe) -> Iterator[Tensor]:
    settings = recipe.fit_subspace
    if settings.source == "scenes":
        return source.scenes(settings.images, settings.batch, FIRST_SCENE)
    return source.folder(Path(settings.source), settings.images, base.patch_size)


def _gather(base: Base, recipe: Recipe) -> tuple[Moments, Moments]:
    """Sums over the even and over the odd batches: together the fit, apart its stability."""
    width = 3 * base.patch_size**2
    halves = Moments.zeros(width, base.latent_width), Moments.zeros(width, base.latent_width)
    settings = recipe.fit_subspace
    total = settings.images
    if settings.source != "scenes":
        total = min(total, len(source.find_images(Path(settings.source))))
    with bar("fit-subspace", total) as progress:
        for index, rgb in enumerate(_batches(base, recipe)):
            halves[index % 2].add(tokens.patchify(color.encode(rgb), base.patch_size), base.encode(rgb))
            progress.advance(len(rgb))
    return halves


def _estimate(method: str, moments: Moments, base: Base, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    if method == "procrustes":
        return estimators.procrustes(moments)
    if method == "pca":
        return estimators.pca(moments, rank)
    if method == "random":
        return estimators.haar(moments, rank, Generator().manual_seed(seed))
    basis = estimators.polar(_jacobian(base))
    return basis, estimators.scale_of(basis, moments)


def _jacobian(base: Base) -> Tensor:
    """The smoothed decoder Jacobian at the VAE's prior, into Oklab tokens."""
    side = 4 * base.patch_size

    def decode(z: Tensor) -> Tensor:
        rgb = base.decode(z, side, side).clamp(0, 1)
        return tokens.patchify(color.encode(rgb), base.patch_size)

    return estimators.decoder_jacobian(decode, lambda: torch.randn(64, 16, base.latent_width))


def _stability(halves: tuple[Moments, Moments], method: str, base: Base, rank: int, seed: int) -> float | None:
    """The largest principal angle, in degrees, between bases fitted on the two halves; None if it cannot tell."""
    if method not in ("procrustes", "pca") or not halves[1].tokens:
        return None
    first, second = (_estimate(method, half, base, rank, seed)[0] for half in halves)
    return float(diagnostics.principal_angles(first, second).max())


def _verdict(report: dict) -> str:
    if "captured_energy" not in report:
        return f"subspace: {report['method']}, rank {report['rank']} differs from the latent's: not for conversion"
    return (
        f"subspace: {report['method']}, {report['captured_energy']:.1%} of the energy captured, "
        f"alignment residual {report['alignment_residual']:.3f}, scale {report['scale']:.3f}"
    )
