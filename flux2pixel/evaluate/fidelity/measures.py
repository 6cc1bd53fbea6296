"""Fidelity of a set of images against true ones without a network: what separates a decoder's blur from texture.

    H x W  pixels, the same for all images of a set    p  the model's patch size    D = 3 p p    R = min(H, W) // 2 + 1

Images are (H, W, 3) uint8, measured in float64 on pixels scaled to [0, 1]. A set is read once, a few images in memory
at a time, into a `Summary`: every measure is one of summaries.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from flux2pixel.evaluate.suite import Rgb, batches

Array = NDArray[np.float64]

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
QUANTISATION_POWER = 1.0 / (12.0 * 255.0**2)  # variance of rounding to 8 bits: no power below it is measurable
THREADS = 8  # each holds some 350 MB at 1024 pixels
LARGE = 512  # pixels of the short side from which patches are taken further apart
DIMS = 32  # principal components of the patch Fréchet distances


@dataclass(frozen=True)
class Summary:
    """What is kept of a set: every array a mean over its images, ``grains`` one value an image.

    ``spectrum`` (R,); ``steps`` (2, 2) first and second differences, across and off the borders of the patch grid;
    ``colour`` (2, 3) first and second moments; ``patches`` and ``texture`` (D + D D,) first and second moments of
    patches of pixels, and of their residual from a 3x3 box blur.
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
    """Read a set through. Raises ValueError if it is empty, or holds an image of another size, shape or type."""
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
    pixels = unit(image)
    luma = pixels @ LUMA
    flat = pixels.reshape(-1, 3)
    return Summary(
        (image.shape[0], image.shape[1]),
        patch,
        radial_power_spectrum(luma),
        np.array([border_steps(luma, patch, order) for order in (1, 2)]),
        np.stack([flat.mean(0), (flat**2).mean(0)]),
        _moments(pixels, patch),
        _moments(high_pass(pixels), patch),
        (float(high_pass(luma).std()),),
    )


def unit(image: Rgb) -> Array:
    """Pixels scaled to [0, 1]. Raises ValueError for anything but an (H, W, 3) uint8 array."""
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: want an (H, W, 3) uint8 array, got {image.shape} {image.dtype}")
    return np.asarray(image / 255.0, dtype=np.float64)


def high_pass(pixels: Array) -> Array:
    """Pixels (H, W) or (H, W, 3) minus their 3x3 box blur (edges repeated)."""
    size = (3, 3) + (1,) * (pixels.ndim - 2)
    return np.asarray(pixels - uniform_filter(pixels, size=size, mode="nearest"), dtype=np.float64)


def radial_power_spectrum(luma: Array) -> Array:
    """Power of the luma (H, W) at each integer radius of its 2-D spectrum, (R,).

    Entry r is at r cycles per short side, in squared luma per frequency, so that white noise of variance v reads v
    everywhere. The mean is removed and a Hann window applied: without it the jump between opposite edges leaks over
    the high band.
    """
    height, width = luma.shape
    window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[None, 1:-1]
    power = np.abs(np.fft.fft2((luma - luma.mean()) * window)) ** 2 / (window**2).sum()
    inside, index, counts = _rings(height, width)
    total = np.bincount(index, weights=power.ravel()[inside], minlength=len(counts))
    return np.asarray(total / counts, dtype=np.float64)


@lru_cache(maxsize=8)
def _rings(height: int, width: int) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """Which frequencies lie within a full ring, the ring of each of those, and how many each ring has."""
    short = min(height, width)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]) * short
    index = np.rint(radius).astype(np.int64).ravel()
    count = short // 2 + 1
    inside = index < count  # the corners of the square spectrum have no full ring
    return inside, index[inside], np.bincount(index[inside], minlength=count)


def border_steps(luma: Array, patch: int, order: int) -> tuple[float, float]:
    """Mean absolute differences of neighbours in the luma (H, W): across the borders of the patch grid, and elsewhere.

    ``order`` 1: steps between two pixels. 2: bends over three, across where the three lie on both sides of a border.
    NaN where there are none.
    """
    across: list[Array] = []
    inner: list[Array] = []
    for axis in (0, 1):
        steps = np.moveaxis(np.abs(np.diff(luma, n=order, axis=axis)), axis, 0)
        first = np.arange(len(steps))
        at_border = first // patch != (first + order) // patch
        across.append(steps[at_border].ravel())
        inner.append(steps[~at_border].ravel())
    found = [np.concatenate(parts) for parts in (across, inner)]
    return tuple(float(part.mean()) if part.size else float("nan") for part in found)  # type: ignore[return-value]


