"""The weight-free fidelity measures over sets of images of any size, a few images in memory at a time.

    H x W  pixels, the same for all images of a set    p  the model's patch size    D = 3 p p

All are means over images of what `fidelity` measures on one, so a set is the mean of its images' summaries: the numbers
are those of `fidelity` on the whole stack, up to rounding, but that images over 512 pixels give fewer patches.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from flux2pixel.evaluate.fidelity import measures as fidelity
from flux2pixel.evaluate.fidelity.measures import QUANTISATION_POWER, frechet_distance, high_pass, unit
from flux2pixel.evaluate.suite import Rgb, batches

Array = NDArray[np.float64]
THREADS = 8  # each holds some 350 MB at 1024 pixels
LARGE = 512  # pixels of the short side from which patches are taken further apart
DIMS = 32  # principal components of the patch Fréchet distances


@dataclass(frozen=True)
class Summary:
    """What is kept of a set: every array a mean over its images, ``grains`` one value an image.

    ``spectrum`` (R,); ``steps`` (2,) across and off the borders of the patch grid; ``colour`` (2, 3) first and second
    moments; ``patches`` and ``texture`` (D + D D,) first and second moments of patches of pixels, and of their residual
    from a 3x3 box blur.
    """

    size: tuple[int, int]
    patch: int
    spectrum: Array
    steps: Array
    colour: Array
    patches: Array
    texture: Array
    grains: tuple[float, ...]


def summarise(images: Iterable[Rgb], patch: int) -> Summary:
    """Read a set of (H, W, 3) uint8 images through. Raises ValueError if it is empty or its images differ in size."""
    total: Summary | None = None
    grains: list[float] = []
    for one in _summaries(images, patch):
        grains += one.grains
        if total is None:
            total = one
            continue
        if one.size != total.size:
            raise ValueError(f"images differ in size: {one.size} and {total.size}")
        for sum_, term in zip(_means(total), _means(one), strict=True):
            sum_ += term
    if total is None:
        raise ValueError("no images to measure")
    for sum_ in _means(total):
        sum_ /= len(grains)
    return replace(total, grains=tuple(grains))


def _summaries(images: Iterable[Rgb], patch: int) -> Iterator[Summary]:
    """In order, some images at a time in threads: an image of 1024 pixels takes a core a second, outside Python."""
    workers = min(THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        for group in batches(images, workers):
            yield from pool.map(partial(_summary, patch=patch), group)


def _means(one: Summary) -> tuple[Array, ...]:
    return one.spectrum, one.steps, one.colour, one.patches, one.texture


def _summary(image: Rgb, patch: int) -> Summary:
    stack = image[None]
    pixels = unit(stack)
    flat = pixels.reshape(-1, 3)
    return Summary(
        (image.shape[0], image.shape[1]),
        patch,
        fidelity.radial_power_spectrum(stack),
        np.array([steps.mean() if steps.size else np.nan for steps in fidelity.border_steps(stack, patch)]),
        np.stack([flat.mean(0), (flat**2).mean(0)]),
        _moments(pixels, patch),
        _moments(high_pass(pixels), patch),
        (fidelity.grain(stack),),
    )


def _moments(pixels: Array, patch: int) -> Array:
    # A large image has patches to spare; one and a half patches apart they lie on and off the model's grid alike.
    stride = patch + patch // 2 if min(pixels.shape[1:3]) > LARGE else 0
    mean, cov = fidelity.patch_moments(pixels, patch, stride)
    return np.concatenate([mean, (cov + np.outer(mean, mean)).ravel()])


def _gaussian(moments: Array, patch: int) -> tuple[Array, Array]:
    width = 3 * patch * patch
    mean, second = moments[:width], moments[width:].reshape(width, width)
    return mean, second - np.outer(mean, mean)


def measure(ours: Summary, theirs: Summary) -> dict[str, float]:
    """Every measure of `fidelity.measure`, of one set against a reference of the same size and patch."""
    if (ours.size, ours.patch) != (theirs.size, theirs.patch):
        raise ValueError(f"images of {ours.size} and a reference of {theirs.size} cannot be compared")
    ratio = np.log10((ours.spectrum[1:] + QUANTISATION_POWER) / (theirs.spectrum[1:] + QUANTISATION_POWER))
    deviations = [np.sqrt((one.colour[1] - one.colour[0] ** 2).clip(min=0)) for one in (ours, theirs)]
    return {
        "patch_frechet": _frechet(ours.patches, theirs.patches, ours.patch),
        "texture_frechet": _frechet(ours.texture, theirs.texture, ours.patch),
        "spectrum_all": float(np.abs(ratio).mean()),
        "spectrum_high": float(ratio[len(ratio) // 2 :].mean()),
        **absolute(ours),
        "colour_mean_error": float(np.abs(ours.colour[0] - theirs.colour[0]).max()),
        "colour_std_error": float(np.abs(deviations[0] - deviations[1]).max()),
    }


def absolute(one: Summary) -> dict[str, float]:
    """The measures that need no reference; compare them with the reference's own."""
    across, elsewhere = one.steps
    return {
        "blockiness": float(across / elsewhere) if elsewhere else float("nan"),
        "grain": float(np.median(one.grains)),
    }


def _frechet(ours: Array, theirs: Array, patch: int) -> float:
    (mean_a, cov_a), (mean_b, cov_b) = _gaussian(ours, patch), _gaussian(theirs, patch)
    basis = np.linalg.eigh(cov_b)[1][:, ::-1][:, :DIMS]
    return frechet_distance(mean_a @ basis, basis.T @ cov_a @ basis, mean_b @ basis, basis.T @ cov_b @ basis)
