"""From images to sums, saved every minute: a fit that is stopped goes on where it was, with any number of processes.

B  images    N = h w  tokens    D  pixel token width    r  latent width    C  width of the features

The network is asked at what sampling asks it: the low-rank image of the clean latents with noise, k x_t = A z_tau in
the subspace, z_tau = (1 - tau) z + tau eps. What lies outside the subspace it does not see.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flux2pixel.asymflow.codec import Codec
from flux2pixel.asymflow.method import AsymFlow, per_token
from flux2pixel.asymflow.readout import local_features
from flux2pixel.asymflow.schedule import noise_levels
from flux2pixel.data import Tally
from flux2pixel.families.base import Conditioning
from flux2pixel.models.base import Base
from flux2pixel.models.features import Features
from flux2pixel.models.folder import PixelFolder
from flux2pixel.readout.images import DIGEST, Images, batches, draw
from flux2pixel.readout.sums import Sums, bin_of, held_out, read_sums, write_sums
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.errors import Flux2PixelError
from flux2pixel.runtime.processes import Team
from flux2pixel.runtime.progress import bar, log

SAVE_SECONDS = 60.0
JITTER = 0.1  # relative, of the last noise level, so that the readout does not hang on the one
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def last_level(folder: PixelFolder) -> float:
    """The noise level at which the model's own sampler asks the network for the last time."""
    sampler = folder.sampler
    return float(noise_levels(sampler.steps, sampler.shift or 1.0, sampler.height, sampler.width)[-2])


