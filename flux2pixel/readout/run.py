"""The fit-readout stage: a converted folder and images -> sums -> a model folder with a readout, and its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flux2pixel.asymflow.codec import Codec
from flux2pixel.asymflow.readout import Readout
from flux2pixel.data import Tally, open_source
from flux2pixel.models.base import open_base
from flux2pixel.models.folder import PixelFolder, equals_its_base, is_pixel_folder, read_folder
from flux2pixel.readout import report
from flux2pixel.readout.gather import Observer, Saved, gather, last_level
from flux2pixel.readout.images import FIRST_SCENE, batches, read_prompts
from flux2pixel.readout.solve import Fit, fit
from flux2pixel.readout.sums import Sums, read_sums, write_sums
from flux2pixel.readout.write import finished, leak, write_model, write_record
from flux2pixel.recipe import Recipe, as_dict
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.launch import set_threads
from flux2pixel.runtime.processes import Team, join
from flux2pixel.runtime.progress import log
from flux2pixel.runtime.version import __version__

STAGE, SUMS = "fit-readout", "sums.safetensors"
CARD = """
What the basis leaves out was fitted in closed form to the frozen network's own features, without training: {parts}, on
{images} images (`readout.md`). The head is in `transformer/`; prior and last step are in `asymflow.safetensors`.
"""
TOKENS_A_FEATURE = 2  # tokens to fit on, at least, for every feature of the last step


def fit_readout(
    recipe: Recipe,
    run: Path,
    model: Path | None = None,
    out: Path | None = None,
    merge: Sequence[Path] = (),
) -> Path:
    """Fit the parts of ``recipe.readout`` to a converted folder and write ``<run>/readout``; returns that folder.

    ``model`` is the converted folder (``<run>/converted``), ``merge`` names files of sums to add up instead of reading
    images. Under torchrun every process calls this and reads its part of the images; the first one solves and writes.

    Raises UsageError for a folder of another base, one that has a readout or was trained, or too few images.
    """
    set_threads(recipe.threads)
    torch.set_flush_denormal(True)
    source, target = model or run / "converted", out or run / "readout"
    stored = check(recipe, source)
    files.check_new(target, STAGE)
    target.parent.mkdir(parents=True, exist_ok=True)
    with join(device=recipe.device, float64=True) as team:
        observer = observe(recipe, source, stored, team.device)
        window = recipe.readout.window
        if merge:
            sums, tally = merged(merge, observer, window), Tally()
        else:
            if team.leads:
                log(f"fit-readout: model {source}, images {recipe.readout.source or 'drawn by the base itself'}")
            sums, tally = gather(observer, team, target, window)
        if team.leads:
            for line in tally.lines() if tally.seen else ():
                log(line)
            try:
                enough(sums, recipe)
                _finish(recipe, observer, sums, source, target, with_images=not merge)
            except UsageError:  # no later fit with other settings could use these sums
                Saved(target, "", team).remove()
                raise
            Saved(target, "", team).remove()
        team.barrier()
    return target


def check(recipe: Recipe, source: Path) -> PixelFolder:
    """The converted folder's description. Raises UsageError where it, or a setting, does not go with a readout."""
    if not recipe.readout.window % 2:
        raise UsageError(f"readout.window = {recipe.readout.window} must be odd: a token and as many on either side")
    read_prompts(recipe.readout.prompts)
    if recipe.readout.source:
        open_source(recipe.readout.source, FIRST_SCENE)
    if not is_pixel_folder(source):
        raise UsageError(f"{source}: not a converted model; run flux2pixel convert first, or name one with --model")
    stored = read_folder(source)
    if finished(source):
        raise UsageError(f"{source}: already has a readout; name the converted folder that it was fitted to")
    if not equals_its_base(source):
        raise UsageError(f"{source}: was trained after its conversion; a readout is fitted to a converted model")
    if stored.base != recipe.base:
        raise UsageError(
            f"{source}: was converted from base {stored.base!r}, but the recipe's is {recipe.base!r}; name one of them"
        )
    return stored


def observe(recipe: Recipe, source: Path, stored: PixelFolder, device: torch.device) -> Observer:
    """The frozen model and its base, on the device when first used."""
    pixel, base = open_base(source, device=device), open_base(recipe.base, device=device)
    if recipe.readout.precision == "fp64":
        pixel.transformer.double()
    return Observer(base, pixel, stored, recipe, device)


def merged(paths: Sequence[Path], observer: Observer, window: int) -> Sums:
    """The sums of several files. Raises UsageError if one is of another model or window."""
    total: Sums | None = None
    for path in paths:
        sums, metadata, _ = read_sums(path)
        if metadata.get("model") != model_digest(observer):
            raise UsageError(f"{path}: sums of another model than {observer.pixel.folder}; they cannot be merged")
        if sums.window != window:
            raise UsageError(f"{path}: sums of neighbourhoods of {sums.window}, not of readout.window {window}")
        try:
            total = sums if total is None else total + sums
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from error
    assert total is not None
    return total


