"""What a fit leaves beside its basis: ``.json`` with every figure, a PNG of it, and one HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flux2pixel.asymflow import color
from flux2pixel.runtime import files, page
from flux2pixel.runtime.page import Line, line_chart

# Residuals of bases whose conversions were looked at: 0.31 kept the colours of the latent model, 0.60 did not.
GOOD, DOUBTFUL = 0.4, 0.6
FEW = 10  # images below which a residual on them says nothing about others
SPANNED = 1e-9  # of the largest eigenvalue: directions below it are not in the images at all
UNSTABLE = 0.1  # excess of a half's basis on the other half above which more images are needed
SHOWN_VECTORS = 64
_LEFT_OUT = {"broken": "Unreadable, skipped", "dropped": "Dropped"}

_LABELS = {
    "method": "method",
    "rank": "rank r",
    "patch_dim": "pixel token width D",
    "images": "images",
    "tokens": "token pairs",
    "scale": "scale s",
    "captured_energy": "captured energy, tr(AᵀGA) / tr(G)",
    "complement_energy": "energy left in the complement",
    "alignment_residual": "alignment residual, ‖X − sAZ‖² / ‖X‖²",
    "procrustes_residual": "the same of procrustes on these images",
    "residual_over_procrustes": "ratio of the two",
    "linear_residual": "the same of the best linear map",
    "orthonormality_error": "largest entry of AᵀA − I",
    "recovery_identity_error": "residual-norm identity, relative error",
    "half_split_angle_deg": "largest angle between two halves, degrees",
    "half_split_mean_angle_deg": "mean angle between two halves, degrees",
    "halves_residual": "residual of a half's basis on its own half",
    "held_out_residual": "residual of a half's basis on the other half",
    "scale_of_prior": "scale without images",
    "jacobian_points": "latent images linearised at",
    "jacobian_relative_standard_error": "standard error of the Jacobian, relative",
}


def verdict(figures: Mapping[str, Any]) -> str:
    """One line in words: is this basis fit for a conversion, by how much, and would more images help."""
    name, rank = figures["method"], figures["rank"]
    if "alignment_residual" not in figures:
        return (
            f"subspace: {name} of rank {rank} keeps {figures['captured_energy']:.1%} of the energy; "
            "its rank differs from the latent's: not for conversion"
        )
    residual = figures["alignment_residual"]
    if residual < GOOD:
        unproven = _unproven(figures)
        grade = f"not proven: {unproven}" if unproven else "good"
    elif residual < DOUBTFUL:
        grade = "doubtful, expect shifted colours until finetuned"
    else:
        grade = "bad, its axes are not the latent's: not for conversion"
    line = f"subspace: {grade}. {name}: {figures['captured_energy']:.1%} of the energy captured, "
    line += f"alignment residual {residual:.3f}, scale {figures['scale']:.3f}"
    if name != "procrustes":
        line += f"; {figures['residual_over_procrustes']:.2f} times the residual of procrustes on the same images"
    return line + _stable(figures)


def _unproven(figures: Mapping[str, Any]) -> str:
    """Why a small residual on these images says little about others; empty where it does say something."""
    images, rank = figures["images"], figures["rank"]
    if images < FEW:
        return f"{images} image{'s are' if images != 1 else ' is'} too few to judge by, fit on {FEW} or more"
    spanned = sum(value > SPANNED * figures["spectrum"][0] for value in figures["spectrum"])
    if spanned < rank:
        return f"the images span {spanned} of the {rank} directions, fit on more varied ones"
    if (excess := _excess(figures)) is not None and excess > UNSTABLE:
        return f"a half's basis is {excess:.1%} worse on the other half, fit on more images"
    return ""


def _excess(figures: Mapping[str, Any]) -> float | None:
    """How much worse a half's basis is on the other half than on its own, relative; None if it was not measured."""
    if figures.get("held_out_residual") is None:
        return None
    return max(0.0, float(figures["held_out_residual"] / max(figures["halves_residual"], 1e-12) - 1))


