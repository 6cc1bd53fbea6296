"""Two bases side by side, as text."""

from __future__ import annotations

from pathlib import Path

import torch

from flux2pixel.runtime.errors import UsageError
from flux2pixel.subspace.diagnostics import principal_angles
from flux2pixel.weights.subspace import read_subspace

_NAMES = ("least", "quarter", "median", "three quarters", "largest")


def compare(first: Path, second: Path) -> str:
    """The principal angles between two bases, how far their axes are apart, and their scales, as text.

    Raises UsageError if their pixel tokens differ in width.
    """
    (a, _), (b, _) = (read_subspace(path) for path in (first, second))
    shapes = tuple(a.basis.shape), tuple(b.basis.shape)
    if shapes[0][0] != shapes[1][0]:
        raise UsageError(f"{first} and {second}: token widths {shapes[0][0]} and {shapes[1][0]} cannot be compared")
    angles = principal_angles(*sorted((a.basis.double(), b.basis.double()), key=lambda basis: -basis.shape[1]))
    lines = [f"{path}: {shape[0]} x {shape[1]}" for path, shape in zip((first, second), shapes, strict=True)]
    quantiles = angles.quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)).tolist()
    lines.append(
        "principal angles, degrees: " + "  ".join(f"{name} {q:.3g}" for name, q in zip(_NAMES, quantiles, strict=True))
    )
    if shapes[0] == shapes[1]:
        cosines = (a.basis.double() * b.basis.double()).sum(0)
        lines.append(f"cosine of each axis with its namesake: mean {cosines.mean():.4f}, least {cosines.min():.4f}")
    lines.append(f"scale: {float(a.scale):.5g} and {float(b.scale):.5g}, ratio {float(a.scale / b.scale):.5g}")
    return "\n".join(lines)
