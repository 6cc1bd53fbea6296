"""The convert stage: a latent checkpoint and a subspace -> a pixel model in a diffusers-style folder.

Planned from headers, streamed into a temporary folder, reopened and proven there, and only then renamed into place.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flux2pixel.asymflow.codec import Codec
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.convert.card import card, copy_licence
from flux2pixel.convert.compare import check_tensors, open_written
from flux2pixel.convert.plan import Plan, index_of, latent_config, pixel_config
from flux2pixel.convert.prepare import Extras, Job, prepare
from flux2pixel.convert.proof import Proof, flow_digest, prove
from flux2pixel.models.base import Base
from flux2pixel.models.digest import vae_digest
from flux2pixel.models.folder import PixelFolder, digest_in_name, finish, write_folder
from flux2pixel.models.sampler import Sampler, of_conversion
from flux2pixel.recipe import Recipe, dumps
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import UsageError
from flux2pixel.runtime.launch import set_threads
from flux2pixel.runtime.progress import bar, log
from flux2pixel.runtime.version import __version__
from flux2pixel.weights.checkpoint import INDEX, Checkpoint, refuse
from flux2pixel.weights.subspace import read_subspace
from flux2pixel.weights.write import copy_file, link_or_copy, write_file

# The published sampler of the released pixel model.
PUBLISHED = Sampler(steps=38, guidance=4.0, shift=17.0, solver="unipc", orthogonal=True, gamut_clamp=True)
SNAPSHOT = re.compile(r"models--([^/]+)/snapshots/([0-9a-f]{40})$")


def convert(
    recipe: Recipe,
    run: Path,
    subspace: Path | None = None,
    out: Path | None = None,
    extras: Extras | None = None,
    device: torch.device | None = None,
    overwrite: bool = False,
) -> Path:
    """Fold the subspace into the base, write the result, prove it; returns the model's folder.

    ``subspace`` is the run's own (``run/subspace.safetensors``) if not given; an adapter brings one. The proof is
    computed on ``device`` if that is a GPU with float64, else on the CPU. Raises UsageError if there is no subspace or
    it does not fit the base; Flux2PixelError if the base is unsound, the disk too small, or the proof fails: nothing is
    left then. ``overwrite`` is that of `files.new_folder`.
    """
    set_threads(recipe.threads)
    extras = extras or Extras()
    flow, made_with = None, _digests(extras)
    if extras.adapter is None:
        subspace = subspace or run / "subspace.safetensors"
        if not subspace.is_file():
            raise UsageError(f"{subspace}: no subspace; make one with flux2pixel fit-subspace, or name one: --subspace")
        flow, metadata = read_subspace(subspace)
        made_with |= {"subspace": metadata, "subspace_sha256": files.digest(subspace)}
    job = prepare(recipe, flow, extras)
    base, flow = job.base, job.flow
    assert flow is not None
    if subspace and extras.adapter is None:
        _check_fit(base, recipe.base, flow, made_with["subspace"], subspace)
    destination = out or run / "converted"
    job.plan.check_room(destination)
    log(f"convert: base {base.folder}, {extras.adapter or subspace}")
    for caution in base.cautions():
        log(f"note: {caution}")
    with files.new_folder(destination, "convert", overwrite) as folder:
        digests = write_transformer(job.plan, folder / "transformer", base, recipe)
        sampler = PUBLISHED if job.adapter else of_conversion(base, float(flow.scale))
        model = PixelFolder(recipe.base, base.family, base.color_space, flow, Codec(base.patch_size), sampler, {})
        write_folder(folder, model, recipe)
        written = open_written(folder / "transformer", job)
        check_places(job.plan, written)
        proof = prove_written(job, written, folder, recipe, device)
        copy_companions(job.plan, folder)
        copy_licence(base, folder)
        record = made_with | source_of(base.folder) | {"transformer_sha256": digests}
        record |= {"flow_sha256": flow_digest(read_flow(folder))}
        record |= {"exactness": proof.as_dict() if proof.depth != "none" else None}
        if job.adapter:
            record |= {"exactness": None, "trunk": proof.as_dict()}
        record |= {"changed": {output.name: output.action for output in job.plan.changed}}
        finish(folder, base, model, recipe, record)
        (folder / "README.md").write_text(card(recipe.base, base, flow, record), encoding="utf-8")
    log(f"wrote {destination}")
    return destination


def prove_written(job: Job, written: Checkpoint, folder: Path, recipe: Recipe, device: torch.device | None) -> Proof:
    """Prove the folder that was just written: what was not copied, element by element, then by sampling."""
    copied = {output.name for shard in job.plan.shards for output in shard.outputs if not output.rows}
    counts, worst = check_tensors(job, written, copied=copied)
    flow = read_flow(folder)
    proof = prove(job, written, flow, recipe.convert, recipe.seed, device)
    proof = replace(proof, tensors=counts, fold_error=worst)
    for line in proof.lines():
        log(line)
    return proof


def read_flow(folder: Path) -> AsymFlow:
    """Basis and scale as a model's folder has them."""
    tensors, _ = files.read_tensors(folder / "asymflow.safetensors")
    return AsymFlow(tensors["basis"], tensors["scale"])


