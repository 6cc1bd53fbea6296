"""Fidelity of images against true ones without a network: what separates a decoder's blur from texture.

Legend of shapes: n images, H x W pixels, 3 colours (RGB), P patches, D = patch * patch * 3.

Every function takes stacks ``(n, H, W, 3)`` uint8 and computes in float64 on pixels scaled to [0, 1].
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

Images = NDArray[np.uint8]
Array = NDArray[np.float64]

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
QUANTISATION_POWER = 1.0 / (12.0 * 255.0**2)  # variance of rounding to 8 bits: no power below it is measurable


def unit(images: Images) -> Array:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) == 0:
        raise ValueError(f"images: want a non-empty (n, H, W, 3) uint8 array, got {images.shape} {images.dtype}")
    return np.asarray(images / 255.0, dtype=np.float64)


def _luma(images: Images) -> Array:
    return np.asarray(unit(images) @ LUMA, dtype=np.float64)


def high_pass(pixels: Array) -> Array:
    """Pixels ``(n, H, W, ...)`` minus their 3x3 box blur (edges repeated)."""
    size = (1, 3, 3) + (1,) * (pixels.ndim - 3)
    return np.asarray(pixels - uniform_filter(pixels, size=size, mode="nearest"), dtype=np.float64)


def radial_power_spectrum(images: Images) -> Array:
    """Mean power of the luma at each integer radius of the 2-D spectrum.

    Images ``(n, H, W, 3)`` -> ``(R,)`` with ``R = min(H, W) // 2 + 1``; entry r is at r cycles per short side, in
    squared luma per frequency, so that white noise of variance v reads v everywhere. Each image has its mean removed
    and a Hann window applied: without the window the jump between opposite edges leaks over the high band.
    """
    luma = _luma(images)
    _, height, width = luma.shape
    window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[None, 1:-1]
    windowed = (luma - luma.mean(axis=(1, 2), keepdims=True)) * window
    power = (np.abs(np.fft.fft2(windowed)) ** 2).mean(axis=0) / (window**2).sum()
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


def spectrum_error(images: Images, reference: Images) -> dict[str, float]:
    """How far the radial power spectrum of ``images`` is from that of ``reference``, in decades (log10).

    ``all``: mean absolute log10 ratio over the radii >= 1, at best 0. ``high``: signed mean log10 ratio over the upper
    half of the radii; below 0 means blur, above 0 noise. Both spectra rest on the power of 8-bit rounding.
    """
    ours = radial_power_spectrum(images)[1:] + QUANTISATION_POWER
    theirs = radial_power_spectrum(reference)[1:] + QUANTISATION_POWER
    if ours.shape != theirs.shape:
        raise ValueError(f"images and reference differ in size: {images.shape[1:3]} and {reference.shape[1:3]}")
    ratio = np.log10(ours / theirs)
    return {"all": float(np.abs(ratio).mean()), "high": float(ratio[len(ratio) // 2 :].mean())}


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


def patch_moments(pixels: Array, patch: int, stride: int = 0) -> tuple[Array, Array]:
    """Mean ``(D,)`` and covariance ``(D, D)`` of the patches at a stride, 0: of half a patch."""
    if min(pixels.shape[1:3]) < patch:
        raise ValueError(f"images of {pixels.shape[1]}x{pixels.shape[2]} hold no {patch}x{patch} patch")
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (patch, patch), axis=(1, 2))
    stride = stride or max(1, patch // 2)
    rows = windows[:, ::stride, ::stride].reshape(-1, 3 * patch * patch)  # (P, D)
    mean = rows.mean(axis=0)
    centred = rows - mean
    return mean, centred.T @ centred / len(rows)


def _projected_frechet(pixels: Array, reference: Array, patch: int, dims: int) -> float:
    mean_a, cov_a = patch_moments(pixels, patch)
    mean_b, cov_b = patch_moments(reference, patch)
    basis = np.linalg.eigh(cov_b)[1][:, ::-1][:, :dims]  # (D, dims)
    # Moments of projections are projections of moments: no need to project every patch.
    return frechet_distance(mean_a @ basis, basis.T @ cov_a @ basis, mean_b @ basis, basis.T @ cov_b @ basis)


def patch_frechet(images: Images, reference: Images, patch: int = 8, dims: int = 32) -> dict[str, float]:
    """Fréchet distances between Gaussians fitted to patch features, in squared units of [0, 1] pixels; 0 is equal.

    Features are projections of ``patch`` x ``patch`` x 3 patches on the ``dims`` leading principal components of the
    reference's patches. ``patch_frechet`` takes the pixels, ``texture_frechet`` the residual of a 3x3 box blur, where
    a decoder's blur shows. FID's form (Heusel et al., 2017) with linear features: no network trained on photographs
    judges pictures of 32 pixels.
    """
    ours, theirs = unit(images), unit(reference)
    return {
        "patch_frechet": _projected_frechet(ours, theirs, patch, dims),
        "texture_frechet": _projected_frechet(high_pass(ours), high_pass(theirs), patch, dims),
    }


def border_steps(images: Images, patch: int) -> tuple[Array, Array]:
    """Absolute luma steps between neighbours: across the borders of a ``patch`` grid, and elsewhere; both flat."""
    luma = _luma(images)
    border: list[Array] = []
    inner: list[Array] = []
    for axis in (1, 2):
        steps = np.moveaxis(np.abs(np.diff(luma, axis=axis)), axis, 0)
        at_border = (np.arange(len(steps)) + 1) % patch == 0
        border.append(steps[at_border].ravel())
        inner.append(steps[~at_border].ravel())
    return np.concatenate(border), np.concatenate(inner)


def blockiness(images: Images, patch: int = 8) -> float:
    """Mean absolute luma step across the borders of a ``patch`` grid over that between other neighbours.

    1 means no visible grid. After the blocking measure of Wang, Sheikh and Bovik (2002). NaN for constant images.
    """
    across, elsewhere = border_steps(images, patch)
    if across.size == 0 or elsewhere.size == 0 or elsewhere.mean() == 0.0:
        return float("nan")
    return float(across.mean() / elsewhere.mean())


def grain(images: Images) -> float:
    """Median over images of the standard deviation of the luma minus its 3x3 box blur, in units of [0, 1] pixels."""
    return float(np.median(high_pass(_luma(images)).std(axis=(1, 2))))


def colour_moments(images: Images) -> dict[str, Array]:
    """``mean`` and ``std`` of each colour over all pixels, each ``(3,)`` in [0, 1]."""
    pixels = unit(images).reshape(-1, 3)
    return {"mean": pixels.mean(axis=0), "std": pixels.std(axis=0)}


def measure(images: Images, reference: Images) -> dict[str, float]:
    """Every measure of ``images`` against ``reference``, both ``(n, H, W, 3)`` uint8 (n may differ), by name.

    ``blockiness`` and ``grain`` are absolute: compare them with the same measure of the reference. The others are 0
    for equal sets; ``colour_mean_error`` and ``colour_std_error`` are the largest difference over the colours.
    """
    spectrum = spectrum_error(images, reference)
    ours, theirs = colour_moments(images), colour_moments(reference)
    return patch_frechet(images, reference) | {
        "spectrum_all": spectrum["all"],
        "spectrum_high": spectrum["high"],
        "blockiness": blockiness(images),
        "grain": grain(images),
        "colour_mean_error": float(np.abs(ours["mean"] - theirs["mean"]).max()),
        "colour_std_error": float(np.abs(ours["std"] - theirs["std"]).max()),
    }
