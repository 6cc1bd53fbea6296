"""Distances between sets of images by their features: FID, KID, precision and recall.

    n, m  images of the two sets    d  feature width

Features come from elsewhere (`patch_features`, or an Inception network); these are the measures alone, in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flux2pixel.evaluate.fidelity.measures import Images, frechet_distance, high_pass, unit

Array = NDArray[np.float64]
NEIGHBOURS = 3  # k of precision and recall
SUBSETS = 100  # of KID
SUBSET = 100  # images of each; the paper's 1000 where there are so many
ROWS = 1024  # distances are made in blocks of so many rows


def fid(ours: Array, theirs: Array) -> float:
    """Fréchet distance of Gaussians fitted to features (n, d) and (m, d) (Heusel et al., 2017).

    Biased by 1/n: compare only sets of the same size, and below 10 000 images only as a relative number.
    """
    return frechet_distance(ours.mean(0), np.cov(ours, rowvar=False), theirs.mean(0), np.cov(theirs, rowvar=False))


def kid(ours: Array, theirs: Array, seed: int = 0) -> float:
    """Kernel inception distance: squared MMD, unbiased, with the kernel (x.y / d + 1)^3 (Bińkowski et al., 2018).

    The mean over ``SUBSETS`` pairs of random subsets of up to 1000 images.
    """
    rng = np.random.default_rng(seed)
    size = min(1000, len(ours), len(theirs))
    size = size if size == 1000 else max(2, min(SUBSET, size))
    values = []
    for _ in range(SUBSETS):
        x = ours[rng.choice(len(ours), size, replace=False)]
        y = theirs[rng.choice(len(theirs), size, replace=False)]
        xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        values.append(within - 2 * xy.mean())
    return float(np.mean(values))


def _kernel(x: Array, y: Array) -> Array:
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3, dtype=np.float64)


def precision_recall(ours: Array, theirs: Array) -> dict[str, float]:
    """Share of ours within the reference's manifold, and of the reference within ours (Kynkäänniemi et al., 2019).

    A manifold is the union of balls to the third nearest neighbour. NaN for sets of three images or fewer.
    """
    if min(len(ours), len(theirs)) <= NEIGHBOURS:
        return {"precision": float("nan"), "recall": float("nan")}
    return {"precision": _covered(ours, theirs), "recall": _covered(theirs, ours)}


def _covered(points: Array, manifold: Array) -> float:
    radii = np.concatenate([
        np.partition(_squared(manifold[first : first + ROWS], manifold), NEIGHBOURS, axis=1)[:, NEIGHBOURS]
        for first in range(0, len(manifold), ROWS)
    ])  # fmt: skip
    inside = [
        (_squared(points[first : first + ROWS], manifold) <= radii).any(1) for first in range(0, len(points), ROWS)
    ]
    return float(np.concatenate(inside).mean())


def _squared(x: Array, y: Array) -> Array:
    return np.asarray((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T, dtype=np.float64).clip(min=0)


def patch_features(images: Images, basis: Array, patch: int = 8) -> Array:
    """One row an image of the miniature's own features, (n, 4 k): no network trained on photographs judges 32 pixels.

    ``basis`` (3 patch patch, k) are principal components of reference patches. A row holds the means and deviations
    over an image of its patches' coordinates, of the pixels and of the pixels minus their blur.
    """
    pixels = unit(images)
    parts = []
    for layer in (pixels, high_pass(pixels)):
        windows = np.lib.stride_tricks.sliding_window_view(layer, (patch, patch), axis=(1, 2))[
            :, :: patch // 2, :: patch // 2
        ]
        rows = windows.reshape(len(images), -1, 3 * patch * patch) @ basis
        parts += [rows.mean(1), rows.std(1)]
    return np.concatenate(parts, axis=1)


def patch_basis(reference: Images, count: int = 16, patch: int = 8) -> Array:
    """The ``count`` leading principal components (3 patch patch, count) of a reference's patches."""
    pixels = unit(reference)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (patch, patch), axis=(1, 2))[
        :, :: patch // 2, :: patch // 2
    ]
    rows = windows.reshape(-1, 3 * patch * patch)
    return np.asarray(np.linalg.eigh(np.cov(rows, rowvar=False))[1][:, ::-1][:, :count], dtype=np.float64)


def distances(ours: Array, theirs: Array) -> dict[str, float]:
    """All of the above, by name."""
    return {"fid": fid(ours, theirs), "kid": kid(ours, theirs)} | precision_recall(ours, theirs)


def psnr(ours: Images, theirs: Images) -> float:
    """Mean over pairs of the peak signal-to-noise ratio in dB, 8-bit images (n, H, W, 3); equal pairs count as 100."""
    errors = ((ours.astype(np.float64) - theirs) ** 2).mean(axis=(1, 2, 3))
    return float(np.minimum(100.0, 10 * np.log10(255.0**2 / np.maximum(errors, 1e-12))).mean())
