"""Fidelity in a report: every model against true images, of the user's own or rendered by the base's plug-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux2pixel.evaluate import results
from flux2pixel.evaluate.assets.fetch import ALEXNET_FILE, CLIP_FILE, INCEPTION_FILE
from flux2pixel.evaluate.fidelity import networks
from flux2pixel.evaluate.fidelity.networks import Networks
from flux2pixel.evaluate.fidelity.truth import Source, TrueImages, TrueSet
from flux2pixel.evaluate.geneval import judge
from flux2pixel.evaluate.results import Outcome
from flux2pixel.evaluate.store import Digests, Memo
from flux2pixel.evaluate.suite import Rgb, Sample
from flux2pixel.evaluate.suites import assets_folder
from flux2pixel.families import registry
from flux2pixel.models import base as bases
from flux2pixel.models.base import Base
from flux2pixel.recipe import Recipe
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.progress import log

MEASURED = 3  # version of the fidelity measures: what was kept of another is computed again
GRID = 16  # pixels: the patch of every known family, where images come without a model
WEIGHTS = {"inception": INCEPTION_FILE, "clip": CLIP_FILE, "lpips": ALEXNET_FILE}


def compare_with_renders(
    recipe: Recipe, report: dict[str, Any], outcomes: Sequence[Outcome], memo: Memo, digests: Digests
) -> None:
    """The ceilings of a base whose plug-in renders the truth, and every model's fidelity to such renders.

    They pose the suite's own prompts in its proportions, so that content does not count as infidelity. Does nothing
    for other bases.
    """
    plugin = registry.plugin(recipe.base)
    if plugin is None or plugin.truth is None:
        return
    renders = plugin.truth([dict(prompt.data) for prompt in outcomes[0].suite.asked], recipe.eval.fidelity_images)
    report["detector_ceiling"] = memo.of(
        {"detector": renders.digest, "version": results.versions()["flux2pixel"]},
        lambda: renders.detector_ceiling(judge),
    )
    if "fidelity" in recipe.eval.suite and not recipe.eval.reference:
        base = bases.open_base(recipe.base)
        _compare(report, outcomes, memo, digests, renders, base, base.device, others=renders.others())


def compare_with_images(
    recipe: Recipe,
    report: dict[str, Any],
    outcomes: Sequence[Outcome],
    memo: Memo,
    digests: Digests,
    place: torch.device,
) -> None:
    """Every model, and the base VAE's reconstruction, against the reference images of the recipe.

    Of the suites, the first whose images have one size is measured. ``report["fidelity_reference"]`` says what with.
    """
    suite = next((outcome.suite for outcome in outcomes if outcome.suite.side), None)
    if suite is None:
        log("fidelity: left out: the images differ in size; set eval.size, or add --suite geneval")
        return
    outcomes = [outcome for outcome in outcomes if outcome.suite is suite]
    base, assets = _base(recipe, outcomes), assets_folder(recipe)
    images = TrueImages(recipe.eval.reference, recipe.eval.fidelity_images, (suite.side, suite.side))
    lost = networks.absent(assets)
    for line in lost.values():
        log(f"fidelity: left out: {line}")
    weights = {name: digests.of_file(assets / file) for name, file in WEIGHTS.items() if name not in lost}
    report["fidelity_reference"] = {
        "source": recipe.eval.reference,
        "digest": images.digest,
        "suite": suite.name,
        "size": suite.side,
        "patch": base.patch_size if base else GRID,
        "weights": weights,
        "absent": list(lost.values()),
    }
    opened = partial(networks.open_networks, assets, place)
    _compare(report, outcomes, memo, digests, images, base, place, opened, weights)


def _compare(
    report: dict[str, Any],
    outcomes: Sequence[Outcome],
    memo: Memo,
    digests: Digests,
    images: Source,
    base: Base | None,
    place: torch.device,
    opened: Callable[[], Networks] = Networks,
    weights: Mapping[str, str] | None = None,
    others: Source | None = None,
) -> None:
    """Measure every outcome and the ceilings, each once: what decided a figure is the key it is kept under."""
    patch = base.patch_size if base else GRID
    what: dict[str, Any] = {"reference": images.digest, "patch": patch, "weights": weights or {}}
    what |= {"versions": results.versions(), "measures": MEASURED, "count": images.count}
    truth = TrueSet(images, patch, opened)
    ceiling = what | {"vae": digests.of_model(base.folder, ["vae"]) if base else ""}
    ceiling["others"] = others.digest if others else ""
    report["fidelity_ceiling"] = memo.of(
        ceiling, lambda: truth.ceilings(_through_vae(base, place) if base else None, others)
    )
    for name, samples, pairs in _chosen(outcomes, images.count):
        shown = [[digests.of_file(sample.path) for sample in some] for some in (samples, pairs)]
        inputs = what | {"images": shown, "prompts": [s.prompt.text for s in samples]}
        inputs |= {"boxes": [s.box for s in samples]}
        report["models"][name]["fidelity"] = memo.of(inputs, partial(truth.measure, name, samples, pairs))


def _spread(outcome: Outcome, count: int) -> list[Sample]:
    """The first image of every prompt, then the second ones: any number of them is spread over all prompts."""
    return sorted(outcome.samples, key=lambda sample: sample.index)[:count]


def _chosen(outcomes: Sequence[Outcome], count: int) -> Iterator[tuple[str, list[Sample], list[Sample]]]:
    """Each model's name, the samples of it that are measured, and the first model's for the same prompts and seeds."""
    first = _spread(outcomes[0], count)
    for outcome in outcomes:
        samples = _spread(outcome, count)
        same = [(s.prompt.id, s.index) for s in samples] == [(s.prompt.id, s.index) for s in first]
        paired = same and outcome is not outcomes[0] and outcome.candidate.open is not None
        yield outcome.candidate.name, samples, first if paired else []


def _base(recipe: Recipe, outcomes: Sequence[Outcome]) -> Base | None:
    """The recipe's base, unless it would have to be got for images made elsewhere, or is of no known family."""
    here = registry.plugin(recipe.base) is not None or Path(recipe.base).is_dir()
    if not here and all(outcome.candidate.open is None for outcome in outcomes):
        log(f"fidelity: {recipe.base} is not at hand: no ceiling of its VAE, blockiness on a grid of {GRID} pixels")
        return None
    try:
        return bases.open_base(bases.resolve(recipe.base))
    except UsageError as error:
        log(f"fidelity: no ceiling of the VAE, blockiness on a grid of {GRID} pixels: {error}")
        return None


def _through_vae(base: Base, place: torch.device) -> Callable[[Sequence[Rgb]], Sequence[Rgb]]:
    """The base VAE's reconstruction of images (H, W, 3) uint8 of one size: the ceiling of anything latent."""
    from flux2pixel.models.model import to_bytes

    base.device = place

    @torch.no_grad()
    def rebuild(images: Sequence[Rgb]) -> Sequence[Rgb]:
        rgb = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(place).float() / 255
        return list(to_bytes(base.decode(base.encode(rgb), *rgb.shape[-2:])))

    return rebuild
