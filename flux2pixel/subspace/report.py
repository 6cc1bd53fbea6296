"""What a fit leaves beside its basis: ``.json`` with every figure, two PNGs, and one HTML page that holds them all."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flux2pixel.asymflow import color
from flux2pixel.runtime import files
from flux2pixel.runtime.progress import log

# Residuals of bases whose conversions were looked at: 0.31 kept the colours of the latent model, 0.60 did not.
GOOD, DOUBTFUL = 0.4, 0.6
SHOWN_VECTORS = 64

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

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .15rem 1.2rem .15rem 0; }
th { font-weight: 400; } td { font-variant-numeric: tabular-nums; text-align: right; }
img { max-width: 100%; } .verdict { font-size: 1.15rem; } .vectors { image-rendering: pixelated; width: 100%; }
"""


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
        grade = "good"
    elif residual < DOUBTFUL:
        grade = "doubtful, expect shifted colours until finetuned"
    else:
        grade = "bad, its axes are not the latent's: not for conversion"
    line = f"subspace: {grade}. {name}: {figures['captured_energy']:.1%} of the energy captured, "
    line += f"alignment residual {residual:.3f}, scale {figures['scale']:.3f}"
    if name != "procrustes":
        line += f"; {figures['residual_over_procrustes']:.2f} times the residual of procrustes on the same images"
    return line + _stable(figures)


def _stable(figures: Mapping[str, Any]) -> str:
    if figures.get("held_out_residual") is None:
        return "" if figures["method"] not in ("procrustes", "pca") else "; too few images to tell how stable it is"
    excess = figures["held_out_residual"] / max(figures["halves_residual"], 1e-12) - 1
    if excess < 0.02:
        return f"; stable: a half's basis is {max(excess, 0):.1%} worse on the other half, more images change little"
    return f"; not stable yet: a half's basis is {excess:.1%} worse on the other half, fit on more images"


def write(path: Path, basis: Tensor, figures: Mapping[str, Any]) -> None:
    """Write the report of the subspace at ``path``: the same name with .json, .basis.png, .figures.png, .html.

    The charts need matplotlib; without it the page has the tables and the basis vectors.
    """
    stem = path.name.removesuffix(".safetensors")
    pictures = {"basis": basis_picture(basis)}
    charts = _charts(figures)
    if charts is not None:
        pictures["figures"] = charts
    for name, content in pictures.items():
        files.write(path.with_name(f"{stem}.{name}.png"), partial(_save, content))
    files.write(path.with_name(f"{stem}.html"), partial(_save, _page(figures, pictures).encode()))
    files.write_json(path.with_name(f"{stem}.json"), dict(figures))


def _save(content: bytes, path: Path) -> None:
    path.write_bytes(content)


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


def _charts(figures: Mapping[str, Any]) -> bytes | None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log("charts left out: matplotlib is not installed (pip install 'flux2pixel[train]')")
        return None
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    spectrum, cumulative, angles, residuals = figure.subplots(2, 2).flat
    values = np.array(figures["spectrum"])
    index = np.arange(1, len(values) + 1)
    spectrum.plot(index, values, label="eigenvectors of E[x xᵀ]")
    spectrum.plot(np.arange(1, 1 + figures["rank"]), sorted(figures["basis_energy"], reverse=True), label="this basis")
    spectrum.set(yscale="log", xscale="log", xlabel="direction, strongest first", ylabel="energy per token")
    cumulative.plot(index, np.cumsum(values) / values.sum(), label="best possible at each rank")
    cumulative.plot(figures["rank"], figures["captured_energy"], "o", label="this basis")
    cumulative.set(xscale="log", xlabel="rank", ylabel="captured share of the energy")
    rows = figures.get("by_images") or []
    count = [row["images"] for row in rows]
    angles.plot(count, [row["angle_deg"] for row in rows], "o-", label="largest")
    angles.plot(count, [row["mean_angle_deg"] for row in rows], "o-", label="mean")
    angles.set(xlabel="images", ylabel="angle to the basis of all images, degrees", ylim=(0, None))
    residuals.plot(count, [row.get("residual", np.nan) for row in rows], "o-", label="basis of a random part")
    residuals.set(xlabel="images", ylabel="alignment residual on all images")
    for axes in (spectrum, cumulative, angles, residuals):
        axes.grid(alpha=0.3)
        axes.legend()
    for axes in (angles, residuals):
        if len(rows) > 1:
            axes.set_xscale("log")
        elif not rows:
            axes.text(0.5, 0.5, "not measured for this method", ha="center", transform=axes.transAxes)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _page(figures: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    rows = "".join(
        f"<tr><th>{label}</th><td>{_number(figures[key])}</td></tr>"
        for key, label in _LABELS.items()
        if figures.get(key) is not None
    )
    images = {name: f"data:image/png;base64,{base64.b64encode(data).decode()}" for name, data in pictures.items()}
    charts = f'<h2>Charts</h2><img src="{images["figures"]}" alt="charts">' if "figures" in images else ""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Subspace</title>
<style>{_STYLE}</style>
<h1>Pixel-latent basis</h1>
<p class="verdict">{html.escape(figures["verdict"])}</p>
<table>{rows}</table>
{charts}
<h2>First basis vectors</h2>
<p>Each patch shows one column of A in its own colours, about mid grey.</p>
<img class="vectors" src="{images["basis"]}" alt="basis vectors">
{_images(figures.get("source"))}
</html>
"""


def _images(source: Mapping[str, Any] | None) -> str:
    if source is None:
        return ""
    lines = [f"<h2>Images</h2><p>{source['seen']} seen, {source['used']} used.</p>"]
    for kind, what in (("broken", "Unreadable, skipped"), ("dropped", "Dropped")):
        if source[kind]:
            shown = "".join(f"<li>{html.escape(f'{name}: {why}')}</li>" for name, why in source[kind][:100])
            lines.append(f"<p>{what}: {len(source[kind])}</p><ul>{shown}</ul>")
    return "".join(lines)


def _number(value: Any) -> str:
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))
