"""An analytic detector for the miniature's world: classical vision, no weights.

It answers what GenEval's Mask2Former and CLIP answer for photographs: boxes with class and score, and a colour.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy import ndimage

from flux2pixel.miniature import world

MIN_AREA = 24  # pixels; the smallest shape covers about 50
BLUR = 0.5  # pixels; takes the grain's edge off before thresholding
SHARPNESS = 100.0  # softmax slope on template agreement: true renders score above 0.9
Detection = tuple[float, float, float, float, float]


@cache
def _templates() -> np.ndarray:
    """Every class at sub-pixel offsets and both sizes, as 16 x 16 over its box: (classes, variants, 16, 16)."""
    found = []
    for kind in world.SHAPES:
        for radius in (5.4, 6.4):
            for dx, dy in np.ndindex(4, 4):
                alpha = world.coverage(world.Shape(kind, "red", 16 + dx / 4, 16 + dy / 4, radius))
                alpha = ndimage.gaussian_filter(alpha, BLUR)
                # An edge that halves a pixel may fall either way in a noisy image: hold all three outcomes.
                found += [_normalise(alpha, alpha > edge) for edge in (0.4, 0.5, 0.6)]
    return np.stack(found).reshape(len(world.SHAPES), -1, 16, 16)


def _normalise(alpha: np.ndarray, mask: np.ndarray) -> np.ndarray:
    rows, cols = np.nonzero(mask)
    y = np.linspace(rows.min(), rows.max(), 16)
    x = np.linspace(cols.min(), cols.max(), 16)
    return ndimage.map_coordinates(alpha.astype(np.float32), np.meshgrid(y, x, indexing="ij"), order=1)


def _background(image: np.ndarray) -> np.ndarray:
    """Fit a plane per channel to the background by trimmed least squares; (H, W, 3) -> (H, W, 3)."""
    h, w, _ = image.shape
    y, x = np.mgrid[0:h, 0:w]
    design = np.stack([np.ones(h * w), x.ravel() / w, y.ravel() / h], 1)
    pixels = image.reshape(-1, 3)
    # Start from the greyest two fifths: shapes are saturated or near white.
    spread = pixels.max(1) - pixels.min(1) + np.abs(pixels.mean(1) - 110) * 0.6
    keep = spread <= np.quantile(spread, 0.4)
    for _ in range(5):
        plane = np.linalg.lstsq(design[keep], pixels[keep], rcond=None)[0]
        residual = np.abs(pixels - design @ plane).max(1)
        keep = residual < max(24.0, 1.5 * float(np.median(residual[keep])))
    return (design @ plane).reshape(h, w, 3)


def detect(image: np.ndarray) -> dict[str, list[Detection]]:
    """Find the shapes in an (H, W, 3) uint8 image.

    Returns class name -> list of ``(x1, y1, x2, y2, score)``, one entry per class and component, scores before any
    threshold: the template softmax of a component over the four classes.
    """
    pixels = ndimage.gaussian_filter(image.astype(np.float32), (BLUR, BLUR, 0))
    distance = np.linalg.norm(pixels - _background(pixels), axis=2)
    labels, count = ndimage.label(distance > 48)
    found: dict[str, list[Detection]] = {}
    for index in range(1, count + 1):
        mask = labels == index
        if mask.sum() < MIN_AREA:
            continue
        level = float(np.quantile(distance[mask], 0.6))
        inside = mask & (distance > 0.5 * level)
        if inside.sum() < MIN_AREA:
            continue
        alpha = np.clip(distance / level, 0, 1) * mask
        seen = _normalise(alpha, inside)
        agreement = 1 - np.abs(seen - _templates()).mean((2, 3)).min(1)
        score = np.exp(SHARPNESS * (agreement - agreement.max()))
        score = score / score.sum() * np.clip((agreement.max() - 0.65) / 0.2, 0, 1)
        rows, cols = np.nonzero(inside)
        box = (float(cols.min()), float(rows.min()), float(cols.max()), float(rows.max()))
        for kind, value in zip(world.SHAPES, score, strict=True):
            if value > 0.05:
                found.setdefault(kind, []).append((*box, float(value)))
    return found


def classify_color(image: np.ndarray, box: tuple[float, ...]) -> str:
    """Name the colour of the object in ``box``: nearest palette colour to the median over its inner pixels."""
    x1, y1, x2, y2 = (round(v) for v in box[:4])
    crop = image[y1 : y2 + 1, x1 : x2 + 1].astype(np.float32)
    backdrop = _background(image.astype(np.float32))[y1 : y2 + 1, x1 : x2 + 1]
    distance = np.linalg.norm(crop - backdrop, axis=2)
    inner = crop[distance >= np.quantile(distance, 0.6)]
    median = np.median(inner, axis=0)
    names = list(world.COLORS)
    return names[int(np.argmin([np.sum((median - np.array(world.COLORS[n])) ** 2) for n in names]))]
