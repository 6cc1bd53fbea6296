"""Closed forms: the four parts of a readout from its sums, all in float64.

x  pixel tokens (D,)    z  latents (r,)    h  features (C,)    f  local features (F,)    P = A A^T

1  W_c = argmin sum w ||(I - P)(x - c) - W_c h||^2 + ridge       (D, C)     detail head
2  c   = E[x] - s A E[z]                                         (D,)       offset
3  S   = E[e e^T], e = (I - P)(x - c) - W_c h                    (D, D)     covariance of the texture
4  R   = argmin sum ||x - c - s A z_hat - f R||^2 + ridge        (F, D)     last step; the penalty is on R less W_c

Every error is a quadratic form: a linear prediction is one matrix B on the row u = [f, z_hat, x, h, ...] of a gram G,
and sum ||u B||^2 = tr(B^T G B).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.readout.sums import BINS, Gram, Sums

SMALLEST = 1e-6  # of the texture's largest variance; directions below it are left out


@dataclass(frozen=True)
class Fit:
    """What was fitted, float64; None or zero where a part was not asked for.

    ``head`` W_c (D, C), ``offset`` c (D,), ``directions`` (D, q) and ``variance`` (q,) of S, ``last`` R (F, D),
    ``transport`` (q, D) from the texture as sampling ends to what is left over at the last step.
    """

    head: Tensor
    offset: Tensor
    directions: Tensor | None = None
    variance: Tensor | None = None
    last: Tensor | None = None
    transport: Tensor | None = None


def ridge(gram: Tensor, cross: Tensor, strength: float) -> Tensor:
    """argmin ||f R - y||^2 + ridge, (F, D): the penalty is ``strength`` times the mean square of the features."""
    penalty = strength * gram.diagonal().mean().clamp(min=1e-300)
    return torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), cross)


def outside(basis: Tensor, x: Tensor) -> Tensor:
    """(I - P) x of rows (..., D)."""
    return x - (x @ basis) @ basis.mT


def fit_offset(sums: Sums, flow: AsymFlow) -> Tensor:
    """Part 2: c (D,), what the mean of the images is off the mean of their latents' low-rank images."""
    grams = [gram for name, gram in sums.grams.items() if name.startswith("fit.level")]
    tokens = sum(gram.tokens for gram in grams)
    x, z = (sum(gram.get("one", block)[0] for gram in grams) / tokens for block in ("x", "z"))
    return x - flow.scale * flow.basis @ z


def fit_head(sums: Sums, flow: AsymFlow, offset: Tensor, levels: float, strength: float) -> Tensor:
    """Part 1: W_c (D, C) over the noise levels up to ``levels``, each bin by its tokens, and the last level."""
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    for name, part in sums.grams.items():
        if name == "fit.last":
            ones = part.get("f", "h")[_constant(sums, part)]
        elif name.startswith("fit.level") and BINS[int(name[9:])] < levels:
            ones = part.get("one", "h")[0]
        else:
            continue
        gram = gram + part.get("h", "h")
        cross = cross + part.get("h", "x") - torch.outer(ones, offset)
    return outside(flow.basis, ridge(gram, cross, strength)).mT  # type: ignore[arg-type]


def fit(sums: Sums, flow: AsymFlow, parts: tuple[str, ...], levels: float, strength: float) -> Fit:
    """Solve for the ``parts`` asked for."""
    wide = flow.to(torch.float64)
    gram, held = sums.grams["fit.last"], sums.grams["held.last"]
    offset = fit_offset(sums, wide) if "offset" in parts else torch.zeros(sums.width, dtype=torch.float64)
    head = torch.zeros(sums.width, sums.channels, dtype=torch.float64)
    if "head" in parts:
        head = fit_head(sums, wide, offset, levels, strength)
    found = Fit(head, offset)
    last = None
    if "last" in parts:
        start = centred(sums, gram, head)
        error = residual(sums, gram, wide, Fit(head, offset, last=start))
        last = start + ridge(gram.get("f", "f"), _rows(gram, "f") @ error, strength)
        found = Fit(head, offset, last=last)
    if "prior" not in parts:
        return found
    # Held-out images tell what a fit leaves over without its own optimism; both sets are the images that were given.
    before = covariance(sums, held, wide, Fit(head, offset))
    after = covariance(sums, held, wide, found)
    texture = outside(wide.basis, outside(wide.basis, before).mT)
    variance, directions = torch.linalg.eigh((texture + texture.mT) / 2)
    kept = variance > SMALLEST * variance.max()
    variance, directions = variance[kept], directions[:, kept]
    return Fit(head, offset, directions, variance, last, transport(directions, variance, after))


def centred(sums: Sums, gram: Gram, head: Tensor) -> Tensor:
    """The detail head W_c (D, C) as a last step (F, D): on the token's own features, and none of its neighbours'."""
    seen = head.mT if sums.directions is None else (head @ sums.directions).mT
    area, last = sums.window**2, torch.zeros(gram.widths[0][1], len(head), dtype=head.dtype)
    last[area // 2 : len(seen) * area : area] = seen
    return last


def transport(directions: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """The map (q, D) that takes texture of covariance diag(variance) along Q to the covariance ``target`` (D, D).

    Among the maps that do so within the span of Q it moves the texture least (optimal transport of Gaussians); what of
    the target lies outside is then predicted from what lies within.
    """
    within = directions.mT @ target @ directions
    root = variance.sqrt()
    values, vectors = torch.linalg.eigh(root[:, None] * within * root)
    middle = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    moved = middle / root[:, None] / root
    lift = torch.linalg.solve(
        within + 1e-9 * within.diagonal().mean() * torch.eye(len(within)).to(within), (directions.mT @ target)
    )
    return moved @ lift


def _constant(sums: Sums, gram: Gram) -> int:
    """The place, in f, of the token's own constant one."""
    area = sums.window**2
    return gram.widths[0][1] - area + area // 2


def residual(sums: Sums, gram: Gram, flow: AsymFlow, found: Fit, parts: tuple[str, ...] = ("head", "last")) -> Tensor:
    """B (W, D) with u B the error x - c - s A z_hat - W_c h, or with a last step x - c - s A z_hat - f R.

    u is a row of a gram at the last level; ``parts`` are those that take part.
    """
    width = gram.widths[0][1]
    matrix = torch.zeros(len(gram.upper), sums.width, dtype=torch.float64)
    matrix[gram.span("x")] = torch.eye(sums.width, dtype=torch.float64)
    matrix[gram.span("z_hat")] = -(flow.scale * flow.basis).mT
    if found.last is not None and "last" in parts:
        matrix[:width] = -found.last
    elif "head" in parts:
        matrix[gram.span("h")] = -found.head.mT
    matrix[_constant(sums, gram)] -= found.offset
    return matrix


def _rows(gram: Gram, name: str) -> Tensor:
    """sum a u^T of a block with the whole row, (width of a, W)."""
    return torch.cat([gram.get(name, other) for other, _ in gram.widths], 1)


def covariance(sums: Sums, gram: Gram, flow: AsymFlow, found: Fit, parts: tuple[str, ...] = ("head", "last")) -> Tensor:
    """E[e e^T] (D, D) of the error that a fit leaves over."""
    matrix = residual(sums, gram, flow, found, parts)
    whole = gram.upper.triu() + gram.upper.triu(1).mT
    return matrix.mT @ whole @ matrix / max(gram.tokens, 1)
