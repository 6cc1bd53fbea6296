"""The miniature's true renders: what its models are compared with, and what a perfect model would score."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import numpy as np
import torch

from flux2pixel.evaluate.fidelity import distances as features
from flux2pixel.evaluate.fidelity.measures import measure
from flux2pixel.evaluate.geneval.verdict import judge
from flux2pixel.evaluate.suite import Sample, read_rgb
from flux2pixel.miniature import detector, world
from flux2pixel.models import base as bases

FIRST_REFERENCE = 3_000_000  # true renders that the fidelity measures compare with
FIRST_CEILING = 4_000_000  # other true renders: what a perfect model would score
VAE_BATCH = 120


def renders(posed: Sequence[dict], count: int, start: int) -> np.ndarray:
    """``count`` scenes of the posed prompts in turn, (n, H, W, 3) uint8."""
    drawn = [world.sample(start + i, metadata=posed[i % len(posed)], held_out=frozenset()).image for i in range(count)]
    return np.stack(drawn)


def _color(image: np.ndarray, _: str, box: tuple[float, ...]) -> str:
    return detector.classify_color(image, box)


def detector_ceiling(posed: Sequence[dict]) -> float:
    """GenEval of four true renders a prompt: the mean over tags that the detector itself allows."""
    shares: dict[str, list[float]] = {}
    for place, metadata in enumerate(posed):
        for sample in range(4):
            start = FIRST_CEILING + 10 * place + sample
            image = world.sample(start, metadata=metadata, held_out=frozenset()).image
            verdict = judge(metadata, detector.detect(image), partial(_color, image))
            shares.setdefault(metadata["tag"], []).append(float(verdict.correct))
    return float(np.mean([np.mean(rows) for rows in shares.values()]))


def through_vae(base: str, images: np.ndarray) -> np.ndarray:
    """The base VAE's reconstruction of (n, H, W, 3) uint8 images: the ceiling of anything latent."""
    from flux2pixel.models.model import to_bytes

    opened = bases.open_base(base)
    rgb = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        parts = [opened.decode(opened.encode(part), *images.shape[1:3]) for part in rgb.split(VAE_BATCH)]
    return to_bytes(torch.cat(parts))


class Truth:
    """``count`` true renders of the posed prompts, drawn when first needed, to measure images against."""

    def __init__(self, posed: Sequence[dict], count: int):
        self._posed, self._count = posed, count

    @cached_property
    def _reference(self) -> np.ndarray:
        return renders(self._posed, self._count, FIRST_REFERENCE)

    @cached_property
    def _basis(self) -> np.ndarray:
        return features.patch_basis(self._reference)

    @cached_property
    def _features(self) -> np.ndarray:
        return features.patch_features(self._reference, self._basis)

    def _measure(self, images: np.ndarray) -> dict[str, float]:
        ours = features.patch_features(images, self._basis)
        return measure(images, self._reference) | features.distances(ours, self._features)

    def measure(self, samples: Sequence[Sample], pairs: Sequence[Sample] = ()) -> dict[str, float]:
        """Fidelity of the samples; with ``pairs``, another model's for the same prompts and seeds, the PSNR too."""
        images = _pixels(samples)
        found = self._measure(images)
        return found | ({"psnr_to_first": features.psnr(images, _pixels(pairs))} if pairs else {})

    def ceilings(self, base: str) -> dict[str, dict[str, float]]:
        """Fidelity of other true renders, and of the base VAE's reconstruction of them with its PSNR."""
        real = renders(self._posed, self._count, FIRST_CEILING)
        rebuilt = through_vae(base, real)
        vae = self._measure(rebuilt) | {"psnr_reconstruction": features.psnr(rebuilt, real)}
        return {"real": self._measure(real), "vae": vae}


def _pixels(samples: Sequence[Sample]) -> np.ndarray:
    return np.stack([read_rgb(sample) for sample in samples])