def _stable(figures: Mapping[str, Any]) -> str:
    excess = _excess(figures)
    if excess is None:
        return "" if figures["method"] not in ("procrustes", "pca") else "; too few images to tell how stable it is"
    if excess < 0.02:
        return f"; stable: a half's basis is {excess:.1%} worse on the other half, more images change little"
    return f"; not stable yet: a half's basis is {excess:.1%} worse on the other half, fit on more images"


def write(path: Path, basis: Tensor, figures: Mapping[str, Any]) -> None:
    """Write the report of the subspace at ``path``: the same name with .json, .basis.png and .html."""
    stem = path.name.removesuffix(".safetensors")
    picture = basis_picture(basis)
    files.write(path.with_name(f"{stem}.basis.png"), lambda temporary: temporary.write_bytes(picture))
    files.write_json(path.with_name(f"{stem}.json"), dict(figures))
    source = figures.get("source") or {}
    page.write(
        path.with_name(f"{stem}.html"),
        Path(__file__).parent / "subspace.html",
        title="Pixel-latent basis",
        verdict=figures["verdict"],
        figures=[(label, figures[key]) for key, label in _LABELS.items() if figures.get(key) is not None],
        charts=_charts(figures),
        vectors="data:image/png;base64," + base64.b64encode(picture).decode("ascii"),
        source=source,
        left_out=[(what, source[key]) for key, what in _LEFT_OUT.items() if source.get(key)],
    )


def basis_picture(basis: Tensor) -> bytes:
    """The first basis vectors as patches in their own colours about mid grey, PNG bytes."""
    from PIL import Image

    side = round((basis.shape[0] / 3) ** 0.5)
    columns = basis.mT[:SHOWN_VECTORS].float()
    patches = 2 * columns / columns.abs().amax(1, keepdim=True)
    rgb = color.decode(patches.reshape(-1, 3, side, side)).permute(0, 2, 3, 1)
    tiles = torch.nn.functional.pad(rgb, (0, 0, 1, 1, 1, 1), value=1.0)
    missing = -len(tiles) % 16
    tiles = torch.cat([tiles, torch.ones(missing, *tiles.shape[1:])])
    sheet = tiles.reshape(-1, 16, side + 2, side + 2, 3).transpose(1, 2).reshape(-1, 16 * (side + 2), 3)
    zoom = max(1, 960 // sheet.shape[1])
    pixels = np.asarray((sheet * 255).round().byte()).repeat(zoom, 0).repeat(zoom, 1)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _charts(figures: Mapping[str, Any]) -> list[Any]:
    values, rank = figures["spectrum"], figures["rank"]
    energies = list(enumerate(values, 1)), list(enumerate(sorted(figures["basis_energy"], reverse=True), 1))
    shares = list(enumerate((np.cumsum(values) / np.sum(values)).tolist(), 1))
    rows = figures.get("by_images") or []

    def against(key: str) -> list[tuple[float, float]]:
        return [(row["images"], row[key]) for row in rows if row.get(key) is not None]

    angles = [Line(n, against(k), dots=True) for n, k in (("largest", "angle_deg"), ("mean", "mean_angle_deg"))]
    direction, images, captured = "direction, strongest first", "images", (rank, figures["captured_energy"])
    found = [
        line_chart([Line("eigenvectors of E[x xᵀ]", energies[0]), Line("this basis", energies[1])],
                   "Energy per token (log scales)", direction, x_log=True, y_log=True),
        line_chart([Line("best possible at each rank", shares), Line("this basis", [captured], dots=True)],
                   "Captured share of the energy", "rank", x_log=True),
        line_chart(angles, "Angle to the basis of all images, degrees", images, x_log=len(rows) > 1),
        line_chart([Line("basis of a random part", against("residual"), dots=True)],
                   "Alignment residual on all images", images, x_log=len(rows) > 1),
    ]  # fmt: skip
    return [chart for chart in found if chart]
