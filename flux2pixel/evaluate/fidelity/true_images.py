"""Fidelity to a folder of true images of any size, read one by one, with the networks whose weights are there.

n  images    d  feature width    p  the model's patch size
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from flux2pixel.data import Unreadable, open_source
from flux2pixel.data.buckets import Placement, fit
from flux2pixel.data.decode import decode, read_bytes
from flux2pixel.evaluate.fidelity import distances as features
from flux2pixel.evaluate.fidelity import streamed
from flux2pixel.evaluate.fidelity.networks import Distance, Features, Networks
from flux2pixel.evaluate.suite import Rgb, Sample, batches, read_rgb
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.progress import bar, log

BATCH = 16
CROPS = 4  # of each image, for patch-FID
CROP = 299  # pixels: Inception's own input, so that nothing is resampled


def crops(image: Rgb, seed: int) -> list[Rgb]:
    """``CROPS`` squares of up to 299 pixels, at most half the short side, placed by ``seed`` alone."""
    height, width = image.shape[:2]
    side = max(1, min(CROP, min(height, width) // 2))
    rng = np.random.default_rng([299, seed])
    corners = rng.integers(0, (height - side + 1, width - side + 1), (CROPS, 2))
    return [image[top : top + side, left : left + side] for top, left in corners]


class TrueImages:
    """The first ``count`` usable images of a source (a folder, or anything `open_source` reads), cropped to a size.

    Images are scaled down and cut at the centre to ``size`` (width, height). Smaller ones are left out and counted:
    scaled up they would pass blur for truth. Raises UsageError if the source is not there or fewer than two are left.
    """

    def __init__(self, spec: str, count: int, size: tuple[int, int]):
        self.spec, self.count, self.size = spec, count, size
        self._source = open_source(spec)

    def __iter__(self) -> Iterator[Rgb]:
        return (image for _, image in self._usable())

    def _usable(self) -> Iterator[tuple[str, Rgb]]:
        width, height = self.size
        left = 0
        for record in self._source.records():
            if left == self.count:
                return
            try:
                if isinstance(record.content, Unreadable):
                    raise record.content
                content, digest = read_bytes(record.content)
                picture = decode(content)
            except Unreadable:
                continue
            scale = max(width / picture.width, height / picture.height)
            if scale <= 1:
                left += 1
                yield digest, fit(picture, Placement((height, width), scale, 0.0))

    @cached_property
    def digest(self) -> str:
        """Digest of the images used and their size."""
        found = [digest for digest, _ in self._usable()]
        if len(found) < 2:
            raise UsageError(
                f"reference {self.spec}: holds {len(found)} readable images of at least "
                f"{self.size[0]}x{self.size[1]} pixels; fidelity needs 2, and FID thousands"
            )
        if len(found) < self.count:
            log(f"reference {self.spec}: {len(found)} usable images, {self.count} asked for (eval.fidelity_images)")
        return hashlib.sha256(" ".join([*found, str(self.size)]).encode()).hexdigest()


class TrueSet:
    """A reference opened: its summary and features are computed once, when first needed."""

    def __init__(self, images: TrueImages, patch: int, networks: Callable[[], Networks]):
        self._images, self._patch, self._open = images, patch, networks

    @cached_property
    def _networks(self) -> Networks:
        return self._open()

    @cached_property
    def _truth(self) -> tuple[streamed.Summary, dict[str, Features]]:
        return self._read("reference", self._images, self._images.count)

    def _read(self, what: str, images: Iterable[Rgb], count: int) -> tuple[streamed.Summary, dict[str, Features]]:
        """Summary and features (n, d) of a set, read once."""
        rows: dict[str, list[Features]] = {"fid": [], "patch_fid": []}
        extract = self._networks.inception

        def through() -> Iterator[Rgb]:
            seen = 0
            with bar(f"fidelity {what}", count, unit="images") as progress:
                for group in batches(images, BATCH):
                    if extract is not None:
                        rows["fid"].append(extract(group))
                        parts = [crop for i, image in enumerate(group) for crop in crops(image, seen + i)]
                        rows["patch_fid"] += [extract(part) for part in batches(parts, BATCH)]
                    seen += len(group)
                    yield from group
                    progress.advance(len(group))

        summary = streamed.summarise(through(), self._patch)
        return summary, {name: np.concatenate(found) for name, found in rows.items() if found}

    def _compare(self, what: str, images: Iterable[Rgb], count: int) -> dict[str, float]:
        summary, seen = self._read(what, images, count)
        truth, known = self._truth
        found = streamed.measure(summary, truth)
        if seen:
            found |= {f"inception_{k}": v for k, v in features.distances(seen["fid"], known["fid"]).items()}
            found["patch_fid"] = features.fid(seen["patch_fid"], known["patch_fid"])
        return found

    def measure(self, name: str, samples: Sequence[Sample], pairs: Sequence[Sample] = ()) -> dict[str, float]:
        """Fidelity of the samples; with ``pairs``, another model's for the same prompts and seeds, PSNR and LPIPS."""
        found = self._compare(name, map(read_rgb, samples), len(samples))
        if self._networks.clip is not None:
            scores: list[float] = []
            for group in batches(samples, BATCH):
                scores += self._networks.clip([read_rgb(s) for s in group], [s.prompt.text for s in group])
            found["clip_score"] = float(np.mean(scores))
        if pairs:
            both = Pairs(self._networks.lpips)
            for couples in batches(zip(samples, pairs, strict=True), BATCH):
                both.add([read_rgb(ours) for ours, _ in couples], [read_rgb(theirs) for _, theirs in couples])
            found |= both.figures("to_first")
        return found

    def ceilings(self, rebuild: Callable[[Rgb], Rgb] | None) -> dict[str, dict[str, Any]]:
        """The reference's own grid and grain, and the fidelity of its images ``rebuild``-ed by the base VAE."""
        found = {"real": streamed.absolute(self._truth[0])}
        if rebuild is None:
            return found
        both = Pairs(self._networks.lpips)

        def rebuilt() -> Iterator[Rgb]:
            for group in batches(self._images, BATCH):
                made = [rebuild(image) for image in group]
                both.add(made, group)
                yield from made

        found["vae"] = self._compare("VAE", rebuilt(), self._images.count)
        found["vae"] |= both.figures("reconstruction")
        return found


class Pairs:
    """Means over pairs of images: PSNR in dB, and LPIPS where its network is there."""

    def __init__(self, lpips: Distance | None):
        self._lpips = lpips
        self._ratios: list[float] = []
        self._distances: list[float] = []

    def add(self, ours: Sequence[Rgb], theirs: Sequence[Rgb]) -> None:
        """Take pairs of one size."""
        self._ratios += [features.psnr(a[None], b[None]) for a, b in zip(ours, theirs, strict=True)]
        if self._lpips is not None:
            self._distances += self._lpips(ours, theirs)

    def figures(self, what: str) -> dict[str, float]:
        """``psnr_<what>`` and ``lpips_<what>``."""
        found = {f"psnr_{what}": float(np.mean(self._ratios))}
        return found | ({f"lpips_{what}": float(np.mean(self._distances))} if self._distances else {})