def write_transformer(plan: Plan, folder: Path, base: Base, recipe: Recipe) -> dict[str, Any]:
    """Write the planned shards, their index and ``config.json``; returns SHA-256 by file name.

    A file that repeats one of the base is copied whole, or linked; it is not hashed if the Hub's cache states its
    digest, and a linked file that has none there has None.
    """
    import diffusers

    folder.mkdir(parents=True)
    notes = {"format": "pt", "made_by": f"flux2pixel {__version__}", "base": recipe.base, "recipe": dumps(recipe)}
    digests: dict[str, Any] = {}
    broken: list[str] = []
    with bar("convert", sum(shard.size for shard in plan.shards), unit="bytes") as progress:
        for shard in plan.shards:
            target = folder / shard.name
            known = digest_in_name(shard.twin.resolve()) if shard.twin else None
            if plan.link and shard.twin and link_or_copy(shard.twin, target):
                digests[shard.name] = known
                progress.advance(shard.size, note="linked")
                continue
            target.unlink(missing_ok=True)
            if shard.twin:
                done = copy_file(shard.twin.resolve(), target, shard.outputs, known, progress)
            else:
                done = write_file(target, shard.outputs, notes, progress)
            digests[shard.name] = done.digest
            broken += done.broken
    refuse(base.folder, [f"{name} has values that are NaN or infinite" for name in broken])
    index = index_of(plan)
    if index:
        files.write_json(folder / INDEX, index)
    described = {"_class_name": base.network_class().__name__, "_diffusers_version": diffusers.__version__}
    files.write_json(folder / "config.json", described | pixel_config(base, latent_config(base)))
    return digests


def check_places(plan: Plan, written: Checkpoint) -> None:
    """Raise Flux2PixelError that lists every tensor that is not in the file and of the dtype that the plan says."""
    problems = []
    for shard in plan.shards:
        for output in shard.outputs:
            stored = written.tensors[output.name]
            if (stored.dtype, stored.spans[0].path.name) != (output.dtype, shard.name):
                problems.append(f"{output.name} is not where or what the plan says")
    refuse(written.files[0].parent, problems)


def copy_companions(plan: Plan, folder: Path) -> None:
    """Copy, or link, the base's text encoders, tokenizers and scheduler."""
    with bar("keep", len(plan.companions)) as progress:
        for kept in plan.companions:
            target = folder / kept.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if plan.link and kept.linkable:
                link_or_copy(kept.path, target)
            else:
                shutil.copyfile(kept.path.resolve(), target)
            progress.advance(1, note=kept.name)


def source_of(folder: Path) -> dict[str, str]:
    """The repository and commit of a base that is a snapshot in the Hub's cache; nothing for another folder."""
    match = SNAPSHOT.search(str(folder))
    return {"base_repo": match[1].replace("--", "/"), "base_commit": match[2]} if match else {}


def _digests(extras: Extras) -> dict[str, Any]:
    """Path and SHA-256 of every file that took part beside the base."""
    found: dict[str, Any] = {}
    for key, path in (("weights", extras.weights), ("adapter", extras.adapter)):
        if path:
            found |= {key: str(path.absolute()), f"{key}_sha256": files.digest(path)}
    loras = [
        {"path": str(path.absolute()), "sha256": files.digest(path), "strength": strength}
        for path, strength in extras.loras
    ]
    return found | ({"loras": loras} if loras else {})


def _check_fit(base: Base, name: str, flow: AsymFlow, metadata: dict[str, str], path: Path) -> None:
    """Refuse a subspace of another base, VAE, patch size or rank."""
    width = (base.token_width, base.latent_width)
    if tuple(flow.basis.shape) != width:
        found = tuple(flow.basis.shape)
        raise UsageError(f"{path}: basis {found} is not of patch size {base.patch_size} and rank {width[1]}: {width}")
    if metadata.get("vae_sha256") and metadata["vae_sha256"] != vae_digest(base):
        raise UsageError(f"{path}: fitted for base {metadata.get('base')!r}, not for {name!r}; fit one for this base")
