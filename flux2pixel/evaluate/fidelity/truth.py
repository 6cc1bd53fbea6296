"""A set of true images, and the fidelity of other images to it.

n  images    d  feature width    p  the model's patch size

The images come from anything with the four words of `Source`: a user's own folder (`TrueImages`), or what a base's
plug-in renders. They are read one by one, and by the networks whose weights are there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from flux2pixel.data import Unreadable, open_source
from flux2pixel.data.buckets import Placement, fit
from flux2pixel.data.decode import decode, read_bytes
from flux2pixel.evaluate.fidelity import distances, measures
from flux2pixel.evaluate.fidelity.networks import Distance, Features, Networks
from flux2pixel.evaluate.suite import Rgb, Sample, batches, read_rgb
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.progress import bar, log

BATCH = 16
AREA = 2**20  # pixels that go through a VAE at once
CROPS = 4  # of each image, for patch-FID
CROP = 299  # pixels: Inception's own input, so that nothing is resampled
SMALL = 64  # pixels of the short side up to which features of patches stand beside those of photographs


class Source(Protocol):
    """True images of one size, at most ``count``, the same ones each time it is read."""

    count: int
    size: tuple[int, int]  # (height, width)

    @property
    def digest(self) -> str:
        """Digest of the images and their size."""

    def __iter__(self) -> Iterator[Rgb]:
        """Read them in order."""


def crops(image: Rgb, seed: int) -> list[Rgb]:
    """``CROPS`` squares of up to 299 pixels, at most half the short side, placed by ``seed`` alone."""
    height, width = image.shape[:2]
    side = max(1, min(CROP, min(height, width) // 2))
    rng = np.random.default_rng([299, seed])
    corners = rng.integers(0, (height - side + 1, width - side + 1), (CROPS, 2))
    return [image[top : top + side, left : left + side] for top, left in corners]


class TrueImages:
    """The first ``count`` usable images of a source (a folder, or anything `open_source` reads), cropped to a size.

    Images are scaled down and cut at the centre to ``size`` (height, width). Smaller ones are left out and counted:
    scaled up they would pass blur for truth. Raises UsageError if the source is not there or fewer than two are left.
    """

    def __init__(self, spec: str, count: int, size: tuple[int, int]):
        self.spec, self.count, self.size = spec, count, size
        self._source = open_source(spec)

    def __iter__(self) -> Iterator[Rgb]:
        return (image for _, image in self._usable())

    def _usable(self) -> Iterator[tuple[str, Rgb]]:
        height, width = self.size
        used = 0
        for record in self._source.records():
            if used == self.count:
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
                used += 1
                yield digest, fit(picture, Placement((height, width), scale, 0.0))

    @cached_property
    def digest(self) -> str:
        """Digest of the images used and their size."""
        found = [digest for digest, _ in self._usable()]
        if len(found) < 2:
            raise UsageError(
                f"reference {self.spec}: holds {len(found)} readable images of at least "
                f"{self.size[1]}x{self.size[0]} pixels; fidelity needs 2, and FID thousands"
            )
        if len(found) < self.count:
            log(f"reference {self.spec}: {len(found)} usable images, {self.count} asked for (eval.fidelity_images)")
        return hashlib.sha256(" ".join([*found, str(self.size)]).encode()).hexdigest()


class TrueSet:
    """A source opened: its summary and features are computed once, when first needed."""

    def __init__(self, images: Source, patch: int, networks: Callable[[], Networks] = Networks):
        self._images, self._patch, self._open = images, patch, networks

    @cached_property
    def _networks(self) -> Networks:
        return self._open()

    @cached_property
    def _small_basis(self) -> Features | None:
        """Components of the reference's patches, for features of small images; None for large ones."""
        if min(self._images.size) > SMALL:
            return None
        return measures.leading(
            measures.summarise(self._images, self._patch).patches, self._patch, distances.COMPONENTS
        )

    @cached_property
    def _truth(self) -> tuple[measures.Summary, dict[str, Features]]:
        return self._read("reference", self._images, self._images.count)

    def _read(self, what: str, images: Iterable[Rgb], count: int) -> tuple[measures.Summary, dict[str, Features]]:
        """Summary and features (n, d) of a set, read once: of patches, of Inception, and of Inception on crops."""
        rows: dict[str, list[Features]] = {"": [], "inception_": [], "patch_fid": []}
        extract, basis = self._networks.inception, self._small_basis

        def through() -> Iterator[Rgb]:
            seen = 0
            with bar(f"fidelity {what}", count, unit="images") as progress:
                for group in batches(images, BATCH):
                    if basis is not None:
                        rows[""].append(distances.patch_features(group, basis, self._patch))
                    if extract is not None:
                        rows["inception_"].append(extract(group))
                        parts = [crop for i, image in enumerate(group) for crop in crops(image, seen + i)]
                        rows["patch_fid"] += [extract(part) for part in batches(parts, BATCH)]
                    seen += len(group)
                    yield from group
                    progress.advance(len(group))

        summary = measures.summarise(through(), self._patch)
        return summary, {name: np.concatenate(found) for name, found in rows.items() if found}

    def _compare(self, what: str, images: Iterable[Rgb], count: int) -> dict[str, float]:
        summary, seen = self._read(what, images, count)
        truth, known = self._truth
        found = measures.measure(summary, truth)
        for prefix in ("", "inception_"):
            if prefix in seen:
                found |= {f"{prefix}{k}": v for k, v in distances.distances(seen[prefix], known[prefix]).items()}
        if "patch_fid" in seen:
            found["patch_fid"] = distances.fid(seen["patch_fid"], known["patch_fid"])
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

    def ceilings(
        self, rebuild: Callable[[Sequence[Rgb]], Sequence[Rgb]] | None, others: Source | None = None
    ) -> dict[str, dict[str, Any]]:
        """What true images score against others of their kind, and what is left of them behind the base's VAE.

        ``others`` are true images beside the set's own; without them ``real`` has the measures that need no reference.
        ``rebuild`` is the VAE's reconstruction of images of one size, of ``others`` or else of the set itself.
        """
        if others is None:
            found = {"real": measures.absolute(self._truth[0])}
        else:
            found = {"real": self._compare("true images", others, others.count)}
        if rebuild is None:
            return found
        both, images = Pairs(self._networks.lpips), others or self._images

        def rebuilt() -> Iterator[Rgb]:
            for group in batches(images, max(1, min(BATCH, AREA // (images.size[0] * images.size[1])))):
                made = rebuild(group)
                both.add(made, group)
                yield from made

        found["vae"] = self._compare("VAE", rebuilt(), images.count)
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
        self._ratios += [distances.psnr(a, b) for a, b in zip(ours, theirs, strict=True)]
        if self._lpips is not None:
            self._distances += self._lpips(ours, theirs)

    def figures(self, what: str) -> dict[str, float]:
        """``psnr_<what>`` and ``lpips_<what>``."""
        found = {f"psnr_{what}": float(np.mean(self._ratios))}
        return found | ({f"lpips_{what}": float(np.mean(self._distances))} if self._distances else {})
