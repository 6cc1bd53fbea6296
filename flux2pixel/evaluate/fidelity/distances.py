"""Distances between sets of images by their features: FID, KID, precision and recall; PSNR of pairs.

    n, m  images of the two sets    d  feature width    p  the model's patch size    D = 3 p p

Features come from elsewhere (`patch_features`, or an Inception network); these are the measures alone, in float64.
torch-fidelity, which the tests compare them with, is an extra: the base install needs these without it, and KID's
subsets must be the same ones in every report.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flux2pixel.evaluate.fidelity.measures import frechet_distance, high_pass, patches, unit
from flux2pixel.evaluate.suite import Rgb

Array = NDArray[np.float64]
NEIGHBOURS = 3  # k of precision and recall
SUBSETS = 100  # of KID
SUBSET = 100  # images of each; the paper's 1000 where there are so many
ROWS = 1024  # distances are made in blocks of so many rows
COMPONENTS = 16  # of patches, in `patch_features`


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


def distances(ours: Array, theirs: Array) -> dict[str, float]:
    """All of the above, by name."""
    return {"fid": fid(ours, theirs), "kid": kid(ours, theirs)} | precision_recall(ours, theirs)


def patch_features(images: Sequence[Rgb], basis: Array, patch: int) -> Array:
    """One row an image of features for small pictures, (n, 4 k): no network trained on photographs judges 32 pixels.

    ``basis`` (D, k) are principal components of reference patches. A row holds the means and deviations over an image
    of its patches' coordinates, of the pixels and of the pixels minus their blur.
    """
    rows = []
    for image in images:
        layers = [patches(layer, patch) @ basis for layer in (unit(image), high_pass(unit(image)))]
        rows.append(np.concatenate([part for seen in layers for part in (seen.mean(0), seen.std(0))]))
    return np.stack(rows)


def psnr(ours: Rgb, theirs: Rgb) -> float:
    """Peak signal-to-noise ratio of two 8-bit images (H, W, 3) in dB; equal ones count as 100."""
    error = ((ours.astype(np.float64) - theirs) ** 2).mean()
    return float(np.minimum(100.0, 10 * np.log10(255.0**2 / np.maximum(error, 1e-12))))
