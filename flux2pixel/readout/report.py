"""What a fit found, in figures, as a table, and in words."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.readout.solve import Fit, covariance, outside, ridge
from flux2pixel.readout.sums import BINS, Sums

ENOUGH = 0.5  # dB to the VAE's own reconstruction: within it a readout is as good as the base's decoder


def figures(sums: Sums, flow: AsymFlow, found: Fit) -> dict[str, Any]:
    """Every figure of the report, from the sums alone, in the pixel space's own units."""
    wide = flow.to(torch.float64)
    held = sums.grams["held.last"]
    rows: dict[str, float] = {}

    def error(parts: tuple[str, ...], fit: Fit) -> float:
        return float(covariance(sums, held, wide, fit, parts).trace())

    plain = Fit(found.head, torch.zeros_like(found.offset), last=found.last)
    rows["subspace alone"] = error((), plain)
    rows["+ offset"] = error((), found)
    rows["+ head"] = error(("head",), found)
    if found.last is not None:
        rows["+ last step"] = error(("head", "last"), found)
    rows["any linear map of the features"] = best_linear(sums)
    if sums.vae[1] > 0:
        rows["the VAE's reconstruction"] = float(sums.vae[0] / sums.vae[1])
    energy = covariance(sums, held, wide, found, ("head",))
    after = covariance(sums, held, wide, found)
    spectrum = torch.linalg.eigvalsh(outside(wide.basis, outside(wide.basis, energy).mT)).flip(0).clamp(min=0)
    ladder = [{"what": what, "error": value, "psnr": psnr(value, sums.width)} for what, value in rows.items()]
    return {
        "images": sums.images,
        "tokens": sum(gram.tokens for name, gram in sums.grams.items() if name.endswith("last")),
        "held_out_images": held.images,
        "explained": explained(sums, wide, found),
        "ladder": ladder,
        "error_inside": float(((after @ wide.basis) * wide.basis).sum()),
        "error_outside": float(after.trace() - ((after @ wide.basis) * wide.basis).sum()),
        "texture_spectrum": spectrum.tolist(),
        "overfit": overfit(sums, wide, found),
    }


def psnr(error: float, width: int) -> float:
    """dB of a squared error per token: the pixel space has unit spread, so a peak of 6, +-3, is assumed."""
    return 10 * math.log10(36 * width / max(error, 1e-300))


def explained(sums: Sums, flow: AsymFlow, found: Fit) -> list[dict[str, float]]:
    """Share of the complement's held-out energy that the head explains, by noise level."""
    rows = []
    for name, gram in sorted(sums.grams.items()):
        if not name.startswith("held.level") or not gram.tokens:
            continue
        shift = torch.outer(gram.get("one", "x")[0], found.offset)
        whole = gram.get("x", "x") - shift - shift.mT + gram.tokens * torch.outer(found.offset, found.offset)
        energy = outside(flow.basis, outside(flow.basis, whole).mT).trace()
        cross = gram.get("h", "x") - torch.outer(gram.get("one", "h")[0], found.offset)
        left = energy - 2 * (found.head.mT * cross).sum() + ((found.head @ gram.get("h", "h")) * found.head).sum()
        number = int(name[10:])
        rows.append({"from": BINS[number], "to": BINS[number + 1], "share": float(1 - left / energy)})
    return rows


def best_linear(sums: Sums) -> float:
    """Held-out squared error of the best linear map of f at all, fitted without a ridge on the fitted images."""
    fit, held = sums.grams["fit.last"], sums.grams["held.last"]
    matrix = ridge(fit.get("f", "f"), fit.get("f", "x"), 1e-9)
    left = held.get("x", "x").trace() - 2 * (matrix * held.get("f", "x")).sum()
    return float(left + ((held.get("f", "f") @ matrix) * matrix).sum()) / held.tokens


def overfit(sums: Sums, flow: AsymFlow, found: Fit) -> float:
    """Held-out error over fitted error at the last level: far above 1, there were too few images."""
    grams = (sums.grams["fit.last"], sums.grams["held.last"])
    fitted, held = (float(covariance(sums, gram, flow, found).trace()) for gram in grams)
    return held / max(fitted, 1e-300)


def verdict(found: dict[str, Any]) -> str:
    """Is a readout enough here, in one sentence."""
    rows = {row["what"]: row["psnr"] for row in found["ladder"]}
    best = rows.get("+ last step", rows["+ head"])
    gain, ceiling = best - rows["subspace alone"], rows.get("the VAE's reconstruction")
    words = f"readout: {gain:+.1f} dB over the subspace alone on held-out images at the last noise level"
    if ceiling is None:
        return words
    short = ceiling - best
    if short < ENOUGH:
        return f"{words}, {-short:+.1f} dB to the VAE's own reconstruction: enough, unless the base itself is not"
    return f"{words}, {short:.1f} dB short of the VAE's own reconstruction: finetuning is worth its price"


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown that reads well as text."""
    lines = [f"# Readout: {', '.join(found['parts'])}", "", found["verdict"], ""]
    lines += ["| held-out images, last noise level | squared error a token | dB |", "|---|---|---|"]
    lines += [f"| {row['what']} | {row['error']:.3f} | {row['psnr']:.2f} |" for row in found["ladder"]]
    lines += ["", "| noise level | complement explained by the head |", "|---|---|"]
    lines += [f"| {row['from']:g} to {row['to']:g} | {row['share']:.1%} |" for row in found["explained"]]
    lines += ["", "| patch-grid ratio | first differences | second differences |", "|---|---|---|"]
    lines += [f"| {row['what']} | {row['first']:.3f} | {row['second']:.3f} |" for row in found.get("grid", [])]
    lines += ["", f"{found['images']} images, {found['held_out_images']} of them held out; held-out error over fitted "]
    lines[-1] += f"error {found['overfit']:.3f}."
    return "\n".join(lines) + "\n"


def grid_ratio(images: Tensor, patch: int, order: int) -> float:
    """Mean absolute ``order``-th luma difference across the patch grid's borders over that elsewhere, (B, 3, H, W).

    1 is no visible grid; second differences are what Iris-3B (arXiv 2610.09450) publishes.
    """
    luma = (images * torch.tensor([0.299, 0.587, 0.114]).to(images).view(3, 1, 1)).sum(1)
    across, elsewhere = [], []
    for axis in (1, 2):
        steps = luma.diff(n=order, dim=axis).abs().movedim(axis, 0)
        place = torch.arange(len(steps))
        border = ((place + 1) % patch == 0) if order == 1 else ((place + 1) % patch == 0) | ((place + 2) % patch == 0)
        across.append(steps[border].flatten())
        elsewhere.append(steps[~border].flatten())
    if not torch.cat(across).numel() or not float(torch.cat(elsewhere).sum()):
        return float("nan")
    return float(torch.cat(across).mean() / torch.cat(elsewhere).mean())