@dataclass(frozen=True)
class Observer:
    """The frozen model as a fit sees it: the pixel network, and the base whose VAE pairs pixels with latents."""

    base: Base
    pixel: Base
    folder: PixelFolder
    recipe: Recipe
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.recipe.readout.precision]

    def pairs(self, images: Images) -> tuple[Tensor, Tensor]:
        """Pixel tokens x (B, N, D), without the offset, and latents z (B, N, r)."""
        x = Codec(self.folder.codec.patch).encode(images.rgb)
        return x, self.base.encode(images.rgb) if images.z is None else images.z.to(images.rgb)

    def predict(
        self, z_t: Tensor, tau: Tensor, text: Conditioning, grid: tuple[int, int], flow: AsymFlow
    ) -> tuple[Tensor, Tensor]:
        """h (B, N, C) and z_hat (B, N, r) at latents z_t and network times tau (B,); float32 or float64."""
        network, exact = self.pixel.transformer, self.dtype == torch.float64
        wide = torch.float64 if exact else torch.float32
        inputs = z_t.to(wide) @ flow.basis.to(z_t.device, wide).mT
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        with torch.no_grad(), half, Features(self.pixel, network, z_t.shape[1]) as features:
            v = self.pixel.call(network, inputs, tau.to(inputs), text, grid).to(z_t.dtype)
        features.align(v)
        check_features(self.pixel, network, features.h, v)
        return features.h, z_t - per_token(tau.to(z_t), z_t) * (v @ flow.basis.to(z_t))

    def add(self, sums: Sums, images: Images) -> None:
        """Add a batch of images to the sums."""
        if self.dtype == torch.float64 and len(images.digests) > 1:
            # The float32 rounding of the VAE and of the text encoder depends on the batch; alone, an image has one.
            for alone in images.singly():
                self.add(sums, alone)
            return
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        flow = self.folder.flow.to(self.device, wide)
        x, z = (tensor.to(wide) for tensor in self.pairs(images))
        height, width = images.rgb.shape[-2:]
        grid = (height // self.folder.codec.patch, width // self.folder.codec.patch)
        text = {name: value.to(self.device) for name, value in self.pixel.text(images.captions).items()}
        held = torch.tensor([held_out(digest) for digest in images.digests])
        sets = [("fit", ~held), ("held", held)]

        sigma, z_t, tau = self._noisy(images, z, flow, "last")
        h, z_hat = self.predict(z_t, tau, text, grid, flow)
        reduced = h if sums.directions is None else h @ sums.directions.to(h)
        k = flow.calibrate(sigma)[0]
        f = local_features(reduced.to(wide), z_t / per_token(k, z_t), grid, sums.window)
        for name, rows in sets:
            if rows.any():
                some = rows.to(self.device)
                sums.part(f"{name}.last", self.device).add(f[some], z_hat[some], x[some], h[some].to(wide))
        if held.any():
            sums.vae += self._reconstruction(x, z, images, held.to(self.device))

        sigma, z_t, tau = self._noisy(images, z, flow, "level")
        h, _ = self.predict(z_t, tau, text, grid, flow)
        bins = torch.tensor([bin_of(level) for level in sigma.tolist()])
        for name, rows in sets:
            for number in sorted(set(bins[rows].tolist())):
                some = (rows & (bins == number)).to(self.device)
                one = torch.ones_like(h[some][..., :1])
                sums.part(f"{name}.level{number}", self.device).add(h[some].to(wide), one.to(wide), z[some], x[some])

    def last(self, images: Images) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_t (B, N, D) of the low-rank images at the last noise level, h (B, N, C), z_hat (B, N, r), sigma (B,)."""
        flow = self.folder.flow.to(self.device)
        height, width = images.rgb.shape[-2:]
        grid = (height // self.folder.codec.patch, width // self.folder.codec.patch)
        text = {name: value.to(self.device) for name, value in self.pixel.text(images.captions).items()}
        sigma, z_t, tau = self._noisy(images, self.pairs(images)[1].float(), flow, "last")
        h, z_hat = self.predict(z_t, tau, text, grid, flow)
        x_t = z_t @ flow.basis.mT / per_token(flow.calibrate(sigma)[0], z_t)
        return x_t, h.float(), z_hat, sigma

    def _noisy(self, images: Images, z: Tensor, flow: AsymFlow, what: str) -> tuple[Tensor, Tensor, Tensor]:
        """Noise levels sigma (B,), noisy latents z_tau (B, N, r) and times tau (B,)."""
        drawn = [draw(self.recipe.seed, digest, what, *z.shape[1:]) for digest in images.digests]
        uniform = torch.tensor([level for level, _ in drawn], dtype=torch.float64)
        # Squared: most levels are low, where the picture's detail is decided.
        last = last_level(self.folder) * (1 + JITTER * (2 * uniform - 1))
        sigma = (uniform**2 if what == "level" else last).to(z)
        tau = flow.calibrate(sigma)[1]
        noise = torch.stack([noise for _, noise in drawn]).to(z)
        return sigma, torch.lerp(z, noise, per_token(tau, z)), tau

    def _reconstruction(self, x: Tensor, z: Tensor, images: Images, held: Tensor) -> Tensor:
        """Squared error and tokens of the VAE's reconstruction of the held-out images."""
        with torch.no_grad():
            rgb = self.base.decode(z[held].float(), *images.rgb.shape[-2:]).clamp(0, 1)
        error = Codec(self.folder.codec.patch).encode(rgb).to(x) - x[held]
        return torch.tensor([float(error.double().square().sum()), error.shape[0] * error.shape[1]]).double()


def sign_of(base: Base, network: Any, h: Tensor, v: Tensor) -> float:
    """1 if v is the out-projection of h, as its class orders a token, -1 if it is the negative of that (Z-Image)."""
    module = network.get_submodule(base.pixel_name(base.projections.output))
    with torch.no_grad():
        out = module(h.to(module.weight.dtype)).to(v)
    along = float((out.square().sum(-1) - v.square().sum(-1)).abs().max() / v.square().sum(-1).max().clamp(min=1e-30))
    if not along < 0.05:
        raise Flux2PixelError(f"{base.folder}: what enters the out-projection of a {base.family} is not its features")
    order = row_order(base, len(v[0, 0])).to(v.device)
    placed = torch.empty_like(out)
    placed[..., order] = out
    return 1.0 if float((placed * v).sum()) > 0 else -1.0


def row_order(base: Base, width: int) -> Tensor:
    """The number, in c,ph,pw order, of each of the ``width`` rows of the family's out-projection."""
    side = round((width / 3) ** 0.5)
    if base.projections.output_order == "c,ph,pw":
        return torch.arange(width)
    return torch.arange(width).view(3, side, side).permute(1, 2, 0).flatten()


def check_features(base: Base, network: Any, h: Tensor, v: Tensor) -> None:
    """Raise Flux2PixelError unless h is what the out-projection made v of; looked at once for a network."""
    if getattr(network, "_flux2pixel_sign", None) is None:
        network._flux2pixel_sign = sign_of(base, network, h, v)


def pilot(observer: Observer, images: Images, count: int) -> Tensor:
    """The ``count`` leading directions V (C, K) of the features of some images at the last noise level."""
    rows = observer.last(images)[1].flatten(0, 1).double()
    return torch.linalg.eigh(rows.mT @ rows).eigenvectors.flip(1)[:, :count].contiguous().cpu()


def gather(observer: Observer, team: Team, path: Path, window: int) -> tuple[Sums, Tally]:
    """The sums over all images of the recipe, by all processes; ``path`` is where the unfinished sums are saved."""
    recipe, sampler = observer.recipe, observer.folder.sampler
    channels = observer.pixel.transformer.get_submodule(
        observer.pixel.pixel_name(observer.pixel.projections.output)
    ).weight.shape[1]
    shape = (channels, observer.base.latent_width, observer.base.token_width, window)
    saved = Saved(path, fingerprint(observer, window), team)
    found, done = saved.read()
    tally = Tally(recipe.readout.max_broken)
    directions = found.directions if found is not None else None
    if found is None and channels > recipe.readout.directions:
        first = next(batches(recipe, observer.base, sampler, Tally(), Team(device=team.device), set()))
        directions = team.broadcast(pilot(observer, first, recipe.readout.directions))
    sums = found if found is not None and team.leads else Sums(*shape, directions)
    sums = sums.to(team.device)
    mine = list(done) if team.leads else []
    clock, total = time.monotonic(), -(-recipe.readout.images // team.world) or None
    with bar("fit-readout", total, shown=team.leads) as progress:
        for images in batches(recipe, observer.base, sampler, tally, team, set(done)):
            observer.add(sums, images)
            mine += images.digests
            progress.advance(len(images.digests))
            if time.monotonic() - clock > SAVE_SECONDS:
                saved.write(sums, mine)
                clock = time.monotonic()
    saved.write(sums, mine)  # another process may still fail; what this one did is kept until the folder is written
    return _total(sums.to("cpu"), team), tally


def _total(sums: Sums, team: Team) -> Sums:
    """The sums of all processes, on every one of them."""
    if team.world == 1:
        return sums
    for name in sorted(set().union(*team.gather(sorted(sums.grams)))):
        gram = sums.part(name)
        counts = torch.tensor([gram.tokens, gram.images])
        for tensor in (gram.upper, counts):
            dist.all_reduce(tensor)
        gram.tokens, gram.images = counts.tolist()
    dist.all_reduce(sums.vae)
    return sums


def fingerprint(observer: Observer, window: int) -> str:
    """What the sums depend on besides the images."""
    settings, folder = observer.recipe.readout, observer.folder
    names = ("source", "images", "resolution", "precision", "prompts", "directions")
    parts: list[Any] = [getattr(settings, name) for name in names]
    parts += [observer.recipe.seed, window, last_level(folder), str(observer.pixel.folder)]
    parts += [float(folder.flow.scale), float(folder.flow.basis.double().square().sum())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Saved:
    """Unfinished sums beside ``path``, one file a process, ``<name>.partial-<id>.safetensors``.

    When a fit goes on, its first process takes over all of them into a file of its own that names whose they are, so
    that a kill between writing it and removing them counts nothing twice. Machines must share the folder.
    """

    def __init__(self, path: Path, fingerprint: str, team: Team):
        self.path, self.fingerprint, self.team = path, fingerprint, team
        self.id, self.absorbed = uuid.uuid4().hex[: 2 * DIGEST], set[str]()

    @property
    def files(self) -> list[Path]:
        """The unfinished sums that are there."""
        return sorted(self.path.parent.glob(f"{self.path.name}.partial-*.safetensors"))

    def read(self) -> tuple[Sums | None, list[str]]:
        """The sums so far and their images' digests, in every process; the first one takes them over."""
        found = [(file, *read_sums(file)) for file in self.files]
        usable = [entry for entry in found if entry[2].get("fingerprint") == self.fingerprint]
        for file, *_ in (entry for entry in found if entry not in usable):
            if self.team.leads:
                log(f"{file}: sums of other images or settings, left out")
        for _, _, metadata, _ in usable:
            self.absorbed.update(metadata["absorbed"].split())
        total, done = None, list[str]()
        for _, sums, metadata, digests in usable:
            if metadata["id"] not in self.absorbed:
                total = sums if total is None else total + sums
                done += digests
                self.absorbed.add(metadata["id"])
        self.team.barrier()  # no file is replaced before all have read it
        if self.team.leads and total is not None:
            log(f"resuming: {len(done)} images are in the sums already")
            self.write(total, done)
            for file, *_ in usable:
                file.unlink(missing_ok=True)
        self.team.barrier()
        return total, done

    def write(self, sums: Sums, digests: list[str]) -> None:
        """Replace this process's file."""
        absorbed = " ".join(sorted(self.absorbed)) if self.team.leads else ""
        metadata: Mapping[str, object] = {"fingerprint": self.fingerprint, "id": self.id, "absorbed": absorbed}
        mine = self.path.with_name(f"{self.path.name}.partial-{self.id}.safetensors")
        write_sums(mine, sums.to("cpu"), metadata, digests)

    def remove(self) -> None:
        """Forget the unfinished sums, for when the folder is written."""
        for file in self.files:
            file.unlink(missing_ok=True)