def model_digest(observer: Observer) -> str:
    """What tells a converted model from others: the digest of its out-projection, basis and scale."""
    import hashlib

    module = observer.pixel.transformer.get_submodule(observer.pixel.pixel_name(observer.pixel.projections.output))
    flow, digest = observer.folder.flow, hashlib.sha256()
    for tensor in (module.weight, flow.basis, flow.scale):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def enough(sums: Sums, recipe: Recipe) -> None:
    """Raise UsageError if there are too few images for the features, or none held out."""
    grams = [sums.grams.get(name) for name in ("fit.last", "held.last")]
    if grams[0] is None or grams[1] is None:
        raise UsageError(f"readout.images: {sums.images} usable images are too few; a hundred is the least")
    features = grams[0].widths[0][1] if "last" in recipe.readout.parts else sums.channels
    tokens = grams[0].tokens
    if tokens < TOKENS_A_FEATURE * features:
        wanted = -(-TOKENS_A_FEATURE * features * sums.images // max(tokens, 1))
        raise UsageError(
            f"readout.images: {sums.images} images have {tokens} tokens to fit {features} features on; "
            f"give at least {wanted} images, or a smaller readout.window"
        )


def _finish(recipe: Recipe, observer: Observer, sums: Sums, source: Path, target: Path, with_images: bool) -> None:
    settings, stored = recipe.readout, observer.folder
    found = fit(sums, stored.flow, settings.parts, settings.levels, settings.ridge)
    readout = tensors_of(found, sums, stored)
    network = observer.pixel.transformer
    figures: dict[str, Any] = {"parts": list(settings.parts)} | report.figures(sums, stored.flow, found)
    figures["last_level"] = last_level(stored)
    dtype = network.get_submodule(observer.pixel.pixel_name(observer.pixel.projections.output)).weight.dtype
    figures["head_leak"] = leak(found.head, stored.flow.basis, dtype)
    figures["verdict"] = report.verdict(figures)
    figures["grid"] = grid_rows(observer, found, readout) if with_images else []
    sign = sign_known(observer)
    with files.new_folder(target, STAGE) as folder:
        digests = write_model(folder, source, observer.pixel, stored, found, readout, sign, recipe)
        write_sums(folder / SUMS, sums, {"model": model_digest(observer), "images": sums.images})
        record = {"version": __version__, "base": recipe.base, "transformer_sha256": digests}
        write_record(folder, record | figures | {"recipe": as_dict(recipe)})
        (folder / "readout.md").write_text(report.table(figures), encoding="utf-8")
        with (folder / "README.md").open("a", encoding="utf-8") as card:
            card.write(CARD.format(parts=", ".join(settings.parts), images=sums.images))
    log(report.table(figures))
    log(f"wrote {target}")


def grid_rows(observer: Observer, found: Fit, readout: Readout) -> list[dict[str, Any]]:
    """The patch-grid ratios of some of the images, of the VAE's reconstruction, and of predictions at the last level.

    The texture is left out of the prediction: it would be that of the images themselves, which sampling has not.
    """
    recipe, stored = observer.recipe, observer.folder
    images = next(batches(recipe, observer.base, stored.sampler, Tally(), Team(device=observer.device), set()))
    height, width = images.rgb.shape[-2:]
    plain, codec = Codec(stored.codec.patch), Codec(stored.codec.patch, found.offset.to(observer.device))
    x_t, h, z_hat, sigma = observer.last(images)
    low = stored.flow.to(observer.device).lift(z_hat)
    mean = replace(readout, directions=None, variance=None).to(observer.device)
    x0 = low + h @ found.head.to(h).mT
    grid = (height // stored.codec.patch, width // stored.codec.patch)
    with torch.no_grad():
        rebuilt = observer.base.decode(observer.pairs(images)[1].float(), height, width).clamp(0, 1)
    shown = {"the images": images.rgb, "the VAE's reconstruction": rebuilt}
    shown |= {"subspace alone": plain.decode(low, height, width)}
    shown |= {"readout, without texture": codec.decode(mean.finish(x0, x_t, sigma, h, grid), height, width)}
    ratio = partial(report.grid_ratio, patch=stored.codec.patch)
    return [{"what": what, "first": ratio(rgb, order=1), "second": ratio(rgb, order=2)} for what, rgb in shown.items()]


def sign_known(observer: Observer) -> float:
    """The sign of v in the out-projection's output; from a call of the network on noise if no image told it yet."""
    network = observer.pixel.transformer
    if getattr(network, "_flux2pixel_sign", None) is None:
        flow, grid = observer.folder.flow.to(observer.device), (2, 2)
        z = torch.randn(1, 4, observer.base.latent_width, generator=torch.Generator().manual_seed(0))
        text = {name: value.to(observer.device) for name, value in observer.pixel.text([""]).items()}
        observer.predict(z.to(observer.device), torch.full((1,), 0.5, device=observer.device), text, grid, flow)
    return float(network._flux2pixel_sign)


def tensors_of(found: Fit, sums: Sums, stored: PixelFolder) -> Readout:
    """Parts 3 and 4 as sampling carries them."""
    reduction = sums.directions if found.last is not None else None
    return Readout(stored.flow.basis, found.directions, found.variance, found.last, reduction, found.transport)