def _moments(pixels: Array, patch: int) -> Array:
    """First and second moments (D + D D,) of the patches of an image, half a patch apart."""
    if min(pixels.shape[:2]) < patch:
        raise ValueError(f"images of {pixels.shape[0]}x{pixels.shape[1]} hold no {patch}x{patch} patch")
    rows = patches(pixels, patch)
    mean = rows.mean(axis=0)
    centred = rows - mean
    return np.concatenate([mean, (centred.T @ centred / len(rows) + np.outer(mean, mean)).ravel()])


def patches(pixels: Array, patch: int) -> Array:
    """The patches of an image (H, W, 3) as rows (P, D), half a patch apart; of a large image, one and a half.

    A large image has patches to spare; one and a half apart they lie on and off the model's grid alike.
    """
    stride = patch + patch // 2 if min(pixels.shape[:2]) > LARGE else max(1, patch // 2)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (patch, patch), axis=(0, 1))
    return windows[::stride, ::stride].reshape(-1, 3 * patch * patch)


def gaussian(moments: Array, patch: int) -> tuple[Array, Array]:
    """Mean (D,) and covariance (D, D) from a summary's ``patches`` or ``texture``."""
    width = 3 * patch * patch
    mean, second = moments[:width], moments[width:].reshape(width, width)
    return mean, second - np.outer(mean, mean)


def leading(moments: Array, patch: int, count: int) -> Array:
    """The ``count`` leading principal components (D, count) of the patches of a set."""
    return np.asarray(np.linalg.eigh(gaussian(moments, patch)[1])[1][:, ::-1][:, :count], dtype=np.float64)


def frechet_distance(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians; means ``(d,)``, covariances ``(d, d)``.

    ``|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)`` (Dowson and Landau, 1982), the roots by eigendecomposition
    of symmetric matrices: exact where a Newton iteration fails on singular covariances.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    product = root_a @ cov_b @ root_a
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0.0)).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross
    return max(0.0, float(distance))


def _frechet(ours: Array, theirs: Array, patch: int) -> float:
    """Of patches projected on the reference's leading components: FID's form with linear features."""
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(ours, patch), gaussian(theirs, patch)
    basis = leading(theirs, patch, DIMS)
    # Moments of projections are projections of moments: no need to project every patch.
    return frechet_distance(mean_a @ basis, basis.T @ cov_a @ basis, mean_b @ basis, basis.T @ cov_b @ basis)


def measure(ours: Summary, theirs: Summary) -> dict[str, float]:
    """Every measure of a set against a reference of the same size and patch, by name.

    ``patch_frechet`` and ``texture_frechet``, squared units of [0, 1] pixels, 0 is equal: Fréchet distances of patches,
    and of their residual from a 3x3 box blur, where a decoder's blur shows. ``spectrum_all``: mean absolute log10 ratio
    of the spectra over the radii >= 1; ``spectrum_high``: signed, over the upper half of them; below 0 means blur,
    above 0 noise. ``colour_mean_error`` and ``colour_std_error``: the largest difference over the colours. Beside them
    all of `absolute`.
    """
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
    """The measures that need no reference; compare them with the reference's own.

    ``blockiness``: mean absolute luma step across the borders of the patch grid over that elsewhere; 1 means no visible
    grid (after Wang, Sheikh and Bovik, 2002). ``blockiness_second``: the same of second differences, as Iris-3B
    publishes it. ``high_band_share``: energy at the upper half of the radii of the spectrum over all but the mean's.
    ``grain``: median over images of the deviation of the luma minus its 3x3 box blur. NaN where they are not defined.
    """
    energy = (one.spectrum * _rings(*one.size)[2])[1:]
    total = energy.sum()
    first, second = (float(across / inner) if inner else float("nan") for across, inner in one.steps)
    return {
        "blockiness": first,
        "blockiness_second": second,
        "high_band_share": float(energy[len(energy) // 2 :].sum() / total) if total else float("nan"),
        "grain": float(np.median(one.grains)),
    }
